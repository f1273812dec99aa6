"""Assignment graphs: instances and labels as one ``HeteroData``."""

from gm_mlic.graphs.assignment import AssignmentGraph, label_relations, nearest_neighbours
from gm_mlic.graphs.batch import AssignmentBatch, without_near
from gm_mlic.graphs.candidates import candidate_matches, label_candidates
from gm_mlic.graphs.dataset import AssignmentBatchDataset, AssignmentGraphDataset, dense_batch, instance_data
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, NEAR, RELATES

__all__ = [
    "INSTANCE",
    "LABEL",
    "MATCHES",
    "NEAR",
    "RELATES",
    "AssignmentBatch",
    "AssignmentBatchDataset",
    "AssignmentGraph",
    "AssignmentGraphDataset",
    "candidate_matches",
    "dense_batch",
    "instance_data",
    "label_candidates",
    "label_relations",
    "nearest_neighbours",
    "without_near",
]
