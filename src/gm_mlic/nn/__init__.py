"""Layers and models, as PyG building blocks."""

from gm_mlic.nn.baselines.add_gcn import ADDGCN
from gm_mlic.nn.baselines.c_tran import CTran
from gm_mlic.nn.baselines.cma import CMA
from gm_mlic.nn.baselines.cnn_rnn import CNNRNN
from gm_mlic.nn.baselines.detector_labels import DetectorLabels
from gm_mlic.nn.baselines.gap_linear import GAPLinear
from gm_mlic.nn.baselines.kd_wsd import KDWSD
from gm_mlic.nn.baselines.mil import MILMax
from gm_mlic.nn.baselines.ml_decoder import MLDecoder
from gm_mlic.nn.baselines.ml_gcn import MLGCN
from gm_mlic.nn.baselines.pla import PLA
from gm_mlic.nn.baselines.query2label import Query2Label
from gm_mlic.nn.baselines.rnn_attention import RNNAttention
from gm_mlic.nn.baselines.srn import SRN
from gm_mlic.nn.baselines.ssgrl import SSGRL
from gm_mlic.nn.baselines.tdrg import TDRG
from gm_mlic.nn.baselines.tsgcn import TSGCN
from gm_mlic.nn.conv import EdgeUpdate, GraphNetworkBlock, MessageMLP, NodeConv
from gm_mlic.nn.gm_mlic import GMMLIC, Encoder, LabelCache
from gm_mlic.nn.mlp import ConcatMLP, Decoder, HadamardFusion
from gm_mlic.nn.output import ModelOutput, pool_instances
from gm_mlic.nn.prior import DetectorPrior, FeatureStatistics, LinearMatch, MatchHead, Penalized, Standardize

__all__ = [
    "ADDGCN",
    "CMA",
    "CNNRNN",
    "GMMLIC",
    "KDWSD",
    "MLGCN",
    "PLA",
    "SRN",
    "SSGRL",
    "TDRG",
    "TSGCN",
    "CTran",
    "ConcatMLP",
    "Decoder",
    "DetectorLabels",
    "DetectorPrior",
    "EdgeUpdate",
    "Encoder",
    "FeatureStatistics",
    "GAPLinear",
    "GraphNetworkBlock",
    "HadamardFusion",
    "LabelCache",
    "LinearMatch",
    "MILMax",
    "MLDecoder",
    "MatchHead",
    "MessageMLP",
    "ModelOutput",
    "NodeConv",
    "Penalized",
    "Query2Label",
    "RNNAttention",
    "Standardize",
    "pool_instances",
]
