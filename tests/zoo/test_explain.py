from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData
from torch_geometric.explain import Explainer, GNNExplainer

from gm_mlic import Predictor
from gm_mlic.errors import ConfigError
from gm_mlic.graphs import EDGE_TYPES, INSTANCE, LABEL, MATCHES, SEMANTIC, SPATIAL, EdgeSpec
from gm_mlic.nn import GMMLIC
from gm_mlic.zoo import ExplainedModel, explain

#: Edge type, source type and target type of the messages to the argmax instance and to the label.
MESSAGES = [
    (SPATIAL, INSTANCE, INSTANCE),
    (SEMANTIC, LABEL, LABEL),
    (MATCHES, INSTANCE, LABEL),
    (MATCHES, LABEL, INSTANCE),
]


@pytest.fixture(scope="module")
def predictor(folder: Path) -> Predictor:
    return Predictor.load(folder / "gm/checkpoints/best.ckpt")


def test_influences_equal_predictions_without_each_edge(predictor: Predictor, photos: list[Path]):
    names = predictor.metadata.labels
    label = names[4]
    found = explain(predictor, photos[0], label)
    data = predictor.assignment_graph(photos[0])
    model = predictor.model
    M, C = data["instance"].num_nodes, len(names)
    with torch.no_grad():
        whole = model(data)
        assert found.logit == pytest.approx(float(whole.logits[0, 4]), abs=1e-4)
        assert found.instance == int(whole.argmax_instance[0, 4])
        messages = [(influence.edge_type, influence.source, influence.target) for influence in found.influences]
        spatial = int((data[SPATIAL].edge_index[1] == found.instance).sum())
        counts = [messages.count(message) for message in MESSAGES]
        assert counts == [spatial, C - 1, M - 1, C - 1]
        assert sum(counts) == len(messages)
        for influence in found.influences:
            assert isinstance(influence.neighbor, str if influence.source == LABEL else int)
            sender = names.index(influence.neighbor) if isinstance(influence.neighbor, str) else influence.neighbor
            receiver = {INSTANCE: found.instance, LABEL: 4}[influence.target]
            graph = predictor.assignment_graph(photos[0])
            store = graph[influence.edge_type]
            reverse = (influence.source, influence.target) != influence.edge_type[::2]  # message against the edge
            source, target = (receiver, sender) if reverse else (sender, receiver)
            keep = ~((store.edge_index[0] == source) & (store.edge_index[1] == target))
            assert int((~keep).sum()) == 1
            store.edge_index = store.edge_index[:, keep]
            if "edge_attr" in store:
                store.edge_attr = store.edge_attr[keep]
            change = float(whole.logits[0, 4] - model(graph).logits[0, 4])
            assert influence.change == pytest.approx(change, abs=1e-4)
    sizes = [abs(influence.change) for influence in found.influences]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1e-4


def test_bidirectional_types_are_explained_in_both_directions(
    predictor: Predictor, photos: list[Path], monkeypatch: pytest.MonkeyPatch
):
    """A custom type from instances to labels, and an ablation of the messages along matching edges."""
    NAMES = (INSTANCE, "names", LABEL)
    build = predictor.graph

    def with_names(data: HeteroData) -> HeteroData:
        data = build(data)
        data[NAMES].edge_index = data[MATCHES].edge_index
        return data

    def messages(bidirectional: bool) -> set[tuple[str, str]]:
        edge_types = {**EDGE_TYPES, NAMES: EdgeSpec(bidirectional=bidirectional)}
        del edge_types[MATCHES]
        torch.manual_seed(0)
        monkeypatch.setattr(predictor, "model", GMMLIC(256, 300, widths=(8, 8), edge_types=edge_types).eval())
        found = explain(predictor, photos[0]).influences
        assert {(i.source, i.target) for i in found if i.edge_type == MATCHES} == {(INSTANCE, LABEL)}
        return {(i.source, i.target) for i in found if i.edge_type == NAMES and abs(i.change) > 0}

    monkeypatch.setattr(predictor, "graph", with_names)
    with_names.m = build.m
    monkeypatch.setitem(predictor.metadata.graph, "layout", "sparse")
    assert messages(bidirectional=True) == {(INSTANCE, LABEL), (LABEL, INSTANCE)}
    assert messages(bidirectional=False) == {(INSTANCE, LABEL)}


def test_the_most_probable_label_is_the_default(predictor: Predictor, photos: list[Path]):
    found = explain(predictor, photos[1])
    assert found.label == found.prediction.top(1)[0].label
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logit)), found.prediction.probabilities.max(), rtol=1e-4)


def test_models_without_graph_and_unknown_labels_are_rejected(folder: Path, photos: list[Path], predictor: Predictor):
    with pytest.raises(ConfigError, match="MILMax has no assignment graph"):
        explain(Predictor.load(folder / "mil/checkpoints/best.ckpt"), photos[0])
    with pytest.raises(ConfigError, match="label is 'unicorn': the labels are mug"):
        explain(predictor, photos[0], "unicorn")


def test_explain_does_not_change_the_model(predictor: Predictor, photos: list[Path]):
    before = {name: value.clone() for name, value in predictor.model.state_dict().items()}
    (prediction,) = predictor(photos[:1])
    explain(predictor, photos[0])
    assert not predictor.model.training
    assert all(torch.equal(value, before[name]) for name, value in predictor.model.state_dict().items())
    (again,) = predictor(photos[:1])
    np.testing.assert_array_equal(again.match_logits, prediction.match_logits)


def test_pyg_explainer_learns_node_and_edge_masks(predictor: Predictor, photos: list[Path]):
    data = predictor.assignment_graph(photos[0])
    model = ExplainedModel(predictor.model, data)
    torch.testing.assert_close(model(data.x_dict, data.edge_index_dict), predictor.model(data).logits)
    explainer = Explainer(
        model, GNNExplainer(epochs=5), explanation_type="model", node_mask_type="attributes", edge_mask_type="object",
        model_config={"mode": "regression", "task_level": "graph", "return_type": "raw"},
    )  # fmt: skip
    found = explainer(data.x_dict, data.edge_index_dict)
    for edge_type in (SPATIAL, SEMANTIC, MATCHES):
        assert found[edge_type].edge_mask.shape == (data[edge_type].edge_index.shape[1],)
        assert found[edge_type].edge_mask.std() > 0
    assert found[LABEL].node_mask.shape == data[LABEL].x.shape
