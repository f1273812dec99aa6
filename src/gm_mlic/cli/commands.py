"""Hydra entry points of the commands.

Settings are checked before any command starts its work.
"""

from __future__ import annotations

import itertools
import logging
import pkgutil
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus, run_job
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from gm_mlic.cli.compose import CONFIG_MODULE, check, check_jobs, compose, prepare
from gm_mlic.cli.config_security import check_arguments
from gm_mlic.cli.environment import prepare_process
from gm_mlic.cli.help import print_help
from gm_mlic.distributed import rank_info
from gm_mlic.errors import ConfigError, config_keys
from gm_mlic.registry import import_plugins
from gm_mlic.runs import CONFIG, STATE, RunFolderError, find_runs, now, read_jobs, write_job

log = logging.getLogger(__name__)

_SCRIPT = str(Path(sys.argv[0]).absolute())

prepare_process()  # at import, not in run(): processes of a launcher only import this module


def run(command: str, arguments: list[str], verbose: bool = False) -> None:
    """Compose the config of a command from ``arguments`` and run the command."""
    if command in _FOLDERS:
        arguments = _folders_as_setting(arguments)
    one_run = not _MULTIRUN.intersection(arguments)
    arguments = [_with_quotes(argument, one_run) for argument in arguments]
    folders = check_arguments(arguments)
    if verbose:
        arguments = [*arguments, "hydra.verbose=[gm_mlic]"]
    flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
    values = [following for flag, following in itertools.pairwise(arguments) if flag in _TAKES_VALUE]
    settings = [argument for argument in arguments if not argument.startswith("-") and argument not in values]
    if flags & {"--help", "-h"}:
        print_help(command, compose(command, settings, folders))
    elif flags - _OF_ONE_RUN or _is_multirun(settings):
        prepare(command, settings)
        if flags & _SHOWS_CONFIG and not _is_multirun(settings):
            compose(command, settings, folders)  # checks it
        elif not flags - {*_OF_ONE_RUN, *_MULTIRUN}:
            check_jobs(command, settings, folders)  # before the first one starts
        _run_hydra(command, arguments, flags)
    else:
        config = compose(command, settings, folders, return_hydra_config=True, complete=command != "plan")
        _run_once(command, config)


def _run_once(command: str, config: DictConfig) -> None:
    """Run a command as Hydra would, with a config that is composed and checked."""
    context = HydraContext(config_loader=None, callbacks=Callbacks())  # type: ignore[arg-type]
    folder = Path(config.hydra.run.dir)
    is_new, begin = not folder.exists(), time.monotonic()
    job = run_job(lambda config: _perform(command, config), config, "hydra.run.dir", None, context)
    if job.status is JobStatus.FAILED:
        error: Exception = job._return_value  # type: ignore[assignment]  # the property return_value would print it
        without_result = {".lock", ".hydra", f"{command}.log"}
        if isinstance(error, ConfigError):
            without_result |= {CONFIG, STATE}
        has_begun = not is_new or time.monotonic() - begin > _SETUP_S
        if not has_begun and rank_info().rank == 0 and without_result.issuperset(p.name for p in folder.iterdir()):
            shutil.rmtree(folder)
        raise error


def _perform(command: str, config: DictConfig) -> Any:
    """Run the task of a command; errors name config keys."""
    task = _TASKS[command]
    with config_keys(**_KEYS.get(command, {})):
        return (pkgutil.resolve_name(f"gm_mlic.cli.{task}") if isinstance(task, str) else task)(config)


def _run_hydra(command: str, arguments: list[str], flags: set[str]) -> None:
    """Start Hydra for its flags and for multiruns."""
    # Hydra's parser accepts flags only before or after all settings.
    arguments = sorted(arguments, key=lambda argument: argument not in _MULTIRUN)
    if rank_info().rank and flags & _MULTIRUN:  # only rank 0 writes the folder of a multirun
        arguments = [*arguments, f"hydra.sweep.dir={tempfile.mkdtemp()}"]
    sys.argv = [f"gm-mlic {command}", *arguments]
    SweepFolder.started.clear()
    start = hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=command)
    try:
        start(lambda config: _job(command, config))()
    finally:  # also if a multirun raises the error of a failed job
        for folder, _ in SweepFolder.started:
            if read_jobs(folder):
                _show_runs([folder])
                print(f"multirun folder: {folder}")
    for folder, begin in SweepFolder.started:  # failed trials of a search do not raise
        jobs = [job for job in read_jobs(folder) if str(job.get("noted", "")) >= begin]
        failed = [job["error"] for job in jobs if job.get("error")]
        if failed:
            raise RunFolderError(f"{len(failed)} of {len(jobs)} jobs failed; the first: {failed[0]}")


class SweepFolder(Callback):
    """Hydra callback that records the folder of a multirun."""

    #: Folders and start times.
    started: ClassVar[list[tuple[Path, str]]] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if rank_info().rank == 0:
            self.started.append((Path(config.hydra.sweep.dir), now()))
            storage = str(config.hydra.sweeper.get("storage"))
            if storage.startswith("sqlite:///"):  # SQLite creates the file, but not its folder
                Path(storage.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)


