"""Instance extraction to an :class:`InstanceStore`, and on-line detection."""

from __future__ import annotations

from gm_mlic.instances.augment import crop_and_flip
from gm_mlic.instances.extraction import extract
from gm_mlic.instances.manifest import Manifest
from gm_mlic.instances.online import OnlineBatch, OnlineImages
from gm_mlic.instances.store import InstanceStore

__all__ = ["InstanceStore", "Manifest", "OnlineBatch", "OnlineImages", "crop_and_flip", "extract"]
