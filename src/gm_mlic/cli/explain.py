"""Command ``gm-mlic explain``: match matrix and edge influences of a predicted label."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from gm_mlic.cli.predict import load
from gm_mlic.datasets.images import read_image
from gm_mlic.reporting.explanation import explanation_picture
from gm_mlic.reporting.tables import text_table
from gm_mlic.zoo import Explanation, explain

#: Number of printed influences; the file has all.
_PRINTED = 10
_RECEIVER = {"instance": "the argmax instance", "label": "this label"}


def explain_photo(config: DictConfig) -> Path:
    """Explain one label of one photo; returns the path of the picture."""
    predictor = load(config)
    photo = read_image(config.image)
    found = explain(predictor, config.image, config.label)  # by its name: instances may be looked up
    name = re.sub(r"[^\w-]+", "-", f"{Path(config.image).stem}-{found.label}")
    picture = Path(config.run_dir) / f"{name}.png"
    explanation_picture(found, photo, picture)
    numbers = json.dumps(as_dict(found, str(config.image)), indent=1, ensure_ascii=False)
    picture.with_suffix(".json").write_text(numbers, encoding="utf-8", errors="backslashreplace")
    title = f"{found.label}: argmax instance {found.instance}, logit {found.logit:.2f}"
    parts = None
    if found.prior is not None:
        learned = found.match_logit - found.prior
        parts = f"match logit {found.match_logit:.2f} = detector {found.prior:+.2f}, learned {learned:+.2f}"
    rows = [
        (f"{i.source} {i.neighbor} to {_RECEIVER[i.target]} ({i.edge_type[1]})", f"{i.change:+.3f}")
        for i in found.influences[:_PRINTED]
    ]
    table = text_table(title, ("edge", "contribution to the logit"), rows, caption=parts, caption_justify="left")
    Console(highlight=False, markup=False).print(table)
    print(f"{picture} and {picture.with_suffix('.json').name}: match matrix and all {len(found.influences)} edges")
    return picture


def as_dict(found: Explanation, image: str) -> dict[str, object]:
    """JSON form of an explanation; match logits without an edge are None."""
    prediction = found.prediction
    return {
        "image": image,
        "label": found.label,
        "instance": found.instance,
        "logit": round(found.logit, 6),
        "match_logit": round(found.match_logit, 6),
        "prior": None if found.prior is None else round(found.prior, 6),
        "labels": list(prediction.labels),
        "boxes": prediction.boxes.round(1).tolist(),
        "detected": list(prediction.detected),
        "match_logits": [
            [round(v, 5) if math.isfinite(v) else None for v in row] for row in prediction.match_logits.tolist()
        ],
        "influences": [asdict(influence) | {"change": round(influence.change, 6)} for influence in found.influences],
    }
