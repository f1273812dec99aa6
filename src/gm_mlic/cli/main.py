"""The console script ``gm-mlic``: choose a command, hand the rest to Hydra, turn errors into one line and a code.

Exit codes: 0 done, 1 a defect of this package, 2 something the user can mend, 130 interrupted, 143 terminated.
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
from gm_mlic.cli.environment import prepare_process
from gm_mlic.distributed import rank_info
from gm_mlic.errors import Terminated

#: What each command does, in one line.
COMMANDS = {
    "demo": "see the whole system work on drawn scenes, in minutes; nothing is downloaded",
    "train": "train a model, from images to metrics; continues where it was stopped",
    "eval": "evaluate a checkpoint on a split, or a file of scores",
    "predict": "labels of photos, and the boxes that explain them",
    "explain": "why a photo was given a label: the match matrix, and what each edge changed",
    "serve": "a page in the browser: drop a photo, edit the labels, see which instance matched which",
    "export": "a trained model as a folder to share, or as a program (torch.export, ONNX)",
    "dataset": "show what is in a dataset: images, labels, co-occurrences, what is missing",
    "extract": "run the detector once over a dataset and keep its instances",
    "train-detector": "train a detector on a dataset that has boxes",
    "plan": "estimate what a run will take: time, memory and disk",
    "runs": "list runs with their state, what they differ in, and their mAP",
    "report": "write tables and figures of runs, beside the paper's, as one page",
    "dashboard": "make a W&B workspace for runs logged with logger=wandb",
    "bench": "measure dense against sparse execution",
}

#: Where processes that this one starts find its command.
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

gm-mlic COMMAND --help tells what a command does and which settings it has.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files and labels that the terminal's encoding has not
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str]) -> int:
    """Run one command line; returns its exit code."""
    verbose = "--verbose" in argv
    argv = [argument for argument in argv if argument != "--verbose"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP.format(commands="\n".join(f"  {name:<16}{what}" for name, what in COMMANDS.items())), end="")
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"gm-mlic {__version__}")
        return 0
    if "LOCAL_RANK" in os.environ and COMMAND_VARIABLE in os.environ and argv[0] not in COMMANDS:
        # Lightning starts the other processes of a node with our settings, but does not know of commands.
        argv = [os.environ[COMMAND_VARIABLE], *argv]
    command, arguments = argv[0], argv[1:]
    os.environ[COMMAND_VARIABLE] = command
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(COMMANDS)}."
        print(f"gm-mlic: error: no command {command!r}: {hint}", file=sys.stderr)
        return 2
    # Hydra prints errors and exits by itself unless this is set; we report them, so they must reach us.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    prepare_process()
    before = _handle_sigterm()
    # Only rank 0 prints; but each process reports its own errors.
    rank = rank_info().rank
    speaker = f"gm-mlic: process {rank}" if rank else "gm-mlic"
    try:
        from gm_mlic.cli import commands

        commands.run(command, arguments, verbose=verbose)
    except Terminated as stop:
        if rank == 0:
            print("gm-mlic: terminated; the same command continues where it stopped.", file=sys.stderr)
        return int(stop.code)  # type: ignore[arg-type]
    except SystemExit as stop:  # argparse, and Hydra's --help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        if rank == 0:
            print("\ngm-mlic: interrupted; the same command continues where it stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `gm-mlic ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        from gm_mlic.cli.errors import explain

        if verbose:
            traceback.print_exc()
        line, code = explain(error, command, arguments)
        print(f"{speaker}: {line}", file=sys.stderr)
        return code
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return 0


def _handle_sigterm() -> Any:
    """Have SIGTERM unwind the stack, so that locks are freed and the run folder says what became of it.

    Returns the handler before; None where signals cannot be handled, in a thread other than the first.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, leave)
