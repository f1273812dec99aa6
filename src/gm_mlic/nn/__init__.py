"""Layers and models, as PyG building blocks."""

from gm_mlic.nn.baselines.cooccurrence import LabelStatistics
from gm_mlic.nn.baselines.detector_labels import DetectorLabels
from gm_mlic.nn.baselines.gap_linear import GAPLinear
from gm_mlic.nn.baselines.mil import MILMax
from gm_mlic.nn.baselines.ml_gcn import MLGCN
from gm_mlic.nn.baselines.query2label import Query2Label
from gm_mlic.nn.baselines.ssgrl import SSGRL
from gm_mlic.nn.conv import EdgeUpdate, GraphNetworkBlock, MessageMLP, NodeConv
from gm_mlic.nn.gm_mlic import GMMLIC, Encoder, LabelCache
from gm_mlic.nn.mlp import ConcatLinear, ConcatMLP, Decoder, EndsMLP, HadamardFusion
from gm_mlic.nn.output import ModelOutput, max_pool_instances
from gm_mlic.nn.registry import (
    SHIPPED,
    create_model,
    list_models,
    model_arguments,
    pretrained_models,
    register_model,
)

__all__ = [
    "GMMLIC",
    "MLGCN",
    "SHIPPED",
    "SSGRL",
    "ConcatLinear",
    "ConcatMLP",
    "Decoder",
    "DetectorLabels",
    "EdgeUpdate",
    "Encoder",
    "EndsMLP",
    "GAPLinear",
    "GraphNetworkBlock",
    "HadamardFusion",
    "LabelCache",
    "LabelStatistics",
    "MILMax",
    "MessageMLP",
    "ModelOutput",
    "NodeConv",
    "Query2Label",
    "create_model",
    "list_models",
    "max_pool_instances",
    "model_arguments",
    "pretrained_models",
    "register_model",
]