def extract(config: DictConfig) -> None:
    """``gm-mlic extract``."""
    from gm_mlic.training import build

    datasets = build.build_datasets(config, config.splits)
    extractor = build.build_detector(config)
    for split, dataset in datasets.items():
        store = build.build_store(config, dataset, extractor)
        if store is None:
            log.info("%s: shard %s is finished, other shards are not", split, config.instances.shard)
        else:
            log.info("%s: %d images in %s", split, len(store.rows), store.path)


def train(config: DictConfig) -> float:
    """``gm-mlic train``; returns val mAP as the objective of sweepers."""
    from gm_mlic.reporting.tables import print_metrics
    from gm_mlic.training import run as training

    sys.argv[0] = _SCRIPT  # used by Lightning to start other processes; Hydra has already read the program name
    # Not sys.argv, which is the same for all jobs of a multirun. sweep=optuna would start another search; with other
    # sweeps the overrides select one run.
    settings = [setting for setting in HydraConfig.get().overrides.task if setting.lstrip("+") != "sweep=optuna"]
    command = shlex.join(["gm-mlic", "train", *settings])
    sweep = str(_record_job(config)) if HydraConfig.get().mode == RunMode.MULTIRUN else None
    result = training.train(config, sweep, command)
    if rank_info().rank == 0:
        print_metrics(result["test"], result["convention"], title=f"test split of {result['dataset']['name']}")
        for split, skipped in result["skipped"].items():
            if skipped:
                reasons = "; ".join(list(skipped.values())[:3]) + ("; ..." if len(skipped) > 3 else "")
                size = result["dataset"]["sizes"][split]
                log.info("left out of %s: %d of %d images (%s)", split, len(skipped), size, reasons)
        log.info("run folder: %s", config.run_dir)
    return float(result["val"]["mAP"])


