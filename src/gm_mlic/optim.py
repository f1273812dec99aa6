"""Optimizers and learning-rate schedules: those of torch, by name and with their own arguments."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

import torch
from annotated_types import Interval
from torch.optim import lr_scheduler

from gm_mlic.errors import ArgumentError, GMMLICError
from gm_mlic.registry import OPTIMIZERS, SCHEDULERS


def one_cycle(
    optimizer: torch.optim.Optimizer,
    steps: int,
    pct_start: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
) -> lr_scheduler.OneCycleLR:
    """One cycle over all steps: the learning rate rises, then falls to zero (torch's OneCycleLR).

    It is adjusted for short runs, where a phase of one step would divide by zero.

    Args:
        optimizer: optimizer to schedule; its learning rates are the maxima.
        steps: total number of steps.
        pct_start: fraction of the steps with a rising learning rate; at least two steps.
    """
    steps = max(steps, 4)
    pct_start = min(max(pct_start, 2 / steps), 1 - 1 / steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    momentum = bool({"momentum", "betas"} & optimizer.defaults.keys())  # cycled in the opposite direction
    return lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=pct_start, cycle_momentum=momentum)


SCHEDULERS.register("OneCycleLR")(one_cycle)
#: Not available: ReduceLROnPlateau waits for a metric of validation, other schedulers take functions or schedulers,
#: SparseAdam needs sparse gradients, and Muon matrices.
_LEFT_OUT = {
    "LRScheduler", "ReduceLROnPlateau", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler",
    "OneCycleLR", "Optimizer", "SparseAdam", "Muon",
}  # fmt: skip
for _name in sorted(set(lr_scheduler.__all__) - _LEFT_OUT):
    # T_max: the length of training, which is filled in.
    SCHEDULERS.register(_name, **({"T_max": None} if _name == "CosineAnnealingLR" else {}))(
        getattr(lr_scheduler, _name)
    )
for _name, _class in vars(torch.optim).items():
    if isinstance(_class, type) and issubclass(_class, torch.optim.Optimizer) and _name not in _LEFT_OUT:
        OPTIMIZERS.register(_name)(_class)


def build_optimizer(settings: Mapping[str, Any], groups: Iterable[Any]) -> torch.optim.Optimizer:
    """Build the optimizer of a config section, without its ``detector_lr``, for parameters or parameter groups."""
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    arguments.pop("detector_lr", None)
    with _rejections(settings["name"]):
        optimizer: torch.optim.Optimizer = OPTIMIZERS.build(str(arguments.pop("name")), **arguments, params=groups)
    return optimizer


def build_scheduler(
    settings: Mapping[str, Any], optimizer: torch.optim.Optimizer, steps: int, epochs: int
) -> dict[str, Any]:
    """Build the scheduler of a config section, as Lightning's ``lr_scheduler``, for a training of so many steps.

    OneCycleLR advances with each step, all others with the last step of each epoch: the checkpoint at the end of an
    epoch is saved before Lightning would advance them.
    """
    given = {"optimizer": optimizer, "steps": steps}
    arguments = {**settings, **{key: v for key, v in given.items() if key in SCHEDULERS.arguments(settings["name"])}}
    if arguments.get("T_max", 0) is None:
        arguments["T_max"] = epochs
    frequency = 1 if settings["name"] == "OneCycleLR" else max(1, steps // epochs)
    with _rejections(settings["name"]):
        return {"scheduler": SCHEDULERS.build(**arguments), "interval": "step", "frequency": frequency}


def check_schedule(settings: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Raise ArgumentError for settings of a scheduler that torch rejects, some of them only in the first steps.

    ``optimizer`` is not used otherwise.
    """
    with _rejections(settings["name"]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of steps without optimizer.step()
        schedule = build_scheduler(settings, optimizer, 8, 4)["scheduler"]
        for _ in range(4):
            schedule.step()


@contextlib.contextmanager
def _rejections(name: str) -> Iterator[None]:
    try:
        yield
    except GMMLICError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ArgumentError("name", f"is {name}, which rejects its settings: {str(error).rstrip('.')}.") from error
