"""Web application of the prediction page."""

from __future__ import annotations

import tempfile
import threading
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gm_mlic.datasets.images import read_image
from gm_mlic.errors import ConfigError, GMMLICError, UnreadableImage
from gm_mlic.zoo import Prediction, Predictor

#: Maximum size of an uploaded photo in bytes, and maximum number of labels per request.
MAX_BYTES, MAX_LABELS = 25_000_000, 500
_PAGE = {"": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def build_app(predictor: Predictor, hosts: list[str], embedding: dict[str, Any] | None = None) -> Starlette:
    """Build the application.

    ``GET /`` returns the page, ``GET /model`` the model's name, detector and labels. ``POST
    /predict?label=NAME&label=NAME`` (default: the model's labels), with the photo as body, returns the prediction as
    JSON, see :func:`as_dict`.

    Args:
        predictor: the model.
        hosts: allowed Host headers; other requests are refused, which prevents DNS rebinding.
        embedding: overrides of the embedding settings for additional labels.
    """
    served = _Served(predictor, embedding or {})
    routes = [Route(f"/{name}", _file) for name in _PAGE]
    routes += [Route("/model", served.model), Route("/predict", served.predict, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


def as_dict(prediction: Prediction) -> dict[str, Any]:
    """Convert a prediction to JSON: labels by descending probability, match probabilities (M, C) in the same order.

    A match probability is None if there is no edge between instance and label.
    """
    order = np.argsort(-prediction.probabilities, kind="stable")
    logits = prediction.match_logits[:, order].astype(np.float64)
    probabilities = (1 / (1 + np.exp(-logits))).round(4)
    rows = zip(probabilities.tolist(), np.isfinite(logits).tolist(), strict=True)
    return {
        "width": prediction.size[0],
        "height": prediction.size[1],
        "labels": [prediction.labels[c] for c in order],
        "probabilities": prediction.probabilities[order].astype(float).round(4).tolist(),
        "argmax_instance": prediction.match_logits.argmax(axis=0)[order].tolist(),
        "match_probabilities": [[p if edge else None for p, edge in zip(*row, strict=True)] for row in rows],
        "boxes": prediction.boxes.astype(float).round(1).tolist(),
        "scores": prediction.scores.astype(float).round(4).tolist(),
        "detected": list(prediction.detected),
    }


class _Served:
    def __init__(self, predictor: Predictor, embedding: dict[str, Any]) -> None:
        self.predictor, self.embedding = predictor, embedding
        self._lock = threading.Lock()  # one photo at a time: parallel requests would slow each other down
        self._last: tuple[tuple[str, ...], Predictor] | None = None

    async def model(self, request: Request) -> Response:
        metadata = self.predictor.metadata
        return _json({"model": metadata.model["name"], "detector": metadata.detector, "labels": list(metadata.labels)})

    async def predict(self, request: Request) -> Response:
        content = bytearray()
        async for chunk in request.stream():
            content += chunk
            if len(content) > MAX_BYTES:
                return _json({"error": f"The photo is larger than {MAX_BYTES // 1_000_000} MB: scale it down."}, 413)
        names = [name.strip() for name in request.query_params.getlist("label") if name.strip()]
        try:
            return _json(as_dict(await run_in_threadpool(self._predict, bytes(content), names)))
        except GMMLICError as error:
            return _json({"error": str(error)}, 400)

    def _predict(self, content: bytes, names: list[str]) -> Prediction:
        if len(names) > MAX_LABELS:
            raise ConfigError(f"{len(names)} labels are too many: use at most {MAX_LABELS}.")
        with self._lock, tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "photo"
            file.write_bytes(content)
            try:
                photo = read_image(file)
            except UnreadableImage as error:
                raise UnreadableImage(str(error).replace(f"Image {file}", "The photo")) from error
            (prediction,) = self._for(tuple(names))([photo])
        return prediction

    def _for(self, names: tuple[str, ...]) -> Predictor:
        if not names or names == self.predictor.metadata.labels:
            return self.predictor
        if self._last is None or self._last[0] != names:
            self._last = names, self.predictor.with_labels(names, **self.embedding)
        return self._last[1]


async def _file(request: Request) -> Response:
    name = request.url.path.removeprefix("/")
    content = (resources.files("gm_mlic.serving") / (name or "page.html")).read_bytes()
    return Response(content, media_type=_PAGE[name], headers=_HEADERS)


def _json(content: dict[str, Any], status: int = 200) -> Response:
    return JSONResponse(content, status, headers=_HEADERS)