def _record_job(config: DictConfig, error: Exception | None = None) -> Path:
    """Record a job of a multirun; returns the folder of the multirun."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.cwd, hydra_config.sweep.dir)
    if rank_info().rank == 0:
        write_job(folder, hydra_config.job.num, Path(config.run_dir), hydra_config.overrides.task, error)
    return folder


def evaluate(config: DictConfig) -> None:
    """``gm-mlic eval``."""
    from gm_mlic.reporting.tables import print_evaluation, print_metrics

    resampling = {"bootstrap": config.bootstrap, "seed": config.seed}
    if config.scores is not None:
        from gm_mlic.metrics import evaluate_files

        val = (config.val_scores, config.val_targets) if config.calibrate else None
        options = {key: config[key] for key in ("against", "target_format", "allow_all_present")} | {"val": val}
        print_evaluation(evaluate_files(config.scores, config.targets, **options, **resampling, out=config.run_dir))
        return
    from gm_mlic.training import run as training

    result = training.evaluate(
        config.checkpoint,
        split=config.split,
        overrides=list(config.overrides),
        out=config.run_dir,
        calibrate=config.calibrate,
        **resampling,
    )
    title = f"{config.split} split of {result['dataset']['name']}"
    if rank_info().rank == 0:
        print_metrics(result["metrics"], result["convention"], title, result)


def train_detector(config: DictConfig) -> None:
    """``gm-mlic train-detector``."""
    from gm_mlic.detection.training import train_detector as start
    from gm_mlic.device import resolve_device, resolve_num_workers
    from gm_mlic.training import build

    device = resolve_device(config.device)
    settings = {key: config[key] for key in ("epochs", "batch_size", "lr", "weight_decay", "seed")}
    record = start(
        build.build_dataset(config, "train"),
        build.build_dataset(config, "val"),
        name=config.detector.name,
        out=config.out,
        weights=config.detector.get("weights"),
        min_size=config.detector.get("min_size"),
        max_size=config.detector.get("max_size"),
        num_workers=resolve_num_workers(config.num_workers, device),
        device=device,
        command=" ".join(sys.argv),
        **settings,
    )
    log.info("val AP50 %.1f; use it with detector.weights=%s", record["val_ap50"][-1], config.out)


def _show_runs(folders: Sequence[str | Path]) -> None:
    """Print a table of runs, and their errors."""
    from rich.console import Console

    from gm_mlic.reporting.runs import runs_table

    found = find_runs(folders)
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 200  # wide lines in files
    console.print(runs_table(found))
    for run in found:
        if run.error:
            print(f"{run.path} {run.state}: {run.error}")
    paths = {run.path.resolve() for run in found}
    for job in (job for folder in folders for job in read_jobs(Path(folder))):
        if job.get("error") and Path(job["run_dir"]).resolve() not in paths:
            print(f"job {' '.join(map(str, job.get('overrides') or []))} failed: {job['error']}")


def report(config: DictConfig) -> None:
    """``gm-mlic report``."""
    from gm_mlic.reporting.report import is_complete, write_report

    folders = list(config.folders)
    runs = find_runs(folders)
    out = Path(config.out) if config.out is not None else Path(folders[0]) / "report"
    page = write_report(runs, out)
    finished = sum(is_complete(run.result) for run in runs)
    print(f"report: {page} ({finished} of {len(runs)} runs are finished)")


def _job(command: str, config: DictConfig) -> Any:
    """Run a command for Hydra. Sweepers need the errors of jobs; the other jobs continue."""
    try:
        import_plugins(list(config.get("plugins") or ()))  # in processes of a launcher
        return _perform(command, check(command, config, complete=command != "plan"))
    except Exception as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            job = HydraConfig.get().job
            log.error("job %s (%s) failed: %s", job.num, job.override_dirname, error)
            if command == "train":
                _record_job(config, error)
        raise


def _folders_as_setting(arguments: Sequence[str]) -> list[str]:
    """Convert positional folders: ``A B key=value`` to ``folders=[A,B] key=value``."""
    folders = [a for a in arguments if "=" not in a and not a.startswith("-")]
    if _SHOWS_CONFIG.intersection(arguments) or not folders:  # `--cfg job`
        return list(arguments)
    return [f"folders=[{','.join(map(_quoted, folders))}]", *(a for a in arguments if a not in folders)]


def _with_quotes(argument: str, one_run: bool) -> str:
    """Quote what Hydra would not parse, or as something else: ``image=IMG (1).jpg`` to ``image='IMG (1).jpg'``,
    ``labels=[été]`` to ``labels=['été']``, and ``overrides=[a=1,b=[2,3]]`` to ``overrides=['a=1','b=[2,3]']``.
    """
    key, _, value = argument.partition("=")
    if not value or argument.startswith("-") or (value[0] in "'\"" and value[0] == value[-1]):
        return argument
    is_list = value[0] == "[" and value[-1] == "]"
    try:
        parsed = OverridesParser.create().parse_override(argument)
        is_other = isinstance(parsed.value(), (bool, int, float)) or (one_run and parsed.is_sweep_override())
        needs_quotes = key in _NAMES and is_other and not is_list
    except HydraException:
        is_text = is_list or not re.search(r"[,{(]", value)  # neither a sweep, a mapping nor a function
        needs_quotes = key in _NAMES or (is_text and not value.isascii())  # Hydra's grammar is in ASCII
    if not needs_quotes and not (is_list and key == "overrides"):
        return argument
    return f"{key}={_with_quoted_items(value) if is_list else _quoted(value)}"


def _with_quoted_items(value: str) -> str:
    """Quote the items of ``[A,B]``, except those that are quoted."""
    items, depth, quote = [""], 0, ""
    for character in value[1:-1]:
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0 and not quote:
            items.append("")
        else:
            items[-1] += character
    quoted = (item if item[0] in "'\"" else _quoted(item) for item in map(str.strip, items) if item)
    return f"[{','.join(quoted)}]"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", r"\'") + "'"


def _is_multirun(settings: Sequence[str]) -> bool:
    """Whether the settings start a multirun without -m."""
    if any(re.match(r"\+*(sweep|hydra\.mode|hydra/sweeper)=", setting) for setting in settings):
        return True
    return any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(settings)))


#: Seconds within which errors of settings are found. A command that failed later, as in an extraction, keeps its log.
_SETUP_S = 60.0
#: Flags that do not need Hydra.
_OF_ONE_RUN = {"--config-dir", "-cd", "--run", "-r"}
#: Flags that print the config.
_SHOWS_CONFIG = {"--cfg", "-c"}
#: Flags that are followed by a value.
_TAKES_VALUE = {*_SHOWS_CONFIG, "--config-dir", "-cd", "--package", "-p"}
_MULTIRUN = {"-m", "--multirun"}

#: Settings that name files, folders or labels.
_NAMES = {"checkpoint", "embedding.path", "image", "images", "label", "labels", "run_dir", "out"}

#: Commands whose positional arguments are folders.
_FOLDERS = {"runs", "report"}

_EMBEDDING = {name: f"embedding.{name}" for name in ("name", "path", "oov", "dim")}
#: Config keys of library arguments with another name.
_KEYS: dict[str, dict[str, str]] = {
    "eval": {"resamples": "bootstrap"},
    "predict": _EMBEDDING | {"missing": "detector.missing"},
    "explain": {"missing": "detector.missing"},
    "serve": _EMBEDDING,
    "export": _EMBEDDING | {"form": "format", "repo_id": "push"},
    "train-detector": {name: f"detector.{name}" for name in ("name", "weights", "labels", "min_size", "max_size")},
    "dataset": _EMBEDDING,
}


#: Functions, or the names of those in modules of ``cli/`` that are imported when they are called.
_TASKS: dict[str, Callable[[DictConfig], Any] | str] = {
    "extract": extract,
    "train": train,
    "eval": evaluate,
    "predict": "predict:predict",
    "explain": "explain:explain_photo",
    "serve": "serve:serve",
    "export": "export:export",
    "train-detector": train_detector,
    "dataset": "dataset:describe",
    "bench": "bench:bench",
    "plan": "plan:plan",
    "runs": lambda config: _show_runs(list(config.folders)),
    "report": report,
    "dashboard": "dashboard:dashboard",
    "demo": "demo:demo",
}
