"""Composition, checks and use of all options, of conf/ and of the registries."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from gm_mlic.cli.compose import compose, options
from gm_mlic.cli.settings import COMMANDS, fields_of
from gm_mlic.config import (
    SECTIONS,
    changed_settings,
    finish,
    require_values,
    run_identity,
    section,
    settings_of_section,
    unknown,
)
from gm_mlic.datasets import Scenes
from gm_mlic.device import resolve_num_workers
from gm_mlic.errors import ConfigError, GMMLICError
from gm_mlic.graphs import RELATIONS
from gm_mlic.metrics import CONVENTIONS
from gm_mlic.nn import (
    ADDGCN,
    CMA,
    CNNRNN,
    GMMLIC,
    KDWSD,
    MLGCN,
    PLA,
    SRN,
    SSGRL,
    TDRG,
    TSGCN,
    CTran,
    DetectorLabels,
    GAPLinear,
    MILMax,
    MLDecoder,
    Query2Label,
    RNNAttention,
)
from gm_mlic.optim import build_optimizer, build_scheduler
from gm_mlic.registry import MODELS, OPTIMIZERS, SCHEDULERS, Registry
from gm_mlic.schema import REQUIRED, Setting
from gm_mlic.training import build
from gm_mlic.training.module import MLICModule
from gm_mlic.training.run import build_module
from gm_mlic.training.trainer import build_trainer, training_callbacks

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = sorted({*COMMANDS["train"].groups, *COMMANDS["bench"].groups})
#: Settings that depend on the user.
USERS = {"embedding.path", "detector.weights", "detector.path"}
#: Values of settings without a default, of options that have some.
GIVEN = {
    "StepLR": ["scheduler.step_size=5"], "MultiStepLR": ["scheduler.milestones=[3,6]"],
    "ExponentialLR": ["scheduler.gamma=0.9"], "CyclicLR": ["scheduler.base_lr=0.001", "scheduler.max_lr=0.01"],
    "CosineAnnealingWarmRestarts": ["scheduler.T_0=3"],
}  # fmt: skip
#: Settings of commands without a default.
NEEDED = {
    "predict": ["checkpoint=x", "images=x"], "explain": ["checkpoint=x", "image=x"], "serve": ["checkpoint=x"],
    "export": ["checkpoint=x", "out=x"], "eval": ["checkpoint=x"],
}  # fmt: skip
#: Classes of models by name; default: GMMLIC.
CLASSES = {
    "detector_labels": DetectorLabels,
    "mil_max": MILMax,
    "gap_linear": GAPLinear,
    "ml_gcn": MLGCN,
    "ssgrl": SSGRL,
    "query2label": Query2Label,
    "add_gcn": ADDGCN,
    "ml_decoder": MLDecoder,
    "c_tran": CTran,
    "srn": SRN,
    "tdrg": TDRG,
    "cma": CMA,
    "cnn_rnn": CNNRNN,
    "rnn_attention": RNNAttention,
    "pla": PLA,
    "kd_wsd": KDWSD,
    "tsgcn": TSGCN,
}
GRIDS = [name for name in CLASSES if name not in ("detector_labels", "mil_max")]


def command_of(group: str) -> str:
    return "train" if group in COMMANDS["train"].groups else "bench"


def is_complete(config: DictConfig) -> None:
    """Only values of the user are missing, and all interpolations resolve."""
    missing = set(OmegaConf.missing_keys(config))
    assert missing <= USERS
    OmegaConf.to_container(config, resolve=True)
    for key in missing:
        OmegaConf.update(config, key, "somewhere")
    require_values(config)


# Options


def test_the_groups_of_conf_are_groups_of_a_command():
    assert {p.name for p in CONF.iterdir() if p.is_dir()} - {"hydra", "__pycache__"} <= set(GROUPS)
    assert all(options(group) for group in GROUPS)
    assert {"gm_mlic_small", "gm_mlic", "mil_max", "ml_gcn"} <= set(options("model"))
    assert {"AdamW", "SGD", "RAdam", "adamw", "paper"} <= set(options("optimizer"))
    assert options("graph") == ["default"]


@pytest.mark.parametrize(
    ("experiment", "ablation"), list(itertools.product(options("experiment"), options("ablation")))
)
def test_every_experiment_with_every_ablation(experiment: str, ablation: str):
    config = compose("train", [f"experiment={experiment}", f"ablation={ablation}"])
    is_complete(config)
    removed = [name for name in RELATIONS if name not in config.model.edge_types]
    assert removed == ([] if ablation == "full" else [ablation.removeprefix("no_")])


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(name, marks=[] if name in ("scenes", "photos") else [pytest.mark.slow])
        for name in options("experiment")
    ],
)
def test_every_experiment_with_every_baseline(experiment: str):
    """Another model only changes the model, and for most the boxes to grid cells of the same backbone."""
    without = compose("train", [f"experiment={experiment}"])
    is_complete(without)
    for name in CLASSES:
        config = compose("train", [f"experiment={experiment}", f"model={name}"])
        is_complete(config)
        grid = name in GRIDS
        if grid:
            side = 10 if config.detector.name == "scenes_tiny" else 14
            assert (config.detector.grid_size, config.detector.max_instances) == (side, side**2)
            assert config.graph.m == side**2
        assert set(config.model) == {"name", *MODELS.settings(name)}
        changed = {change.partition("=")[0] for change in changed_settings(without, config)}
        expected = {"detector.grid_size", "detector.max_instances", "graph.m"} if grid else set()
        if without.graph.labels_per_class is not None:  # no matching edges, so no candidates
            expected |= {"graph.labels_per_class"}
        assert {key for key in changed if not key.startswith("model.")} == expected, name


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g) if command_of(g) == "train"])
def test_every_option_builds_its_objects(group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each stage accepts its section; downloads (photos, weights, vectors) are replaced."""
    vectors = tmp_path / "glove.txt"
    vectors.write_text("".join(f"{word} 1 {number}\n" for number, word in enumerate(Scenes("test", size=1).labels)))
    small = ["dataset.sizes.train=2"] if option not in {*options("dataset"), "photos"} else []
    config = compose("train", [*small, f"{group}={option}", *(GIVEN.get(option, []) if group == "scheduler" else [])])
    is_complete(config)
    if option in ("onnx", "precomputed", "transformers"):  # need files of the user
        with pytest.raises(GMMLICError, match="somewhere"):
            build.build_detector(config)
        return
    config.detector.weights = None if config.detector.name != "scenes_tiny" else config.detector.weights
    config.trainer.accelerator = "cpu"
    if config.embedding.name == "glove":
        config.embedding.path, config.embedding.oov = str(vectors), "zeros"
    if config.dataset.name != "scenes":
        config.dataset.root = str(tmp_path / "nothing")
        with pytest.raises(GMMLICError, match="nothing"):
            build.build_dataset(config, "train")
        config.dataset = compose("train", ["dataset.sizes.train=2"]).dataset
    dataset = build.build_dataset(config, "train")
    module, graph, _ = build_module(config, dataset, build.build_detector(config))
    assert graph.m == config.graph.m
    assert type(module.model) is CLASSES.get(config.model.name, GMMLIC)
    trainer = build_trainer(config, tmp_path, training_callbacks(config, tmp_path))
    assert trainer.max_epochs == config.trainer.max_epochs
    monkeypatch.setattr(MLICModule, "trainer", SimpleNamespace(estimated_stepping_batches=10, max_epochs=2))
    optimizer, schedule = module.configure_optimizers().values()
    assert type(optimizer).__name__ == config.optimizer.name
    assert type(schedule["scheduler"]).__name__ == config.scheduler.name


