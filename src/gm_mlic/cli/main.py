"""Console script ``gm-mlic``: dispatches commands to Hydra and reports errors in one line with an exit code.

Exit codes: 0 success, 1 internal error, 2 user error, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import difflib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any

from gm_mlic._version import __version__
from gm_mlic.cli.settings import COMMANDS, summary
from gm_mlic.distributed import rank_info
from gm_mlic.errors import Terminated

#: Environment variable that passes the command to child processes.
COMMAND_VARIABLE = "GM_MLIC_COMMAND"

_HELP = f"""gm-mlic {__version__}: graph matching based multi-label image classification

usage: gm-mlic COMMAND [key=value ...] [--help] [--cfg job] [-m] [--verbose]

commands:
{{commands}}

examples:
  gm-mlic demo
  gm-mlic train experiment=scenes_smoke
  gm-mlic train dataset=coco2014 dataset.root=DIR embedding=glove embedding.path=glove.6B.300d.txt
  gm-mlic dataset dataset=custom dataset.root=DIR dataset.annotations=labels.csv
  gm-mlic train -m graph.m=5,10,15 seed=0,1,2
  gm-mlic runs
  gm-mlic report runs/multirun/DATE
  gm-mlic eval checkpoint=runs/NAME/checkpoints/best.ckpt
  gm-mlic predict checkpoint=runs/NAME/checkpoints/best.ckpt images=PHOTOS
  gm-mlic export checkpoint=runs/NAME/checkpoints/best.ckpt out=my-model
  gm-mlic eval scores=scores.csv targets=targets.csv

gm-mlic COMMAND --help describes a command and its settings.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names and labels may not be in the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command line; returns its exit code."""
    verbose = "--verbose" in argv
    argv = [argument for argument in argv if argument != "--verbose"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<16}{summary(name)}" for name in COMMANDS)), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"gm-mlic {__version__}")
        return 0
    if "LOCAL_RANK" in os.environ and COMMAND_VARIABLE in os.environ and argv[0] not in COMMANDS:
        # Lightning starts the other processes of a node with the settings, but without the command.
        argv = [os.environ[COMMAND_VARIABLE], *argv]
    command, arguments = argv[0], argv[1:]
    os.environ[COMMAND_VARIABLE] = command
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(COMMANDS)}."
        print(f"gm-mlic: error: unknown command {command!r}: {hint}", file=sys.stderr)
        return 2
    # Makes Hydra raise errors instead of printing them and exiting.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before = _handle_sigterm()
    # Only rank 0 prints, but each rank reports its own errors.
    rank = rank_info().rank
    prefix = f"gm-mlic: rank {rank}" if rank else "gm-mlic"
    try:
        from gm_mlic.cli import commands

        commands.run(command, arguments, verbose=verbose)
    except Terminated as stop:
        if rank == 0:
            print("gm-mlic: terminated; run the same command again to resume.", file=sys.stderr)
        return int(stop.code)  # type: ignore[arg-type]
    except SystemExit as stop:  # argparse, and Hydra's --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        if rank == 0:
            print("\ngm-mlic: interrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `gm-mlic ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from gm_mlic.cli.errors import explain

        if verbose:
            traceback.print_exc()
        line, code = explain(error, command, arguments)
        print(f"{prefix}: {line}", file=sys.stderr)
        return code
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _handle_sigterm() -> Any:
    """Raise :class:`Terminated` on SIGTERM, so that locks are released and the run's state is recorded.

    Returns:
        The previous handler; None in threads other than the main thread, which cannot handle signals.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, leave)
