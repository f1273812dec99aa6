"""Fingerprint of an extractor: a hash of its settings and weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn


class Fingerprint:
    """SHA-256 (hex) of settings and every tensor's name, type, shape and bytes, cached until a tensor changes."""

    def __init__(self) -> None:
        self._cache: tuple[tuple[int, ...], str] | None = None

    def __call__(self, settings: list[Any], module: nn.Module) -> str:
        """Fingerprint of ``module`` with JSON-serializable ``settings``, which must not change between calls."""
        tensors = sorted(module.state_dict().items())
        versions = tuple(tensor._version for _, tensor in tensors)
        if self._cache is None or self._cache[0] != versions:
            digest = hashlib.sha256(json.dumps(settings).encode())
            for key, tensor in tensors:
                digest.update(json.dumps([key, str(tensor.dtype), tuple(tensor.shape)]).encode())
                digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
            self._cache = versions, digest.hexdigest()
        return self._cache[1]
