"""Layers and models, as PyG building blocks."""

from gm_mlic.nn.conv import AssignmentConv, EdgeConv, Edges, MeanMessage, NodeConv, Product, Relations, States
from gm_mlic.nn.cooccurrence import CountsLabels
from gm_mlic.nn.detector_labels import DetectorLabels
from gm_mlic.nn.global_pool import GlobalPool
from gm_mlic.nn.gm_mlic import GMMLIC, Encoder, ModelOutput, pool_matches
from gm_mlic.nn.mil import MILMax
from gm_mlic.nn.ml_gcn import MLGCN
from gm_mlic.nn.mlp import MLP, ConcatLinear, Decoder
from gm_mlic.nn.query2label import Query2Label
from gm_mlic.nn.registry import (
    SHIPPED,
    create_model,
    list_models,
    model_arguments,
    pretrained_models,
    register_model,
)
from gm_mlic.nn.ssgrl import SSGRL

__all__ = [
    "GMMLIC",
    "MLGCN",
    "MLP",
    "SHIPPED",
    "SSGRL",
    "AssignmentConv",
    "ConcatLinear",
    "CountsLabels",
    "Decoder",
    "DetectorLabels",
    "EdgeConv",
    "Edges",
    "Encoder",
    "GlobalPool",
    "MILMax",
    "MeanMessage",
    "ModelOutput",
    "NodeConv",
    "Product",
    "Query2Label",
    "Relations",
    "States",
    "create_model",
    "list_models",
    "model_arguments",
    "pool_matches",
    "pretrained_models",
    "register_model",
]