def test_options_of_bench():
    for option in options("bench"):
        is_complete(compose("bench", [f"bench={option}"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(command: str):
    config = compose(command, NEEDED.get(command, ()), return_hydra_config=True, complete=command != "eval")
    assert config.hydra.job.name == command
    del config.hydra
    is_complete(config)
    expected = {key for key, value in COMMANDS[command].groups.items() if key in SECTIONS}
    assert set(config) == {*fields_of(command), *expected}


@pytest.mark.parametrize("command", COMMANDS)
def test_composition_of_a_command_is_complete_without_options(command: str):
    """Settings without a default are named, one after the other."""
    given: list[str] = []
    for needed in NEEDED.get(command, []) if command != "eval" else ():
        key = needed.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"^{key} has no value: set it with {key}=VALUE\.$"):
            compose(command, given, complete=True)
        given.append(needed)
    if command != "eval":
        compose(command, given, complete=True)


# Descriptions and annotations of settings


def all_settings() -> dict[str, Setting]:
    found = {f"{command} {key}": s for command in COMMANDS for key, s in fields_of(command).items()}
    for key, kind in SECTIONS.items():
        for name in kind.names() if isinstance(kind, Registry) else [None]:
            found |= {f"{key}.{s} ({name})": setting for s, setting in settings_of_section(key, name).items()}
    return found


def test_every_setting_has_a_description_and_a_checked_annotation():
    settings = all_settings()
    assert len(settings) > 300
    torchs = {key for key in settings if key.startswith(("optimizer.", "scheduler."))}
    # torch does not annotate all arguments: these are checked when they are built.
    assert [key for key, s in settings.items() if s.expected == "a value" and key not in torchs] == []
    undescribed = [key for key, s in settings.items() if not s.text]
    assert [key for key in undescribed if key not in torchs] == []
    for key, setting in settings.items():
        assert "\n" not in setting.text, key
        assert not re.search(r":\w+:`|``", setting.text), key


def test_defaults_are_valid():
    invalid = [
        key
        for key, setting in all_settings().items()
        if setting.default != REQUIRED
        and not isinstance(setting.default, dict)
        and not setting.accepts(setting.default)
        and not key.startswith(("optimizer.", "scheduler.T_max"))
    ]
    assert invalid == []


def test_choices_equal_those_of_the_stages():
    config = compose("train")
    for convention in CONVENTIONS:
        assert compose("train", [f"metrics.convention={convention}"]).metrics.convention == convention
    assert list(config.model.edge_types) == list(RELATIONS)


def test_files_have_a_comment():
    for path in sorted(CONF.rglob("*.yaml")):
        if "hydra" not in path.parts:
            assert re.match(r"(# @package _global_\n)?# \w", path.read_text()), path


# Derived settings


def test_a_grid_has_all_cells():
    for overrides, cells in (
        (["model=ssgrl", "detector.grid_size=5"], 25),
        (["detector.grid_size=5"], 25),
        (["detector=resnet101"], 196),
        (["model=ml_gcn", "dataset=coco2014"], 196),
        (["model=ml_gcn"], 100),
    ):
        config = compose("train", overrides)
        assert (config.graph.m, config.detector.max_instances) == (cells, cells), overrides
    with pytest.raises(ConfigError, match=r"detector\.grid_size=many: expected an integer of at least 1"):
        compose("train", ["model=ssgrl", "detector.grid_size=many"])


def test_missing_settings_get_their_defaults():
    """Configs of Python programs, and of runs of older versions."""
    config = OmegaConf.create({"model": {"name": "gm_mlic", "k": 3}, "graph": {"m": 7}})
    finish(config, complete=False)
    assert config.model.widths is None
    assert (config.model.k, config.graph.m, config.graph.views) == (3, 7, 1)
    assert config == finish(config.copy())
    with pytest.raises(ConfigError, match=r"^model\.name is missing: set it"):
        finish(OmegaConf.create({"model": {"k": 3}}))
    with pytest.raises(ConfigError, match=r"^model=5: expected settings\.$"):
        finish(OmegaConf.create({"model": 5}))


def test_a_dataset_sets_its_default_detector():
    assert compose("train").detector.name == "scenes_tiny"
    assert compose("train", ["dataset=coco2014"]).detector.name == "fasterrcnn_resnet50_fpn"
    config = compose("train-detector", ["dataset=coco2014"])
    assert (config.detector.name, config.detector.weights) == ("fasterrcnn_resnet50_fpn", None)
    both = ["dataset=coco2014", "detector=mobilenet_v3_large_fpn"]
    assert compose("train", both).detector.name == "fasterrcnn_mobilenet_v3_large_fpn"


def test_one_width_is_that_of_all_blocks():
    assert compose("train", ["model.k=3"]).model.widths == 64
    model = MODELS.build("gm_mlic", k=3, widths=64, instance_dim=4, label_dim=3)
    assert model.widths == (64, 64, 64)


def test_run_dir_of_eval():
    assert compose("eval", ["checkpoint=runs/x/checkpoints/best.ckpt"]).run_dir == "runs/x/eval"
    assert compose("eval", ["scores=a/b.npz", "targets=b.npz"]).run_dir == "runs/eval-b"


def test_settings_of_the_papers_experiments():
    config = compose("train", ["experiment=coco2014"])
    assert (config.graph.m, config.model.k, config.loss.beta) == (35, 2, 0.4)
    assert (config.model.fusion, config.model.widths) == ("concat", None)
    optimizer, scheduler = config.optimizer, config.scheduler
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("SGD", 0.01, 0.9, 1e-4)
    assert (scheduler.name, scheduler.step_size, scheduler.gamma) == ("StepLR", 30, 0.1)
    assert config.instances.num_augmentations > 0


# Identity of a run


def test_run_dir_depends_on_settings_that_change_the_result():
    def run_dir(*overrides: str) -> str:
        return str(compose("train", list(overrides)).run_dir)

    plain = run_dir()
    assert plain.startswith("runs/scenes-gm_mlic-")
    for same in ("overwrite=true", "trainer.num_workers=2", "instances.num_workers=3", "instances.root=elsewhere"):
        assert run_dir(same) == plain
    others = [
        run_dir(o)
        for o in ("seed=1", "graph.m=5", "model.k=3", "ablation=no_semantic", "trainer.ema_decay=0.9", "optimizer=SGD",
                  "optimizer.amsgrad=true", "scheduler.pct_start=0.2")
    ]  # fmt: skip
    assert len({plain, *others}) == len(others) + 1


def test_identity_does_not_depend_on_how_settings_were_given():
    """A setting that is given with its default value, and one that is derived, are the same run."""
    plain = compose("train")
    for same in (
        [f"optimizer.lr={plain.optimizer.lr}"],
        ["graph.views=1", "ablation=full"],
        ["model=gm_mlic", "model.widths=64"],
    ):
        config = compose("train", same)
        assert (config.run_dir, run_identity(config)) == (plain.run_dir, run_identity(plain))
    grid = compose("train", ["model=ml_gcn"])
    assert compose("train", ["model=ml_gcn", "detector.grid_size=10", "graph.m=100"]).run_dir == grid.run_dir
    assert compose("train", ["model=ml_gcn", "detector.grid_size=9"]).run_dir != grid.run_dir


def test_jobs_of_a_multirun_use_their_own_run_dir():
    config = compose("train", ["seed=3", "model.k=1"], return_hydra_config=True)
    assert config.hydra.overrides.task == ["seed=3", "model.k=1"]
    assert Path(config.hydra.sweep.subdir) == Path(config.run_dir).absolute()
    assert config.hydra.run.dir == config.run_dir


# Checks


def test_invalid_values_fail_at_composition():
    for wrong, message in (
        ("graph.m=0", r"graph\.m=0: expected an integer of at least 1\."),
        ("graph.views=true", r"graph\.views=true: expected an integer from 1 to 6\."),
        ("overwrite=0", r"overwrite=0: expected true or false\."),
        ("dataset.sizes=7", r"dataset\.sizes=7: expected settings: train, val, test\."),
        ("model.fusion=sum", r"model\.fusion=sum: expected one of concat, product\."),
        ("trainer.devices=0", r"trainer\.devices=0: expected an integer of at least 1, or one of -1, auto, or a non-"),
        ("trainer.devices=[]", r"trainer\.devices=\[\]: expected"),
        ("trainer.precision=half", r"trainer\.precision=half: expected one of 32-true, 16-mixed, bf16-mixed\."),
        ("loss.beta=-1", r"loss\.beta=-1: expected a number of at least 0\."),
        ("optimizer.lr=0", r"optimizer\.lr=0: expected a number above 0\."),
        ("optimizer.betas=0.9", r"optimizer\.betas=0\.9: expected a list"),
        ("optimizer.name=AdanW", r"optimizer\.name=AdanW: expected one of .*; did you mean AdamW\?$"),
        ("embedding.oov=zeros", r"embedding\.oov: unknown setting\. Settings of embedding \(hashed\): dim, seed\."),
        ("instances.shard=4/4", r"instances\.shard=4/4: expected i/n with 0 <= i < n, e\.g\. 0/4, or null\."),
        ("logger.name=tensorboard", r"logger\.name=tensorboard: expected one of csv, wandb"),
    ):
        key = wrong.partition("=")[0]
        with pytest.raises(ConfigError, match=message) as error:
            compose("train", [f"++{wrong}" if key == "embedding.oov" else wrong])
        assert "\n" not in str(error.value)
    for valid in ("trainer.devices=[0,1]", "trainer.devices=auto", "optimizer.betas=[0.9,0.95]", "model.widths=[8,9]"):
        compose("train", [valid])


def test_unknown_settings_suggest_the_closest():
    assert unknown("graph.mm", ["m", "views"]) == (
        "graph.mm: unknown setting; did you mean graph.m? Settings of graph: m, views."
    )
    assert unknown("x", ["seed"]) == "x: unknown setting. Settings: seed."
    with pytest.raises(
        ConfigError, match=r"^dataset\.sizes\.trian: unknown setting; did you mean dataset\.sizes\.train"
    ):
        compose("train", ["+dataset.sizes.trian=5"])
    with pytest.raises(ConfigError, match=r"^model\.width: unknown setting; did you mean model\.widths\?"):
        compose("train", ["+model.width=5"])


def test_num_workers_have_one_rule():
    config, detector = compose("train"), compose("train-detector")
    assert [config.instances.num_workers, config.trainer.num_workers, detector.num_workers] == [None] * 3
    assert [resolve_num_workers(None, device) for device in ("cpu", "cuda:0")] == [0, 2]
    assert [resolve_num_workers(n, device) for n in (0, 3) for device in ("cpu", "cuda:0")] == [0, 0, 3, 3]
    for command, key in (
        ("train", "instances.num_workers"),
        ("train", "trainer.num_workers"),
        ("train-detector", "num_workers"),
    ):
        compose(command, [f"{key}=3"])
        with pytest.raises(ConfigError, match=f"{key}=-1: expected an integer of at least 0"):
            compose(command, [f"{key}=-1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experiment=scenes_candidates", "detector.grid_size=5"],
            r"labels_per_class=2 is incompatible with detector\.grid_size=5: a grid has no classes",
        ),
        (
            ["experiment=scenes_candidates", "instances.online=true"],
            r"graph\.labels_per_class=2 is incompatible with instances\.online=true",
        ),
        (
            ["experiment=scenes_candidates", "trainer.max_epochs=5"],
            r"instance_graph_warmup_epochs=5 with trainer\.max_epochs=5: .* never be trained",
        ),
        (
            ["experiment=scenes_candidates", "trainer.early_stopping=5"],
            r"early_stopping=5 could stop before the instance graph is trained",
        ),
        (["graph.m=40"], r"graph\.m=40 exceeds the instances per image in the store \(detector\.max_instances=15\)"),
        (["model.k=3", "model.widths=[8,8]"], r"model\.widths=\[8, 8\] has 2 widths, model\.k=3: set one width per"),
        (["trainer.compile=true", "model.gradient_checkpointing=true"], r"controls recomputation"),
        (["detector.trainable=all"], r"detector\.trainable=all excludes instances\.online=false: .* Set instances\.on"),
        (["trainer.strategy=fast"], r"trainer\.strategy=fast: expected one of auto, ddp"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_exclude_each_other(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message):
        compose("train", overrides)


def test_a_warmup_without_instance_graph():
    for without in ("model.edge_types=[semantic,matches]", "ablation=no_spatial", "model=mil_max"):
        compose("train", ["experiment=scenes_candidates", "trainer.max_epochs=5", without])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "set either checkpoint=FILE, or scores=FILE and targets=FILE."),
        (["checkpoint=a", "scores=b"], "set either checkpoint=FILE, or scores=FILE and targets=FILE."),
        (["scores=a"], "targets has no value: set it with targets=FILE"),
        (["checkpoint=a", "targets=b"], "targets=b needs scores=FILE instead of checkpoint."),
        (["checkpoint=a", "against=b"], "against=b needs scores=FILE instead of checkpoint."),
        (["scores=a", "targets=b", "calibrate=true"], "calibrate=true fits thresholds on validation images: set val_s"),
        (["scores=a", "targets=b", "val_scores=c"], "val_scores=c needs calibrate=true."),
    ],
)  # fmt: skip
def test_settings_of_eval(overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose("eval", overrides, complete=True)


# Optimizers and schedules of torch


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value: torch.Tensor = model(torch.ones(4, 3)).square().mean()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_every_optimizer_takes_steps(name: str):
    config = compose("train", [f"optimizer={name}"])
    build.check_optimizer(config)
    settings = section(config, "optimizer")
    del settings["detector_lr"]
    model = linear()
    before = model.weight.detach().clone()
    optimizer = build_optimizer(settings, model.parameters())
    assert type(optimizer) is getattr(torch.optim, name)
    for _ in range(2):
        step(model, optimizer)
    assert not torch.equal(model.weight, before)
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("name", SCHEDULERS.names())
def test_every_schedule_takes_steps_and_resumes(name: str):
    """Resumed in the middle, the learning rates are those of the whole schedule."""
    config = compose("train", ["optimizer=SGD", "optimizer.momentum=0.9", f"scheduler={name}", *GIVEN.get(name, [])])
    build.check_optimizer(config)
    settings, steps, epochs = section(config, "scheduler"), 40, 10

    def built() -> tuple[torch.nn.Linear, torch.optim.Optimizer, Any]:
        model = linear()
        optimizer = build_optimizer({"name": "SGD", "lr": 0.1, "momentum": 0.9}, model.parameters())
        return model, optimizer, build_scheduler(settings, optimizer, steps, epochs)

    model, optimizer, schedule = built()
    assert schedule["interval"] == "step"
    rates, saved = [], io.BytesIO()
    for i in range(steps):
        if i == 17:
            torch.save((optimizer.state_dict(), schedule["scheduler"].state_dict()), saved)
        rates.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer)
        if (i + 1) % schedule["frequency"] == 0:
            schedule["scheduler"].step()
    assert all(rate >= 0 for rate in rates)
    assert len(set(rates)) > 1 or name == "ConstantLR"

    model, optimizer, schedule = built()
    saved.seek(0)
    for part, state in zip((optimizer, schedule["scheduler"]), torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    again = []
    for i in range(17, steps):
        again.append(optimizer.param_groups[0]["lr"])
        step(model, optimizer)
        if (i + 1) % schedule["frequency"] == 0:
            schedule["scheduler"].step()
    assert again == rates[17:]


def test_schedules_in_epochs():
    """All but OneCycleLR advance once per epoch; the cosine ends with the training."""
    optimizer = build_optimizer({"name": "SGD", "lr": 1.0}, linear().parameters())
    settings = section(compose("train", ["scheduler=paper", "scheduler.step_size=2"]), "scheduler")
    schedule = build_scheduler(settings, optimizer, steps=40, epochs=10)
    assert (schedule["frequency"], schedule["scheduler"].step_size) == (4, 2)
    settings = section(compose("train", ["scheduler=CosineAnnealingLR"]), "scheduler")
    assert build_scheduler(settings, optimizer, steps=40, epochs=10)["scheduler"].T_max == 10
    settings = section(compose("train"), "scheduler")
    schedule = build_scheduler(settings, optimizer, steps=40, epochs=10)
    assert (schedule["frequency"], schedule["scheduler"].total_steps) == (1, 40)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.betas=[2,0.9]"], "optimizer.name is AdamW, which rejects its settings: Invalid beta parameter"),
        (["optimizer=SGD", "optimizer.nesterov=true"], "optimizer.name is SGD, which rejects its settings: Nesterov"),
        (["scheduler=paper", "scheduler.step_size=0"], "scheduler.name is StepLR, which rejects its settings: "),
        (["scheduler=LinearLR", "scheduler.start_factor=2"], "scheduler.name is LinearLR, which rejects its settings"),
    ],
)
def test_settings_that_torch_rejects_are_reported_before_the_run(overrides: list[str], message: str):
    config = compose("train", overrides, complete=True)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        build.check_optimizer(config)
    assert "\n" not in str(error.value)
