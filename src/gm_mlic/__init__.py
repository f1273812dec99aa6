"""GM-MLIC: graph matching based multi-label image classification, as a PyTorch Geometric plugin."""

from __future__ import annotations

from gm_mlic._version import __version__

__all__ = ["__version__"]
