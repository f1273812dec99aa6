from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.explain import Explainer, GNNExplainer

from gm_mlic import Predictor
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import LABEL, MATCHES, NEAR, RELATES
from gm_mlic.zoo import ExplainedModel, explain

ENDS = {
    "instance_to_instance": NEAR,
    "label_to_label": RELATES,
    "instance_to_label": MATCHES,
    "label_to_instance": MATCHES,
}


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "gm/checkpoints/best.ckpt")


def test_each_edge_by_hand(predictor: Predictor, photos: list[Path]):
    """Every influence, against the graph without that edge and nothing else."""
    names = predictor.metadata.labels
    label = names[4]
    found = explain(predictor, photos[0], label)
    data = predictor.assignment_graph(photos[0])
    model = predictor.model
    M, C = data["instance"].num_nodes, len(names)
    with torch.no_grad():
        whole = model(data)
        assert found.logit == pytest.approx(float(whole.logits[0, 4]), abs=1e-4)
        assert found.instance == int(whole.winners[0, 4])
        kinds = [influence.kind for influence in found.influences]
        near = int((data[NEAR].edge_index[1] == found.instance).sum())
        counts = {kind: kinds.count(kind) for kind in ENDS}
        assert counts == {
            "instance_to_instance": near,
            "label_to_label": C - 1,
            "instance_to_label": M - 1,
            "label_to_instance": C - 1,
        }
        for influence in found.influences:
            ends = {
                "instance_to_instance": (influence.neighbour, found.instance),
                "label_to_label": (influence.neighbour, 4),
                "instance_to_label": (influence.neighbour, 4),
                "label_to_instance": (found.instance, influence.neighbour),
            }[influence.kind]
            source, target = (names.index(end) if isinstance(end, str) else end for end in ends)
            graph = predictor.assignment_graph(photos[0])
            index = graph[ENDS[influence.kind]].edge_index
            keep = ~((index[0] == source) & (index[1] == target))
            assert int((~keep).sum()) == 1
            graph[ENDS[influence.kind]].edge_index = index[:, keep]
            if "edge_attr" in graph[ENDS[influence.kind]]:
                graph[ENDS[influence.kind]].edge_attr = graph[ENDS[influence.kind]].edge_attr[keep]
            change = float(whole.logits[0, 4] - model(graph).logits[0, 4])
            assert influence.change == pytest.approx(change, abs=1e-4)
    sizes = [abs(influence.change) for influence in found.influences]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1e-4


def test_the_most_probable_label_is_the_default(predictor: Predictor, photos: list[Path]):
    found = explain(predictor, photos[1])
    assert found.label == found.prediction.top(1)[0].label
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logit)), found.prediction.probabilities.max(), rtol=1e-4)


def test_what_cannot_be_explained(folder: Path, photos: list[Path], predictor: Predictor):
    with pytest.raises(ConfigError, match="MILMax has no assignment graph"):
        explain(Predictor.load(folder / "mil/checkpoints/best.ckpt"), photos[0])
    with pytest.raises(ConfigError, match="label is 'unicorn': the model knows mug"):
        explain(predictor, photos[0], "unicorn")


def test_the_model_stays_as_it_was(predictor: Predictor, photos: list[Path]):
    before = predictor.model.execution
    explain(predictor, photos[0])
    assert predictor.model.execution == before


def test_pygs_explainer(predictor: Predictor, photos: list[Path]):
    """Node and edge masks of PyG's own explainer; of the edges that matter, some matter more than others."""
    data = predictor.assignment_graph(photos[0])
    model = ExplainedModel(predictor.model, data)
    torch.testing.assert_close(model(data.x_dict, data.edge_index_dict), predictor.model(data).logits)
    explainer = Explainer(
        model, GNNExplainer(epochs=5), explanation_type="model", node_mask_type="attributes", edge_mask_type="object",
        model_config={"mode": "regression", "task_level": "graph", "return_type": "raw"},
    )  # fmt: skip
    found = explainer(data.x_dict, data.edge_index_dict)
    for edge_type in (NEAR, RELATES, MATCHES):
        assert found[edge_type].edge_mask.shape == (data[edge_type].edge_index.shape[1],)
        assert found[edge_type].edge_mask.std() > 0
    assert found[LABEL].node_mask.shape == data[LABEL].x.shape
