"""The network: encoder, k graph network blocks, decoder, pooling (eq. 4 to 14)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import HeteroData

from gm_mlic.errors import ConfigError
from gm_mlic.graphs.batch import AssignmentBatch
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, NEAR, RELATES
from gm_mlic.nn import structured
from gm_mlic.nn.conv import AssignmentConv, Edges, Product, Relations, States
from gm_mlic.nn.mlp import MLP, Decoder
from gm_mlic.nn.scatter import group_max
from gm_mlic.nn.structured import Prepared

FUSIONS = ("concat", "product")
NORMS = ("none", "encoder", "all")
EXECUTIONS = ("auto", "structured", "explicit")
LONELY = "Label nodes {} have no matching edge: join each to at least one instance."


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """What a model says of a batch of B images.

    Attributes:
        logits: (B, C) label logits; ``sigmoid`` of them is p of eq. 14.
        winners: (B, C) int64, which instance of the image (0 is the most confident) won each label.
        matches: match logits as the execution leaves them: (E,), or (B, M, C) with the mask below. What the baselines
            for whole images say of each location instead, each one's docstring tells.
        mask: (B, M) bool, the instances that there are; (B, M, C), the matching edges, if not all are there; or None.
        label_states: (B, C, d) states of the labels after the last block; None from a model without label nodes.
    """

    logits: Tensor
    winners: Tensor
    matches: Tensor
    mask: Tensor | None = None
    label_states: Tensor | None = None

    @property
    def match_logits(self) -> Tensor:
        """(E,) logit of each matching edge, sorted by image, instance, label (eq. 13)."""
        return self.matches if self.mask is None else self.matches[self.mask].flatten()


def pool_matches(match_logits: Tensor, data: HeteroData, v_l: Tensor | None = None) -> ModelOutput:
    """Max-pooling over instances (eq. 14), on logits: match logits (E,) to :class:`ModelOutput`.

    ``v_l`` (B * C, d), the labels' states, goes into the output.

    Raises:
        ConfigError: if images differ in their number of labels, or a label has no matching edge.
    """
    source, target = data[MATCHES].edge_index
    labels = data[LABEL]
    B = int(getattr(data, "num_graphs", 1))
    if not torch.compiler.is_compiling():  # these checks read values, which would break a compiled graph
        counts = labels.ptr.diff().tolist() if "ptr" in labels else []
        if len(set(counts)) > 1:
            raise ConfigError(f"Images of one batch have {counts} labels: batch those with the same.")
        lonely = (torch.bincount(target, minlength=labels.x.shape[0]) == 0).nonzero().flatten().tolist()
        if lonely:
            raise ConfigError(LONELY.format(lonely[:5]))
    best, edge = group_max(match_logits, target, labels.x.shape[0])
    first = data[INSTANCE].ptr[:-1] if "ptr" in data[INSTANCE] else source.new_zeros(1)
    winners = source[edge].view(B, -1) - first.view(B, 1)
    states = None if v_l is None else v_l.view(B, -1, v_l.shape[-1])
    return ModelOutput(best.view(B, -1), winners, match_logits, label_states=states)


def pool_match_matrix(matrix: Tensor, mask: Tensor, v_l: Tensor | None = None) -> ModelOutput:
    """The same from a dense (B, M, C), the mask of the instances (B, M) or edges (B, M, C) that there are, and labels
    (B, C, d).

    Raises:
        ConfigError: if a label has no matching edge.
    """
    there = mask if mask.dim() == 3 else mask[..., None]
    if mask.dim() == 3 and not torch.compiler.is_compiling() and not bool(there.any(dim=1).all()):
        raise ConfigError(LONELY.format((~there.any(dim=1)).flatten().nonzero().flatten().tolist()[:5]))
    values = matrix.detach().masked_fill(~there, float("-inf"))
    best = values.amax(dim=1, keepdim=True)
    position = torch.arange(matrix.shape[1], device=matrix.device)[:, None]
    winners = torch.where((values == best) | values.isnan(), position, matrix.shape[1]).amin(dim=1)
    logits = matrix.gather(1, winners[:, None]).squeeze(1)
    return ModelOutput(logits, winners, matrix, mask, v_l)


def check_lengths(data: HeteroData | AssignmentBatch, instance_dim: int | None, label_dim: int | None = None) -> None:
    """Raise ConfigError unless features and label vectors have the lengths that a model was built for."""
    if isinstance(data, AssignmentBatch):
        x, W = data.x, data.label_vectors
    else:
        x, W = data[INSTANCE].x, data[LABEL].x
    for what, length, expected in (
        ("instance features", x.shape[-1], instance_dim),
        ("label vectors", W.shape[-1], label_dim),
    ):
        if expected is not None and length != expected:
            raise ConfigError(f"The graph's {what} have length {length}, the model was built for {expected}.")


def standardise(box: Tensor) -> Tensor:
    """Coordinates that are uniform in [0, 1] to mean 0 and variance 1."""
    return (box - 0.5) * math.sqrt(12)


class Encoder(nn.Module):
    r"""Takes every node and edge attribute into the latent space, by one MLP for each type (eq. 4).

    Attributes of eq. 2 and 3 that the graph does not carry are formed from its nodes. The MLP of the instance edges
    reads eq. 1 in other coordinates, :meth:`relative`.

    Args:
        instance_dim: D_o, length of an instance's feature.
        label_dim: D_l, length of a label's vector.
        out_channels: width of all encoded states.
        relations: which edge types there are.
        product: give the matching edges the third argument :class:`~gm_mlic.nn.Product`.
        norm: LayerNorm on the encoded states.
    """

    def __init__(
        self,
        instance_dim: int,
        label_dim: int,
        out_channels: int,
        relations: Relations,
        *,
        product: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.instance_dim, self.label_dim, self.out_channels = instance_dim, label_dim, out_channels

        def mlp(*parts: int) -> MLP:
            return MLP(parts, out_channels, out_channels, norm=norm)

        self.v_o = mlp(instance_dim)
        self.v_l = mlp(label_dim)
        self.e_o = mlp(4, 4) if relations.instance_graph else None
        self.e_l = mlp(label_dim, label_dim) if relations.label_graph else None
        self.e_m: MLP | None = None
        self.product: Product | None = None
        if relations.matching_edges and product:
            self.product = Product((instance_dim, label_dim), out_channels)
            self.e_m = mlp(instance_dim, label_dim, out_channels)
        elif relations.matching_edges:
            self.e_m = mlp(instance_dim, label_dim)

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def forward(self, data: HeteroData) -> States:
        """The encoded states."""
        x_o, x_l = data[INSTANCE].x, data[LABEL].x
        e_o = e_l = e_m = None
        if self.e_o is not None:
            e_o = self.e_o(self.relative(data[NEAR].edge_attr))
        if self.e_l is not None:
            e_l = self.e_l(self._ends(data, RELATES, x_l, x_l))
        if self.e_m is not None:
            ends = self._ends(data, MATCHES, x_o, x_l)
            if self.product is not None:
                f, w = ends[:, : self.instance_dim], ends[:, self.instance_dim :]
                ends = torch.cat([ends, self.product(f, w)], dim=1)
            e_m = self.e_m(ends)
        return States(self.v_o(x_o), self.v_l(x_l), e_o, e_l, e_m)

    @staticmethod
    def relative(e_o: Tensor) -> Tensor:
        r""":math:`[B_j, B_i]` as :math:`[16 (B_j - B_i), \sqrt{12} (B_i - 1/2)]`.

        An invertible linear map, so what the Linear behind it can express is what it can on eq. 1 itself. But where j
        stands relative to i is the larger part of its input from the first step on, and nothing spatial is learnt in
        reasonable time otherwise (``experiments/recipe``).
        """
        B_j, B_i = e_o.chunk(2, dim=-1)
        return torch.cat([16 * (B_j - B_i), standardise(B_i)], dim=-1)

    @staticmethod
    def _ends(data: HeteroData, edge_type: tuple[str, str, str], x_source: Tensor, x_target: Tensor) -> Tensor:
        if "edge_attr" in data[edge_type]:
            attr: Tensor = data[edge_type].edge_attr
            return attr
        source, target = data[edge_type].edge_index
        return torch.cat([x_source[source], x_target[target]], dim=1)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.instance_dim}, {self.label_dim}, {self.out_channels})"


class GMMLIC(nn.Module):
    r"""Graph Matching based Multi-Label Image Classification, from the paper of that name (Wu et al., IJCAI 2021).

    .. math::
        G_A &\leftarrow \mathrm{Enc}(G_A) \\
        G_A &\leftarrow \mathrm{EdgeConv}(\mathrm{NodeConv}(G_A)) \quad k \text{ times} \\
        s_{ic} &= \mathrm{Dec}(e^m_{ic}), \qquad p_c = \sigma(\max_i s_{ic})

    No parameter belongs to a label or to a number of instances: one model takes any C and M; only C must be the same
    for all images of a batch. Under autocast, logits and pooling stay in float32.

    Args:
        instance_dim: D_o, length of an instance's feature f.
        label_dim: D_l, length of a label's vector w (300 for the paper's GloVe).
        k: number of blocks (default: 2, the paper's).
        widths: width of each block; default k - 1 times 512, then 256.
        encoder_width: width of the encoded states; default: that of the first block.
        fusion: what functions on the matching edges see of the two ends: ``concat`` (the paper), or ``product``, which
            adds an element-wise product of learnt projections (default; see ``experiments/recipe``).
        norm: LayerNorm on ``none``, on the ``encoder``'s states, or on ``all`` encoded and updated states.
        label_graph, instance_graph, matching_edges: False removes that edge type (the paper's Table 4). Without
            matching edges the decoder reads :math:`[v^o_i, v^l_c]`.
        execution: ``explicit`` passes messages over ``edge_index``; ``structured`` does the same sums on dense tensors,
            several times faster, where relations are complete; ``auto`` (default) takes the structured one wherever
            the graph allows it. Same parameters, same numbers.
        recompute: keep next to nothing for the backward pass and compute it again there, a few images at a time: a
            fraction of the memory for about a third more time, same numbers. The explicit execution keeps the states
            between blocks; compiled code keeps what the compiler chooses, and this has no effect.

    Shapes:
        - **input:** an assignment graph or a batch of them, from :class:`~gm_mlic.graphs.AssignmentGraph`, or an
          :class:`~gm_mlic.graphs.AssignmentBatch`
        - **output:** :class:`ModelOutput`

    Raises:
        ConfigError: for a setting that cannot work.
    """

    def __init__(
        self,
        instance_dim: int,
        label_dim: int,
        k: int = 2,
        widths: Sequence[int] | None = None,
        encoder_width: int | None = None,
        fusion: str = "product",
        norm: str = "all",
        *,
        label_graph: bool = True,
        instance_graph: bool = True,
        matching_edges: bool = True,
        execution: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if k < 1:
            raise ConfigError(f"model.k must be 1 or more, got {k}.")
        widths = (512,) * (k - 1) + (256,) if widths is None else tuple(widths)
        if len(widths) != k:
            raise ConfigError(f"model.widths must have k = {k} entries, got {list(widths)}.")
        if encoder_width is None:
            encoder_width = widths[0]
        if min(instance_dim, label_dim, encoder_width, *widths) < 1:
            raise ConfigError("model.widths, model.encoder_width and both input lengths must be 1 or more.")
        for name, value, allowed in (
            ("fusion", fusion, FUSIONS),
            ("norm", norm, NORMS),
            ("execution", execution, EXECUTIONS),
        ):
            if value not in allowed:
                raise ConfigError(f"model.{name} must be one of {', '.join(allowed)}; got {value!r}.")
        self.instance_dim, self.label_dim, self.k = instance_dim, label_dim, k
        self.widths, self.encoder_width, self.fusion, self.norm = widths, encoder_width, fusion, norm
        self.execution, self.recompute = execution, recompute
        self.relations = relations = Relations(label_graph, instance_graph, matching_edges)
        product = fusion == "product"

        self.encoder = Encoder(instance_dim, label_dim, encoder_width, relations, product=product, norm=norm != "none")
        channels = [encoder_width, *widths]
        self.blocks = nn.ModuleList(
            AssignmentConv(
                channels[b], channels[b + 1], relations, product=product, norm=norm == "all", last=b == k - 1
            )
            for b in range(k)
        )
        self.decoder = Decoder([widths[-1]] if matching_edges else [widths[-1]] * 2, widths[-1], 1)

    def reset_parameters(self) -> None:
        self.encoder.reset_parameters()
        for block in self.blocks:
            block.reset_parameters()  # type: ignore[operator]
        self.decoder.reset_parameters()

    def prepare(self, label_vectors: Tensor, relates: Tensor | None = None) -> Prepared:
        """What the weights and the labels decide, for :meth:`forward` to take instead of computing it for each batch.

        Good for as long as weights and labels stay; without gradients unless they are enabled.

        Args:
            label_vectors: (C, D_l).
            relates: (C, K), the labels that each label hears; None for all others.
        """
        return structured.prepare(self, label_vectors, relates)

    def forward(self, data: HeteroData | AssignmentBatch, labels: Prepared | None = None) -> ModelOutput:
        """Score every label of every image of ``data``.

        Args:
            data: see above.
            labels: what :meth:`prepare` made of the labels of ``data``; the structured execution then reads nothing of
                them but their number.
        """
        check_lengths(data, self.instance_dim, self.label_dim)
        self._check_relations(data)
        batch = self._dense(data)
        if batch is not None:
            self._check_prepared(batch, labels)
            matrix, v_l = structured.match_matrix(self, batch, labels)
            return pool_match_matrix(matrix, batch.mask if batch.matches is None else batch.matches, v_l)
        match_logits, v_l = self._explicit(data)
        return pool_matches(match_logits, data, v_l)

    def _explicit(self, data: HeteroData) -> tuple[Tensor, Tensor]:
        """Match logits (E,) and label states by message passing over ``edge_index``: eq. 4 to 13 as they stand."""
        edges = Edges(
            near=data[NEAR].edge_index if self.relations.instance_graph else None,
            relates=data[RELATES].edge_index if self.relations.label_graph else None,
            matches=data[MATCHES].edge_index,
        )
        states = self.stage(self.encoder, data)
        for block in self.blocks:
            states = self.stage(block, states, edges)
        v_o, v_l, _, _, e_m = states
        source, target = edges.matches
        ends = (e_m,) if e_m is not None else (v_o[source], v_l[target])
        match_logits: Tensor = self.stage(self.decoder, *ends).squeeze(-1)
        return match_logits, v_l

    def stage(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``; with ``recompute``, computed again in the backward pass instead of kept."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)

    def _check_prepared(self, batch: AssignmentBatch, labels: Prepared | None) -> None:
        if labels is not None and labels.v_l.shape[1] != batch.label_vectors.shape[0]:
            raise ConfigError(
                f"The graph has {batch.label_vectors.shape[0]} labels, but {labels.v_l.shape[1]} were prepared: "
                "prepare the graph's own."
            )

    def _check_relations(self, data: HeteroData | AssignmentBatch) -> None:
        if isinstance(data, AssignmentBatch):
            present = {NEAR: data.near is not None, RELATES: data.label_graph, MATCHES: True}
        else:
            present = {edge_type: edge_type in data.edge_types for edge_type in (NEAR, RELATES, MATCHES)}
        wanted = {NEAR: self.relations.instance_graph, RELATES: self.relations.label_graph, MATCHES: True}
        for edge_type, is_wanted in wanted.items():
            if is_wanted and not present[edge_type]:
                raise ConfigError(
                    f"The model reads {' '.join(edge_type)} edges, which the graph lacks: give both the same ablation."
                )

    def _dense(self, data: HeteroData | AssignmentBatch) -> AssignmentBatch | None:
        """The dense form of ``data`` for the structured execution, or None for the explicit one."""
        if isinstance(data, AssignmentBatch):
            if self.execution == "explicit":
                raise ConfigError("model.execution=explicit needs a HeteroData, not an AssignmentBatch.")
            return data
        if self.execution == "explicit":
            return None
        batch = AssignmentBatch.from_data(data)
        if batch is None and self.execution == "structured":
            raise ConfigError(
                "model.execution=structured needs matching edges sorted by instance and label, the same labels in each "
                "image, and no edge attributes of their own; use model.execution=auto for other graphs."
            )
        return batch

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.instance_dim}, {self.label_dim}, k={self.k}, widths={list(self.widths)}, "
            f"fusion={self.fusion!r})"
        )
