"""Reference implementation of equations 1 to 15 in float64 loops.

Written from the paper's equations and the package's documented decisions, for clarity rather than speed: one
matrix-vector product per function call, Python loops over images, instances, labels and edges. It uses only the
weights of the package, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
States = dict[tuple[int, int], Vector]
"""States of one edge type: (source, target) -> vector."""

_SPATIAL = "<instance___spatial___instance>"
_SEMANTIC = "<label___semantic___label>"
_MATCHES = "<instance___matches___label>"


@dataclass(frozen=True)
class Settings:
    """Settings of equations 1 to 15."""

    k: int = 2
    fusion: str = "concat"
    norm: str = "none"
    label_graph: bool = True
    instance_graph: bool = True
    matching_edges: bool = True
    neighbors: int = 5
    label_neighbors: int | None = None

    def model_options(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("k", "fusion", "norm")} | {"edge_types": self.edge_types()}

    def graph_options(self) -> dict[str, object]:
        return {
            "num_neighbors": self.neighbors,
            "num_label_neighbors": self.label_neighbors,
            "edge_types": self.edge_types(),
        }

    def edge_types(self) -> list[str]:
        present = {"spatial": self.instance_graph, "semantic": self.label_graph, "matches": self.matching_edges}
        return [name for name, there in present.items() if there]


@dataclass(frozen=True)
class Image:
    """Instances of one image: features (M, D_o) and boxes (M, 4)."""

    features: Vector
    boxes: Vector


@dataclass(frozen=True)
class Outcome:
    """Result: logits (B, C); match_logits: per image (M, C); argmax_instance (B, C)."""

    logits: Vector
    match_logits: list[Vector]
    argmax_instance: npt.NDArray[np.int64]


def _relu(x: Vector) -> Vector:
    return np.array([value if value > 0 else 0.0 for value in x])


def _layer_norm(x: Vector, gain: Vector, offset: Vector) -> Vector:
    mean = math.fsum(x) / len(x)
    variance = math.fsum((value - mean) ** 2 for value in x) / len(x)
    return np.array([(v - mean) / math.sqrt(variance + 1e-5) * g + o for v, g, o in zip(x, gain, offset, strict=True)])


def _mean(vectors: list[Vector], width: int) -> Vector:
    total = np.zeros(width)
    for vector in vectors:
        total = total + vector
    return total / len(vectors) if vectors else total


class _Weights:
    """Functions of the equations, by name of their weights."""

    def __init__(self, state_dict: Mapping[str, object]) -> None:
        self.arrays = {name: np.asarray(value, dtype=np.float64) for name, value in state_dict.items()}

    def width(self, name: str) -> int:
        return len(self.arrays[f"{name}.lin2.bias"])

    def mlp(self, name: str, *, norm: bool) -> Callable[..., Vector]:
        a = self.arrays
        assert (f"{name}.norm.weight" in a) == norm, f"{name}: norm weights disagree with the settings"

        def apply(*parts: Vector) -> Vector:
            x = np.concatenate(parts)
            blocks = [a[key] for key in sorted(a) if key.startswith(f"{name}.lin1.lins.") and key.endswith(".weight")]
            hidden = _relu(np.concatenate(blocks, axis=1) @ x + a[f"{name}.lin1.lins.0.bias"])
            out = a[f"{name}.lin2.weight"] @ hidden + a[f"{name}.lin2.bias"]
            return _layer_norm(out, a[f"{name}.norm.weight"], a[f"{name}.norm.bias"]) if norm else out

        return apply

    def on_matches(self, mlp: Callable[..., Vector], owner: str, fusion: str) -> Callable[[Vector, Vector], Vector]:
        """``mlp`` on the two ends of a matching edge, instance first; ``product`` adds (A v_o) * (B v_l)."""
        if fusion == "concat":
            return lambda v_o, v_l: mlp(v_o, v_l)
        A, B = self.arrays[f"{owner}.product.A.weight"], self.arrays[f"{owner}.product.B.weight"]
        return lambda v_o, v_l: mlp(v_o, v_l, (A @ v_o) * (B @ v_l))


def spatial_edges(boxes: Vector, neighbors: int) -> list[tuple[int, int]]:
    """(j, i) for the nearest neighbors j of i by distance of box centers; ties are resolved to the lower index."""
    edges = []
    for i in range(len(boxes)):
        others = []
        for j in range(len(boxes)):
            if j != i:
                dx = (boxes[j][0] + boxes[j][2]) / 2 - (boxes[i][0] + boxes[i][2]) / 2
                dy = (boxes[j][1] + boxes[j][3]) / 2 - (boxes[i][1] + boxes[i][3]) / 2
                others.append((dx * dx + dy * dy, j))
        edges += [(j, i) for _, j in sorted(others)[:neighbors]]
    return edges


def semantic_edges(W: Vector, label_neighbors: int | None) -> list[tuple[int, int]]:
    """(j, i) for all labels j except i, or for those with the highest cosine similarity to i."""
    edges = []
    for i in range(len(W)):
        others = []
        for j in range(len(W)):
            if j != i:
                others.append((-float(W[i] @ W[j]) / math.sqrt(float(W[i] @ W[i]) * float(W[j] @ W[j])), j))
        others = sorted(others)[:label_neighbors] if label_neighbors is not None else others
        edges += [(j, i) for _, j in others]
    return edges


def _forward_image(w: _Weights, s: Settings, image: Image, W: Vector) -> Vector:
    """Match logits (M, C) of one image: eq. 1 to 13."""
    M, C = len(image.features), len(W)
    B = image.boxes

    # Eq. 1 to 3.
    e_o: States = {}
    if s.instance_graph:
        e_o = {(j, i): np.concatenate([B[j], B[i]]) for j, i in spatial_edges(B, s.neighbors)}
    e_l: States = {}
    if s.label_graph:
        e_l = {(j, i): np.concatenate([W[j], W[i]]) for j, i in semantic_edges(W, s.label_neighbors)}

    # Eq. 4.
    encoded = s.norm in ("encoder", "all")
    enc_o, enc_l = w.mlp("encoder.x.instance", norm=encoded), w.mlp("encoder.x.label", norm=encoded)
    e_m: States = {}
    if s.matching_edges:
        enc_m = w.on_matches(
            w.mlp(f"encoder.edge_attr.{_MATCHES}", norm=encoded), f"encoder.edge_attr.{_MATCHES}", s.fusion
        )
        for i in range(M):
            for c in range(C):
                e_m[i, c] = enc_m(image.features[i], W[c])
    v_o = [enc_o(image.features[i]) for i in range(M)]
    v_l = [enc_l(W[c]) for c in range(C)]
    if s.instance_graph:
        # The package's coordinates for eq. 1: the sender's box relative to the receiver's, multiplied by 16, then the
        # receiver's, standardized for a uniform distribution in [0, 1] (mean 1/2, variance 1/12).
        enc_eo = w.mlp(f"encoder.edge_attr.{_SPATIAL}", norm=encoded)
        e_o = {
            edge: enc_eo(np.concatenate([16 * (state[:4] - state[4:]), (state[4:] - 1 / 2) / math.sqrt(1 / 12)]))
            for edge, state in e_o.items()
        }
    if s.label_graph:
        enc_el = w.mlp(f"encoder.edge_attr.{_SEMANTIC}", norm=encoded)
        e_l = {edge: enc_el(state) for edge, state in e_l.items()}

    for block in range(s.k):
        v_o, v_l = _node_conv(w, s, f"blocks.{block}.node_conv", v_o, v_l, e_o, e_l, e_m)
        e_o, e_l, e_m = _edge_convs(w, s, block, v_o, v_l, e_o, e_l, e_m)

    # Eq. 13.
    decoder = w.mlp("decoder", norm=False)
    logits = np.zeros((M, C))
    for i in range(M):
        for c in range(C):
            (logits[i, c],) = decoder(e_m[i, c]) if s.matching_edges else decoder(v_o[i], v_l[c])
    return logits


def _node_conv(
    w: _Weights, s: Settings, name: str, v_o: list[Vector], v_l: list[Vector], e_o: States, e_l: States, e_m: States
) -> tuple[list[Vector], list[Vector]]:
    """Eq. 5 to 8."""

    def mean_message(edges: str, to: str, messages: list[tuple[Vector, Vector]]) -> list[Vector]:
        rho_n = f"{name}.message.{edges}.{to}.rho_n"
        function = w.mlp(rho_n, norm=False)
        return [_mean([function(e, v) for e, v in messages], w.width(rho_n))]

    updated = s.norm == "all"
    phi_o, phi_l = w.mlp(f"{name}.phi_n.instance", norm=updated), w.mlp(f"{name}.phi_n.label", norm=updated)
    new_o, new_l = [], []
    for i in range(len(v_o)):
        parts = [v_o[i]]
        if s.instance_graph:
            parts += mean_message(_SPATIAL, "instance", [(e_o[j, t], v_o[j]) for j, t in e_o if t == i])
        if s.matching_edges:
            parts += mean_message(_MATCHES, "instance", [(e_m[i, c], v_l[c]) for c in range(len(v_l))])
        new_o.append(phi_o(*parts))
    for c in range(len(v_l)):
        parts = [v_l[c]]
        if s.label_graph:
            parts += mean_message(_SEMANTIC, "label", [(e_l[j, t], v_l[j]) for j, t in e_l if t == c])
        if s.matching_edges:
            parts += mean_message(_MATCHES, "label", [(e_m[i, c], v_o[i]) for i in range(len(v_o))])
        new_l.append(phi_l(*parts))
    return new_o, new_l


def _edge_convs(
    w: _Weights, s: Settings, block: int, v_o: list[Vector], v_l: list[Vector], e_o: States, e_l: States, e_m: States
) -> tuple[States, States, States]:
    """Eq. 9 to 12; the last block has no weights to update instance and label edges."""
    updated, name = s.norm == "all", f"blocks.{block}.edge_conv"
    if block < s.k - 1:
        if s.instance_graph:
            rho_e = w.mlp(f"{name}.{_SPATIAL}.rho_e", norm=False)
            phi_e = w.mlp(f"{name}.{_SPATIAL}.phi_e", norm=updated)
            e_o = {(j, i): phi_e(e, rho_e(v_o[j], v_o[i])) for (j, i), e in e_o.items()}
        if s.label_graph:
            rho_e = w.mlp(f"{name}.{_SEMANTIC}.rho_e", norm=False)
            phi_e = w.mlp(f"{name}.{_SEMANTIC}.phi_e", norm=updated)
            e_l = {(j, i): phi_e(e, rho_e(v_l[j], v_l[i])) for (j, i), e in e_l.items()}
    if s.matching_edges:
        rho_e = w.mlp(f"{name}.{_MATCHES}.rho_e", norm=False)
        fused = w.on_matches(rho_e, f"{name}.{_MATCHES}.rho_e", s.fusion)
        phi_e = w.mlp(f"{name}.{_MATCHES}.phi_e", norm=updated)
        e_m = {(i, c): phi_e(e, fused(v_o[i], v_l[c])) for (i, c), e in e_m.items()}
    return e_o, e_l, e_m


def oracle_forward(state_dict: Mapping[str, object], settings: Settings, images: list[Image], W: Vector) -> Outcome:
    """Eq. 1 to 14 per image; ties of the argmax are resolved to the lower instance."""
    w = _Weights(state_dict)
    match_logits = [_forward_image(w, settings, image, np.asarray(W, dtype=np.float64)) for image in images]
    argmax_instance = [
        [max(range(len(logits)), key=lambda i: (logits[i, c], -i)) for c in range(len(W))] for logits in match_logits
    ]
    pooled = [
        [logits[best[c], c] for c in range(len(W))] for logits, best in zip(match_logits, argmax_instance, strict=True)
    ]
    return Outcome(np.array(pooled), match_logits, np.array(argmax_instance))


def oracle_loss(logits: Vector, targets: Vector, ratio: Vector, beta: float, difficult: str = "positive") -> float:
    """Eq. 15 as a mean over the counted terms."""
    terms = []
    for row, row_targets in zip(logits, targets, strict=True):
        for s, t, r in zip(row, row_targets, ratio, strict=True):
            if t == 0 and difficult == "ignore":
                continue
            y = 1.0 if t == 1 or (t == 0 and difficult == "positive") else 0.0
            weight = y * math.exp(beta * (1 - r)) + (1 - y) * math.exp(beta * r)
            # log(sigmoid(s)) without overflow: -log(1 + e^-|s|) + min(s, 0).
            log_p = min(s, 0.0) - math.log1p(math.exp(-abs(s)))
            log_not_p = min(-s, 0.0) - math.log1p(math.exp(-abs(s)))
            terms.append(-weight * (y * log_p + (1 - y) * log_not_p))
    return math.fsum(terms) / len(terms) if terms else 0.0
