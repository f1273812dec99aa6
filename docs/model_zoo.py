"""Write MODEL_ZOO.md: a table of models, their sizes and results. ``make model-zoo`` runs it."""

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
#: Arguments that depend on the data, for scenes.
SCENES = {
    "instance_dim": 256, "label_dim": 300, "num_labels": len(LABELS), "labels": LABELS, "detector_labels": LABELS,
}  # fmt: skip

HEAD = """# Model zoo

`make model-zoo` generates this page from the registry, the cards of shipped models and the tables of the studies.

- `list_models("gm_*")` lists names.
- `create_model(NAME, **overrides)` builds a model.
- `create_model(NAME, pretrained=True)` loads shipped weights.
- `Predictor.load(NAME)` also loads the detector and the labels.

## Models

| name | description | parameters | weights |
| --- | --- | ---: | --- |
"""


def parameters(name: str) -> int:
    """Number of parameters, with the sizes of scenes unless the name defines others."""
    of_data = name == "gm_mlic" or not name.startswith("gm_mlic")  # the others define their sizes
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
        "\nParameters are counted with the sizes of scenes (256-d features, 300-d vectors, 22 labels), or with the "
        "paper's for `gm_mlic_paper`. Detectors are not counted. Weights are available for scenes only: the authors "
        "published none, and the datasets could not be downloaded on the development machine.\n\n"
        "## Shipped weights\n\n"
    )
    for name in shipped:
        config = json.loads((SHIPPED / name / "config.json").read_text())
        card = yaml.safe_load((SHIPPED / name / "README.md").read_text().split("---\n")[1])
        (result,) = card["model-index"][0]["results"]
        metrics = ", ".join(f"{metric['type']} {metric['value']:.1f}" for metric in result["metrics"])
        size = (SHIPPED / name / "model.safetensors").stat().st_size / 1e6
        lines.append(
            f"- **`{name}`** ({size:.1f} MB, {card['license']}): {len(config['labels'])} labels, trained on "
            f"`{result['dataset']['name']}` with the detector `{config['detector']}`; test split: {metrics}. "
            f"[Card](src/gm_mlic/zoo/models/{name}/README.md).\n"
        )
    for data, images in (("scenes", "scenes"), ("animals", "photos with animals")):
        table = ROOT / f"experiments/baselines/{data}.md"
        if table.exists():  # the study takes hours
            lines.append(
                f"\n## Comparison on {images}\n\nSee [experiments/baselines](experiments/baselines) for settings, "
                f"columns and limitations.\n\n{table.read_text()}"
            )
    return "".join(lines)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    (ROOT / "MODEL_ZOO.md").write_text(zoo())
