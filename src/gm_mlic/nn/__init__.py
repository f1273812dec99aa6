"""Layers and models, as PyG building blocks."""

from gm_mlic.nn.conv import AssignmentConv, EdgeConv, Edges, MeanMessage, NodeConv, Product, Relations, States
from gm_mlic.nn.gm_mlic import GMMLIC, Encoder, ModelOutput, pool_matches
from gm_mlic.nn.mil import MILMax
from gm_mlic.nn.mlp import MLP, ConcatLinear, Decoder
from gm_mlic.nn.registry import SHIPPED, create_model, list_models, pretrained_models, register_model

__all__ = [
    "GMMLIC",
    "MLP",
    "SHIPPED",
    "AssignmentConv",
    "ConcatLinear",
    "Decoder",
    "EdgeConv",
    "Edges",
    "Encoder",
    "MILMax",
    "MeanMessage",
    "ModelOutput",
    "NodeConv",
    "Product",
    "Relations",
    "States",
    "create_model",
    "list_models",
    "pool_matches",
    "pretrained_models",
    "register_model",
]
