"""Trained models: what they say of themselves, how they are read, and what they say of images."""

from gm_mlic.zoo.explain import ExplainedModel, Explanation, Influence, explain
from gm_mlic.zoo.metadata import Description, load_weights, read_checkpoint
from gm_mlic.zoo.predictor import LabelFound, Prediction, Predictor
from gm_mlic.zoo.pretrained import Card, push

__all__ = [
    "Card",
    "Description",
    "ExplainedModel",
    "Explanation",
    "Influence",
    "LabelFound",
    "Prediction",
    "Predictor",
    "explain",
    "load_weights",
    "push",
    "read_checkpoint",
]
