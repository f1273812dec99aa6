"""Write MODEL_ZOO.md: which models there are, their size, and what is known of them. ``make model-zoo`` runs it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import yaml

from gm_mlic import create_model, list_models, pretrained_models
from gm_mlic.datasets.scenes import LABELS
from gm_mlic.registry import MODELS
from gm_mlic.zoo.pretrained import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
#: What data decide, as it is for scenes.
SCENES = {
    "instance_dim": 256, "label_dim": 300, "num_labels": len(LABELS), "labels": LABELS, "detector_labels": LABELS,
}  # fmt: skip

HEAD = """# Model zoo

Made by `make model-zoo` from the registry, the shipped models' own cards and the studies' tables; a test compares.

`list_models("*coco*")` lists names, `create_model(NAME, **changes)` builds one, `create_model(NAME, pretrained=True)`
loads what is marked as shipped, and `Predictor.load(NAME)` has its detector and labels too.

## Models

| name | what it is | parameters | weights |
| --- | --- | ---: | --- |
"""


def parameters(name: str) -> int:
    """Of the model with the sizes of scenes, or with its own where its name decides them."""
    of_data = name == "gm_mlic" or not name.startswith("gm_mlic")  # the others have the sizes of their datasets
    takes = MODELS.arguments(name)
    model = create_model(name, **{key: value for key, value in SCENES.items() if of_data and key in takes})
    return sum(p.numel() for p in model.parameters())


def zoo() -> str:
    """The page."""
    lines = [HEAD]
    shipped = pretrained_models()
    for name in list_models():
        what = MODELS.entry(name).summary.replace("|", "\\|")
        lines.append(f"| `{name}` | {what} | {parameters(name):,} | {'shipped' if name in shipped else '-'} |\n")
    lines.append(
        "\nParameters: with the sizes of scenes (256-d features, 300-d vectors, 22 labels), those of the paper where "
        "the name says so. Detectors are not counted. The paper's own weights were never published, and its datasets "
        "could not be downloaded where this was made: there are weights for scenes only.\n\n## Shipped weights\n\n"
    )
    for name in shipped:
        config = json.loads((SHIPPED / name / "config.json").read_text())
        card = yaml.safe_load((SHIPPED / name / "README.md").read_text().split("---\n")[1])
        (result,) = card["model-index"][0]["results"]
        metrics = ", ".join(f"{metric['type']} {metric['value']:.1f}" for metric in result["metrics"])
        size = (SHIPPED / name / "model.safetensors").stat().st_size / 1e6
        lines.append(
            f"- **`{name}`** ({size:.1f} MB, {card['license']}): {len(config['labels'])} labels, trained on "
            f"`{result['dataset']['name']}`, instances of `{config['detector']}`; its test split: {metrics}. "
            f"[Card](src/gm_mlic/zoo/models/{name}/README.md).\n"
        )
    table = ROOT / "experiments/baselines/results.md"
    if table.exists():  # the study takes hours
        lines.append(
            "\n## On scenes, on equal terms\n\nFrom [experiments/baselines](experiments/baselines), whose README has "
            f"the settings, and what is not equal.\n\n{table.read_text()}"
        )
    return "".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (ROOT / "MODEL_ZOO.md").write_text(zoo())
