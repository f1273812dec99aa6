"""``python -m gm_mlic``: the command line, for starters of processes that want a module (``torchrun -m gm_mlic``)."""

from gm_mlic.cli.main import main

if __name__ == "__main__":
    main()
