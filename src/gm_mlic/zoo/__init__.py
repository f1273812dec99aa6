"""Trained models: metadata, loading, prediction, explanation and sharing."""

from gm_mlic.zoo.explain import ExplainedModel, Explanation, Influence, explain
from gm_mlic.zoo.metadata import ModelMetadata, load_weights, read_checkpoint
from gm_mlic.zoo.predictor import LabelPrediction, Prediction, Predictor
from gm_mlic.zoo.pretrained import SHIPPED, ModelCard, create_model, pretrained_models, push

__all__ = [
    "SHIPPED",
    "ExplainedModel",
    "Explanation",
    "Influence",
    "LabelPrediction",
    "ModelCard",
    "ModelMetadata",
    "Prediction",
    "Predictor",
    "create_model",
    "explain",
    "load_weights",
    "pretrained_models",
    "push",
    "read_checkpoint",
]
