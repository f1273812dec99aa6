"""Composition, validation and use of all files in conf/."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from gm_mlic.bench import CASES, EXECUTIONS
from gm_mlic.cli import validation
from gm_mlic.cli.compose import compose
from gm_mlic.datasets import Scenes
from gm_mlic.device import resolve_num_workers
from gm_mlic.errors import ConfigError, GMMLICError
from gm_mlic.graphs import RELATIONS
from gm_mlic.losses import DIFFICULT_POLICIES
from gm_mlic.metrics import CONVENTIONS
from gm_mlic.nn import GMMLIC, MLGCN, SSGRL, DetectorLabels, GAPLinear, MILMax, Query2Label
from gm_mlic.nn.gm_mlic import FUSIONS, NORMS
from gm_mlic.nn.output import POOLINGS
from gm_mlic.training import build
from gm_mlic.training.module import MLICModule
from gm_mlic.training.run import build_module
from gm_mlic.training.trainer import build_trainer, training_callbacks
from gm_mlic.validation import _WITHOUT_EDGES, changed_settings

CONF = Path(__file__).resolve().parents[1] / "conf"
GROUPS = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "__pycache__"))
MAY_BE_MISSING = {"embedding.path"}
#: Commands of groups that are not in train.
COMMANDS = {"bench": "bench"}
#: Mandatory settings of commands.
REQUIRED = {
    "predict": ["checkpoint=x", "images=x"], "explain": ["checkpoint=x", "image=x"], "serve": ["checkpoint=x"],
    "export": ["checkpoint=x", "out=x"], "eval": ["checkpoint=x"],
}  # fmt: skip
#: Settings that an option requires.
WITH = {"detector=resnet101": ["graph.m=196"]}
#: Classes of models by name; default: GMMLIC.
MODELS = {
    "detector_labels": DetectorLabels,
    "mil_max": MILMax,
    "gap_linear": GAPLinear,
    "ml_gcn": MLGCN,
    "ssgrl": SSGRL,
    "query2label": Query2Label,
}


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def chosen(group: str, option: str) -> list[str]:
    return [f"{group}={option}", *WITH.get(f"{group}={option}", [])]


def leaves(config: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            found += leaves(node, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}")
    return found


def check_complete(config: DictConfig) -> None:
    """Check that only user-specific values are missing and all interpolations resolve."""
    missing = set(OmegaConf.missing_keys(config))
    assert missing <= MAY_BE_MISSING
    OmegaConf.to_container(config, resolve=True)
    for key in missing:
        OmegaConf.update(config, key, "somewhere")
    validation.check(config)


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g)])
def test_every_option_of_every_group(group: str, option: str):
    check_complete(compose(COMMANDS.get(group, "train"), chosen(group, option)))


@pytest.mark.parametrize(
    ("experiment", "ablation"), list(itertools.product(options("experiment"), options("ablation")))
)
def test_every_experiment_with_every_ablation(experiment: str, ablation: str):
    config = compose("train", [f"experiment={experiment}", f"ablation={ablation}"])
    check_complete(config)
    removed = [name for name in RELATIONS if name not in config.model.edge_types]
    assert removed == ([] if ablation == "full" else [ablation.removeprefix("no_")])


@pytest.mark.parametrize(
    ("experiment", "baseline"), list(itertools.product(options("experiment"), options("baseline")))
)
def test_every_experiment_with_every_baseline(experiment: str, baseline: str):
    """A baseline only changes the model, and for most baselines the boxes to grid cells of the same backbone."""
    without = compose("train", [f"experiment={experiment}"])
    config = compose("train", [f"experiment={experiment}", f"baseline={baseline}"])
    check_complete(without)
    check_complete(config)
    on_boxes = baseline in ("detector_labels", "mil_max")
    if not on_boxes:
        side = 10 if config.detector.name == "scenes_tiny" else 14
        assert (config.detector.grid_size, config.detector.max_instances, config.graph.m) == (side, side**2, side**2)
    assert config.model == OmegaConf.load(CONF / "model" / f"{baseline}.yaml")
    changed = {change.partition("=")[0] for change in changed_settings(without, config)}
    expected = set() if on_boxes else {"detector.grid_size", "detector.max_instances", "graph.m"}
    if without.graph.labels_per_class is not None:  # baselines use no candidates
        expected |= {"graph.labels_per_class"}
    assert {key for key in changed if not key.startswith("model.")} == expected


def test_candidates_need_classes_and_a_store():
    for override, message in (
        (
            "detector.grid_size=5",
            r"labels_per_class=2 is incompatible with detector\.grid_size=5: a grid has no classes",
        ),
        ("instances.online=true", r"graph\.labels_per_class=2 is incompatible with instances\.online=true"),
        (
            "model=detector_labels",
            r"labels_per_class=2 is incompatible with model\.name=detector_labels: it has no matching edges",
        ),
    ):
        grid = ["detector.max_instances=25", "graph.m=25"] if "grid" in override else []
        with pytest.raises(ConfigError, match=message):
            validation.check(compose("train", ["experiment=scenes_candidates", override, *grid]))


def test_baselines_take_no_candidates():
    """Baselines without matching edges reject candidates; mil_max does not use them."""
    assert set(_WITHOUT_EDGES) == set(options("baseline")) - {"mil_max"}


def test_the_instance_graph_must_be_trained():
    with pytest.raises(
        ConfigError, match=r"instance_graph_warmup_epochs=5 with trainer\.max_epochs=5: .* never be trained"
    ):
        validation.check(compose("train", ["experiment=scenes_candidates", "trainer.max_epochs=5"]))
    for without in ("model.edge_types=[semantic,matches]", "ablation=no_spatial", "baseline=mil_max"):
        validation.check(compose("train", ["experiment=scenes_candidates", "trainer.max_epochs=5", without]))
    with pytest.raises(ConfigError, match=r"early_stopping=5 could stop before the instance graph is trained"):
        validation.check(compose("train", ["experiment=scenes_candidates", "trainer.early_stopping=5"]))


def test_overrides_of_the_grid_size():
    config = compose("train", ["baseline=ssgrl", "detector.grid_size=5"])
    validation.check(config)
    assert (config.graph.m, config.detector.max_instances) == (25, 25)
    validation.check(compose("train", ["detector.grid_size=5", "graph.m=25", "detector.max_instances=25"]))
    for overrides, message in (
        (["detector.grid_size=5"], r"detector\.max_instances=15: detector\.grid_size=5 gives 25 instances"),
        (["detector.grid_size=5", "detector.max_instances=25"], r"graph\.m=10: .* set graph\.m=25"),
        (["detector=resnet101"], r"graph\.m=10: detector\.grid_size=14 gives 196 instances"),
    ):
        with pytest.raises(ConfigError, match=message):
            validation.check(compose("train", overrides))
    with pytest.raises(ConfigError, match=r"detector\.grid_size=many: expected an integer of at least 1"):
        compose("train", ["baseline=ssgrl", "detector.grid_size=many"])


@pytest.mark.parametrize(
    "command",
    ["train", "extract", "train_detector", "dataset", "runs", "report", "dashboard", "bench", "demo", "plan", "predict",
     "explain", "serve", "export", "eval"],
)  # fmt: skip
def test_every_command(command: str):
    config = compose(command, return_hydra_config=True)
    assert config.hydra.help.app_name == f"gm-mlic {command.replace('_', '-')}"
    check_complete(compose(command, REQUIRED.get(command, ())))


def test_every_command_is_tested():
    commands = {path.stem for path in CONF.glob("*.yaml")}
    assert commands == set(next(mark.args[1] for mark in test_every_command.pytestmark))


def test_run_dir_of_eval():
    config = compose("eval", ["checkpoint=runs/x/checkpoints/best.ckpt"])
    assert config.run_dir == "runs/x/eval"


def test_a_dataset_sets_its_default_detector():
    assert compose("train").detector.name == "scenes_tiny"
    assert compose("train", ["dataset=coco2014"]).detector.name == "fasterrcnn_resnet50_fpn"
    assert compose("train_detector", ["dataset=coco2014"]).detector.name == "fasterrcnn_resnet50_fpn"
    both = ["dataset=coco2014", "detector=mobilenet_v3_large_fpn"]
    assert compose("train", both).detector.name == "fasterrcnn_mobilenet_v3_large_fpn"


def test_widths_follow_the_number_of_blocks():
    assert compose("train", ["model.k=3"]).model.widths == [64, 64, 64]
    assert compose("demo").rows.concat.widths == [64, 64]


def test_settings_of_the_papers_experiments():
    config = compose("train", ["experiment=coco2014"])
    assert (config.graph.m, config.model.k, config.loss.beta) == (35, 2, 0.4)
    assert (config.model.fusion, config.model.widths) == ("concat", None)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("sgd", 0.01, 0.9, 1e-4)
    assert (optimizer.lr_scheduler, optimizer.step_size, optimizer.gamma) == ("step", 30, 0.1)
    assert config.instances.num_augmentations > 0


def test_run_dir_depends_on_settings_that_change_the_result():
    def run_dir(*overrides: str) -> str:
        return str(compose("train", list(overrides)).run_dir)

    plain = run_dir()
    assert plain.startswith("runs/scenes-gm_mlic-")
    for same in ("overwrite=true", "trainer.num_workers=2", "instances.num_workers=3", "instances.root=elsewhere"):
        assert run_dir(same) == plain
    others = [run_dir(o) for o in ("seed=1", "graph.m=5", "model.k=3", "ablation=no_semantic", "trainer.ema_decay=0.9")]
    assert len({plain, *others}) == 6


def test_jobs_of_a_multirun_use_their_own_run_dir():
    config = compose("train", ["seed=3"], return_hydra_config=True)
    assert Path(config.hydra.sweep.subdir) == Path(config.run_dir).absolute()
    assert config.hydra.run.dir == config.run_dir


def test_every_file_starts_with_a_comment():
    for path in sorted(CONF.rglob("*.yaml")):
        if "hydra" in path.parts or path.parent.name in ("experiment", "ablation"):
            continue
        assert path.read_text().startswith("#"), path


def keys_and_comments(path: Path) -> dict[str, bool]:
    """The keys of a file, each with True if a comment is above it, beside it or above a key that contains it."""
    found: dict[str, bool] = {}
    parents: list[tuple[int, str, bool]] = []
    above = False
    for line in path.read_text().splitlines():
        match = re.match(r"( *)(\w+):", line)
        if match:
            indent = len(match[1])
            parents = [parent for parent in parents if parent[0] < indent]
            key = ".".join([*(name for _, name, _ in parents), match[2]])
            found[key] = above or " #" in line or any(commented for *_, commented in parents)
            parents.append((indent, match[2], found[key]))
        above = line.lstrip().startswith("#")
    return found


@pytest.mark.parametrize(
    "path", [p for p in sorted(CONF.rglob("*.yaml")) if "hydra" not in p.parts], ids=lambda p: str(p.relative_to(CONF))
)
def test_every_key_has_a_comment(path: Path):
    """A setting is described where it is defined: not in overrides, and not in options that inherit it."""
    if path.read_text().startswith("# @package _global_"):
        return
    content = OmegaConf.load(path)
    inherited: set[str] = set()
    for base in content.get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            inherited.update(keys_and_comments(path.parent / f"{base}.yaml"))
    exempt = {"defaults", "hydra", *([] if path.parent == CONF else ["name"])}  # the header describes `name`
    settings = {key for key in leaves(content) if key.partition(".")[0] not in exempt}
    assert [
        key
        for key, comment in keys_and_comments(path).items()
        if key in settings and key not in inherited and not comment
    ] == []


def test_every_setting_has_a_rule():
    """All settings have a rule, except those that are checked by a stage."""
    keys: set[str] = set()
    for group in GROUPS:
        for option in options(group):
            keys.update(leaves(compose(COMMANDS.get(group, "train"), [f"{group}={option}"])))
    keys.update(
        leaves(compose("extract")),
        leaves(compose("train_detector")),
        leaves(compose("dataset")),
        leaves(compose("bench")),
        leaves(compose("plan")),
    )
    # The files of eval have no rules of their own.
    keys.update({"calibrate", "bootstrap", "target_format", "allow_all_present"} & set(leaves(compose("eval"))))
    keys.update({"images", "labels", "top", "threshold", "pictures"} & set(leaves(compose("predict"))))
    keys.update({"image", "label"} & set(leaves(compose("explain"))))
    keys.update({"host", "port"} & set(leaves(compose("serve"))))
    keys.update(set(leaves(compose("export"))) - {"checkpoint", "embedding.path"})
    assert keys <= set(validation.RULES)
    assert set(validation.RULES) <= keys


def test_num_workers_have_one_rule():
    config, detector = compose("train"), compose("train_detector")
    assert [config.instances.num_workers, config.trainer.num_workers, detector.num_workers] == [None] * 3
    assert [resolve_num_workers(None, device) for device in ("cpu", "cuda:0")] == [0, 2]
    assert [resolve_num_workers(n, device) for n in (0, 3) for device in ("cpu", "cuda:0")] == [0, 0, 3, 3]
    for command, key in (
        ("train", "instances.num_workers"),
        ("train", "trainer.num_workers"),
        ("train_detector", "num_workers"),
    ):
        validation.check(compose(command, [f"{key}=3"]))
        with pytest.raises(ConfigError, match=f"{key}=-1: expected an integer of at least 0"):
            compose(command, [f"{key}=-1"])


def test_invalid_values_fail_at_composition():
    with pytest.raises(ConfigError, match=r"graph\.m=0: expected an integer of at least 1\."):
        compose("train", ["graph.m=0"])
    with pytest.raises(ConfigError, match=r"model\.fusion=sum: expected one of concat, product\."):
        compose("train", ["experiment=coco2014", "model.fusion=sum"])
    for valid in ("trainer.devices=[0,1]", "trainer.devices=auto", "trainer.devices=2", "trainer.precision=bf16-mixed"):
        compose("train", [valid])
    for invalid in ("trainer.devices=0", "trainer.devices=[]", "trainer.devices=many", "trainer.precision=half"):
        with pytest.raises(ConfigError, match="expected"):
            compose("train", [invalid])


def test_choices_equal_those_of_the_stages():
    """The rules repeat the choices, since importing the stages imports torch."""
    for key, choices in {
        "model.fusion": FUSIONS,
        "model.norm": NORMS,
        "model.pooling": POOLINGS,
        "bench.norm": NORMS,
        "metrics.convention": CONVENTIONS,
        "loss.difficult": DIFFICULT_POLICIES,
    }.items():
        assert validation.RULES[key][1] == f"one of {', '.join(choices)}"
    for key, choices in {
        "model.edge_types": RELATIONS,
        "bench.executions": EXECUTIONS,
        "bench.cases": CASES,
        "bench.fusions": FUSIONS,
    }.items():
        assert validation.RULES[key][1] == validation.some_of(*choices)[1]


@pytest.mark.parametrize(("group", "option"), [(g, o) for g in GROUPS for o in options(g) if g not in COMMANDS])
def test_every_option_builds_its_objects(group: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each stage accepts its section; downloads (photos, weights, vectors) are replaced."""
    vectors = tmp_path / "glove.txt"
    vectors.write_text("".join(f"{word} 1 {number}\n" for number, word in enumerate(Scenes("test", size=1).labels)))
    small = ["dataset.sizes.train=2"] if option not in {*options("dataset"), "photos"} else []
    config = compose("train", [*small, *chosen(group, option)])
    config.detector.weights = None if config.detector.name != "scenes_tiny" else config.detector.weights
    config.trainer.accelerator = "cpu"
    if config.embedding.name == "glove":
        config.embedding.path, config.embedding.oov = str(vectors), "zeros"
    if config.dataset.name != "scenes":
        config.dataset.root = str(tmp_path / "nothing")
        config.dataset.merge_with({"annotations": "labels.csv"} if config.dataset.name == "custom" else {})
        with pytest.raises(GMMLICError, match="nothing"):
            build.build_dataset(config, "train")
        config.dataset = compose("train", ["dataset.sizes.train=2"]).dataset
    dataset = build.build_dataset(config, "train")
    module, graph, _ = build_module(config, dataset, build.build_detector(config))
    assert graph.m == config.graph.m
    assert type(module.model) is MODELS.get(config.model.name, GMMLIC)
    trainer = build_trainer(config, tmp_path, training_callbacks(config, tmp_path))
    assert trainer.max_epochs == config.trainer.max_epochs
    length = SimpleNamespace(estimated_stepping_batches=10, max_epochs=2)
    monkeypatch.setattr(MLICModule, "trainer", length)
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[config.optimizer.name]
    assert type(module.configure_optimizers()["optimizer"]) is kind
