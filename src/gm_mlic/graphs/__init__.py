"""Assignment graphs: instances and labels as one ``HeteroData``, or a dense batch of them."""

from gm_mlic.graphs.assignment import AssignmentGraph, knn_edge_index, label_edge_index, label_neighbors
from gm_mlic.graphs.batch import AssignmentBatch, drop_edges
from gm_mlic.graphs.classes import candidate_edges, label_candidates
from gm_mlic.graphs.dataset import AssignmentBatchDataset, AssignmentGraphDataset, collate_instances, to_hetero_data
from gm_mlic.graphs.dense import Bipartite, DenseEdges, EdgeTensor, NeighborLists
from gm_mlic.graphs.schema import EDGE_TYPES, INSTANCE, LABEL, MATCHES, RELATIONS, SEMANTIC, SPATIAL, EdgeSpec

__all__ = [
    "EDGE_TYPES",
    "INSTANCE",
    "LABEL",
    "MATCHES",
    "RELATIONS",
    "SEMANTIC",
    "SPATIAL",
    "AssignmentBatch",
    "AssignmentBatchDataset",
    "AssignmentGraph",
    "AssignmentGraphDataset",
    "Bipartite",
    "DenseEdges",
    "EdgeSpec",
    "EdgeTensor",
    "NeighborLists",
    "candidate_edges",
    "collate_instances",
    "drop_edges",
    "knn_edge_index",
    "label_candidates",
    "label_edge_index",
    "label_neighbors",
    "to_hetero_data",
]
