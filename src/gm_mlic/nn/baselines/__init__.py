"""Baselines, one file each."""

from gm_mlic.nn.baselines._common import LabelStatistics

__all__ = ["LabelStatistics"]
