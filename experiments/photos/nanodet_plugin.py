"""Plugin with the detector of this study: plugins=[nanodet_plugin] detector=nanodet. See README.md.

Its module nanodet.py is in SHARED/detector, which has to be on PYTHONPATH, and so has this folder.
"""

from __future__ import annotations

from nanodet import NanoDet

from gm_mlic import register_detector
from gm_mlic.schema import Positive, Probability


@register_detector("nanodet")
def nanodet(
    score_threshold: Probability = 0.05,
    nms_threshold: Probability = 0.5,
    threads: Positive = 1,
) -> NanoDet:
    """NanoDet-m at 416 pixels, trained on MS-COCO and frozen; on the CPU.

    Args:
        score_threshold: detections below this confidence are dropped.
        nms_threshold: IoU above which non-maximum suppression drops the less confident of two boxes with the same
            label.
        threads: threads of the detector.
    """
    return NanoDet(score_threshold, nms_threshold, threads)
