"""Command line as a module: ``python -m gm_mlic``, ``torchrun -m gm_mlic``."""

from gm_mlic.cli.main import main

if __name__ == "__main__":
    main()
