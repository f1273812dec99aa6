"""The network: encoder, k graph network blocks, decoder, max-pooling (eq. 4 to 14)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import DocInfo, Interval, Predicate
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import HeteroData
from torch_geometric.nn.inits import reset
from torch_geometric.nn.module_dict import ModuleDict

from gm_mlic.errors import ArgumentError, ConfigError
from gm_mlic.graphs.batch import AssignmentBatch, check_sizes
from gm_mlic.graphs.dense import DenseEdges, EdgeTensor, apply_linear, call, edge_ends, expanded, is_plain, reused
from gm_mlic.graphs.schema import INSTANCE, LABEL, MATCHES, RELATIONS, EdgeSpec, EdgeType, NodeType, edge_table
from gm_mlic.nn.conv import EdgeValues, GraphNetworkBlock, MessageMLP, NodeValues, by_type, node_types
from gm_mlic.nn.mlp import ConcatLinear, ConcatMLP, Decoder
from gm_mlic.nn.output import ModelOutput, Pooling, pool_instances
from gm_mlic.nn.prior import MatchHead, attribute
from gm_mlic.registry import register_model
from gm_mlic.schema import Fraction, Natural, NotNegative, Positive, checked

Fusion = Literal["concat", "product"]
Norm = Literal["none", "encoder", "all"]
Relation = Literal["spatial", "semantic", "matches"]
Dim = Annotated[int, Predicate(lambda d: d > 0 or d == -1), DocInfo("1 or more, or -1 to take it from the first graph")]

#: Number of edges that gradient checkpointing computes at a time, over all images: enough to use all cores, and about
#: 200 MB at the widths of the paper.
CHECKPOINTED_EDGES = 2**13


class LabelCache(NamedTuple):
    """Encoded label nodes (1, C, d), label edges (1, C, K, d), and products of weights, which the first forward pass
    without gradients adds. From :meth:`GMMLIC.precompute_labels`.
    """

    x_dict: dict[NodeType, Tensor]
    edge_attr_dict: dict[EdgeType, EdgeTensor]
    compositions: dict[Any, Any]


class Encoder(nn.Module):
    r"""The encoder of the `GM-MLIC paper <https://www.ijcai.org/proceedings/2021/163>`_ (eq. 4), one MLP for each node
    type and each edge type:

    .. math::
        v_i \leftarrow f(v_i), \qquad e_{ij} \leftarrow f(e_{ij}), \text{ or } f(v_j, v_i)
        \text{ where } e^l_{ij} = [v^l_j, v^l_i] \text{ (eq. 2) and } e^m_{ic} = [v^o_i, v^l_c] \text{ (eq. 3)}

    Args:
        in_channels: dict from node type to size of its attribute, or one size for all; -1 to take it from the first
            input.
        out_channels: size of all encoded features.
        edge_types: dict from edge type to :class:`~gm_mlic.graphs.EdgeSpec`.
        product: fusion ``product`` for the edge types with ``product`` (default: ``False``).
        norm: LayerNorm on the encoded features (default: ``True``).

    Shapes:
        - **input:** ``x_dict`` (N, in_channels) by node type, ``edge_index_dict`` (2, E) by edge type,
          ``edge_attr_dict`` (E, attr_dim) by edge type; attributes of eq. 2 and 3 are computed if absent
        - **output:** ``x_dict`` (N, out_channels) and ``edge_attr_dict`` (E, out_channels)

    Raises:
        ArgumentError: if ``in_channels`` has no size for a type.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        edge_types: Mapping[EdgeType, EdgeSpec],
        *,
        product: bool = False,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = by_type("in_channels", in_channels, node_types(edge_types))
        self.out_channels, self.edge_types = out_channels, dict(edge_types)

        self.x, self.edge_attr = ModuleDict(), ModuleDict()
        for node_type, size in in_channels.items():
            self.x[node_type] = ConcatMLP([size], out_channels, out_channels, norm=norm)
        for t, spec in edge_types.items():
            parts = [in_channels[t[0]], in_channels[t[2]]] if spec.attr_dim is None else [spec.attr_dim]
            fusion = product and spec.product
            self.edge_attr[t] = ConcatMLP(parts, out_channels, out_channels, product=fusion, norm=norm)

    def reset_parameters(self) -> None:
        reset(self.x)
        reset(self.edge_attr)

    def forward(
        self,
        x_dict: NodeValues,
        edge_index_dict: EdgeValues,
        edge_attr_dict: EdgeValues,
        cache: LabelCache | None = None,
    ) -> tuple[dict[NodeType, Tensor], dict[EdgeType, Any]]:
        """Encode the nodes and edges of a graph; types that are not in the graph are left out.

        Args:
            x_dict, edge_index_dict, edge_attr_dict: the graph.
            cache: encoded label nodes and edges, which are then not computed.
        """
        x = {} if cache is None else dict(cache.x_dict)
        e: dict[EdgeType, Any] = {} if cache is None else dict(cache.edge_attr_dict)
        for node_type, mlp in self.x.items():
            if node_type in x_dict and node_type not in x:
                x[node_type] = mlp(x_dict[node_type])
        for edge_type, mlp in self.edge_attr.items():
            if edge_type in edge_index_dict and edge_type not in e:
                parts = self._attributes(edge_type, x_dict, edge_index_dict, edge_attr_dict)
                e[edge_type] = call(ConcatMLP, mlp, *parts)
        return x, e if is_plain(self, Encoder) else expanded(e)[0]

    def _attributes(
        self, edge_type: EdgeType, x_dict: NodeValues, edge_index_dict: EdgeValues, edge_attr_dict: EdgeValues
    ) -> tuple[Tensor | EdgeTensor, ...]:
        """The attribute of eq. 1, or both parts of that of eq. 2 or 3."""
        spec, edge_index = self.edge_types[edge_type], edge_index_dict[edge_type]
        x_source, x_target = x_dict[edge_type[0]], x_dict[edge_type[2]]
        if spec.attr_dim is not None:
            attr = edge_attr_dict[edge_type] if spec.transform is None else spec.transform(edge_attr_dict[edge_type])
            return (EdgeTensor(attr) if isinstance(edge_index, DenseEdges) else attr,)
        if edge_type in edge_attr_dict:
            return edge_attr_dict[edge_type].split([x_source.shape[-1], x_target.shape[-1]], dim=-1)  # type: ignore[no-any-return]
        return edge_ends(edge_index, x_source, x_target)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


@register_model(
    "gm_mlic_scenes", "GM-MLIC for scenes and their tiny detector", instance_dim=256, label_dim=300, widths=(64, 64)
)
@register_model(
    "gm_mlic_paper",
    "GM-MLIC as in the paper: k = 2, widths 512 and 256, 1024-d features, GloVe, plain concatenation",
    instance_dim=1024,
    label_dim=300,
    fusion="concat",
)
@register_model("gm_mlic", "GM-MLIC without preset arguments")
class GMMLIC(nn.Module):
    r"""The network of `"GM-MLIC: Graph Matching based Multi-Label Image Classification"
    <https://www.ijcai.org/proceedings/2021/163>`_ (Wu et al., IJCAI 2021).

    .. math::
        G_A &\leftarrow \mathrm{Encoder}(G_A) & \text{(eq. 4)} \\
        G_A &\leftarrow \mathrm{EdgeConv}(\mathrm{NodeConv}(G_A)) \quad k \text{ times} & \text{(eq. 5 to 12)} \\
        s_{ic} &= \mathrm{Decoder}(e^m_{ic}) & \text{(eq. 13)} \\
        p_c &= \sigma(\max_i s_{ic}) & \text{(eq. 14)}

    The parameters do not depend on the number of labels or instances: one model takes any C and M. C must be the same
    for all images of a batch.

    The type of the graph selects the computation. A ``HeteroData`` is processed by message passing over ``edge_index``,
    an :class:`~gm_mlic.graphs.AssignmentBatch` by the same layers on dense tensors, about three times faster.
    Parameters and results are the same. Under autocast, logits and pooling stay in float32.

    Args:
        instance_dim: D_o, size of an instance's feature f.
        label_dim: D_l, size of a label's vector w (300 for the paper's GloVe).
        k: number of blocks, up to 100; 2 in the paper.
        widths: size of the features after each block, one for all or a list of k; null: k - 1 times 512, then 256 (the
            paper's).
        encoder_width: size of the encoded features; null: that of the first block.
        fusion: input of the MLPs on source and target of a matching edge: ``concat``, :math:`[v^o_i, v^l_c]` (the
            paper), or ``product``, which adds :class:`HadamardFusion` (see ``experiments/recipe``).
        norm: where LayerNorm is applied: ``none``; ``encoder``: encoded features; ``all``: encoded and updated
            features.
        edge_types: some of the paper's edge types: ``spatial``, ``semantic``, ``matches``. Its ablations leave one out.
            Without ``matches``, the decoder takes :math:`[v^o_i, v^l_c]`. In Python, also a dict from edge type to
            :class:`~gm_mlic.graphs.EdgeSpec`, such as :data:`~gm_mlic.graphs.EDGE_TYPES`.
        prior: start from the detector's labels: add :class:`~gm_mlic.nn.DetectorPrior` to the match logits. The last
            Linear of the decoder is then zero before training.
        linear: add a linear classifier, :class:`~gm_mlic.nn.LinearMatch`, to the match logits.
        class_words: word vector and score of the detected class become part of the instance's attribute:
            :math:`v^o_i = [f_i, w_{d(i)}, s_i]`. In Python, the number D of detector classes, and :meth:`fit_features`
            sets the vectors.
        components: standardize instance features, and keep at most that many principal axes
            (:class:`~gm_mlic.nn.Standardize`); null: features as they are.
        dropout: probability of zeros in the features that enter the encoder and the decoder.
        shrinkage: what ``linear`` adds for a label with n training images is multiplied by n / (n + shrinkage)
            (:class:`~gm_mlic.nn.MatchHead`); 0: no shrinkage. Labels without a prior are not shrunk: labels that are
            no class of the detector, and all without ``prior``.
        network_shrinkage: the same, for what the network adds; null: as ``shrinkage``.
        ridge: penalty on the weights of ``linear``: ridge / 2 times the sum of their squares, divided by images times
            labels.
        pooling: ``max`` over instances (eq. 14), or ``logsumexp``,
            :math:`p_c = \sigma(\log \sum_i e^{s_{ic}})`.
        gradient_checkpointing: recompute intermediate values in the backward pass, a few images at a time. It needs a
            fraction of the memory and about 40 % more time; results are the same. For a ``HeteroData``, the features
            between blocks are kept. Compiled code ignores it.

    Shapes:
        - **input:** an assignment graph or a batch of them, from :class:`~gm_mlic.graphs.AssignmentGraph`, or an
          :class:`~gm_mlic.graphs.AssignmentBatch`
        - **output:** :class:`ModelOutput`

    Raises:
        ArgumentError: for an invalid argument.
        ConfigError: when called, for a graph of other sizes or dtypes than the model, or without an edge type.
    """

    @checked
    def __init__(
        self,
        instance_dim: Dim,
        label_dim: Dim,
        k: Annotated[int, Interval(ge=1, le=100)] = 2,
        widths: Positive | Sequence[Positive] | None = None,
        encoder_width: Positive | None = None,
        fusion: Fusion = "product",
        norm: Norm = "all",
        *,
        edge_types: Mapping[EdgeType, EdgeSpec] | Sequence[Relation | EdgeType] = RELATIONS,  # type: ignore[assignment]
        prior: bool = False,
        linear: bool = False,
        class_words: bool | Natural = False,
        components: Positive | None = None,
        dropout: Fraction = 0.0,
        shrinkage: NotNegative = 0.0,
        network_shrinkage: NotNegative | None = None,
        ridge: NotNegative = 1000.0,
        pooling: Pooling = "max",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(widths, int):
            widths = (widths,) * k
        widths = (512,) * (k - 1) + (256,) if widths is None else tuple(widths)
        if len(widths) != k:
            raise ArgumentError("widths", f"must have k = {k} entries, got {list(widths)}.")
        encoder_width = widths[0] if encoder_width is None else encoder_width
        self.instance_dim, self.label_dim, self.k = instance_dim, label_dim, k
        self.widths, self.encoder_width, self.fusion, self.norm = widths, encoder_width, fusion, norm
        self.edge_types = edge_table(edge_types)
        self.pooling, self.dropout, self.gradient_checkpointing = pooling, nn.Dropout(dropout), gradient_checkpointing

        product, last = fusion == "product", widths[-1]
        self.head = MatchHead(
            instance_dim,
            label_dim,
            prior=prior,
            linear=linear,
            components=components,
            shrinkage=shrinkage,
            network_shrinkage=network_shrinkage,
            ridge=ridge,
        )
        if class_words and min(instance_dim, label_dim) < 1:
            raise ArgumentError("class_words", "needs instance_dim and label_dim, not -1.")
        self.class_vectors: Tensor
        if class_words:  # one row of zeros, for instances without a class
            self.register_buffer("class_vectors", torch.zeros(class_words + 1, label_dim))
        self.class_words = class_words
        sizes = {INSTANCE: self.head.out_channels + (label_dim + 1 if class_words else 0), LABEL: label_dim}
        self.encoder = Encoder(sizes, encoder_width, self.edge_types, product=product, norm=norm != "none")
        self.blocks = nn.ModuleList()
        for b, (size, width) in enumerate(zip((encoder_width, *widths), widths, strict=False)):
            sizes = dict.fromkeys([INSTANCE, LABEL, *node_types(self.edge_types)], size)
            updated = (MATCHES,) if b == k - 1 else None  # the decoder uses no other edges
            options: Any = {"product": product, "norm": norm == "all", "updated": updated}
            self.blocks.append(GraphNetworkBlock(sizes, width, self.edge_types, size, **options))
        self.decoder = Decoder([last] if MATCHES in self.edge_types else [last, last], last, zero=prior)

    def reset_parameters(self) -> None:
        for module in (self.encoder, self.blocks, self.decoder, self.head):
            reset(module)

    @torch.no_grad()
    def fit_features(self, features: Tensor, label_vectors: Tensor, class_vectors: Tensor | None = None) -> None:
        """Compute what the settings need; see :class:`~gm_mlic.nn.FeatureStatistics`."""
        self.head.fit(features, label_vectors)
        if self.class_words and class_vectors is not None:
            self.class_vectors[:-1] = class_vectors

    def penalty(self) -> Tensor | float:
        """What the training loss adds; see :meth:`MatchHead.penalty`."""
        return self.head.penalty()

    def forward(self, data: HeteroData | AssignmentBatch, label_cache: LabelCache | None = None) -> ModelOutput:
        """Score every label of every image.

        Args:
            data: see above.
            label_cache: of the labels of ``data``, an :class:`~gm_mlic.graphs.AssignmentBatch`, from
                :meth:`precompute_labels`.
        """
        self._check(data, label_cache)
        checkpointed = self.gradient_checkpointing and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if checkpointed and isinstance(data, AssignmentBatch):
            match_logits, label_states = self._checkpointed(data, label_cache)
        else:
            run: Any = partial(checkpoint, call, use_reentrant=False) if checkpointed else call
            eager = label_cache is not None and not torch.compiler.is_compiling()
            with reused(label_cache.compositions) if eager else nullcontext():  # type: ignore[union-attr]
                match_logits, label_states = self._match(data, label_cache, run)
        return pool_instances(match_logits, data, label_states, self.pooling)

    def _match(self, graph: Any, cache: LabelCache | None, run: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Eq. 4 to 13: the logit of each matching edge, and the features of the labels."""
        inputs, edge_index_dict, attributes = (graph.collect(key, True) for key in ("x", "edge_index", "edge_attr"))
        x, w = self.head.features(inputs[INSTANCE]), inputs[LABEL]
        inputs[INSTANCE] = self.dropout(self._with_class_words(x, graph))
        x_dict, edge_attr_dict = run(Encoder, self.encoder, inputs, edge_index_dict, attributes, cache)
        for block in self.blocks:
            x_dict, edge_attr_dict = run(GraphNetworkBlock, block, x_dict, edge_index_dict, edge_attr_dict)
        ends = edge_ends(edge_index_dict[MATCHES], x_dict[INSTANCE], x_dict[LABEL])
        parts: Any = [edge_attr_dict[MATCHES]] if MATCHES in edge_attr_dict else ends
        if self.training and self.dropout.p:
            parts = [
                EdgeTensor(self.dropout(p.tensor())) if isinstance(p, EdgeTensor) else self.dropout(p) for p in parts
            ]
        return self.head(run(Decoder, self.decoder, *parts).squeeze(-1), x, w, graph), x_dict[LABEL]

    def _with_class_words(self, x: Tensor, graph: Any) -> Tensor:
        if not self.class_words:
            return x
        otherwise = "The graph has no score and detected_label of instances, which `class_words` needs."
        score, detected_label = (attribute(graph, INSTANCE, key, otherwise) for key in ("score", "detected_label"))
        return torch.cat([x, self.class_vectors[detected_label], score[..., None].to(x.dtype)], dim=-1)

    def precompute_labels(self, data: AssignmentBatch) -> LabelCache:
        """Compute the values that do not depend on images once, as an argument of :meth:`forward`.

        Valid until weights or labels change. Gradients are recorded if they are enabled.

        Args:
            data: any batch with these labels.
        """
        self._check(data, None, dense=True)
        edges = {t: edge_index for t, edge_index in data.edge_index_dict.items() if t[0] == t[2] == LABEL}
        x_dict, edge_attr_dict = call(Encoder, self.encoder, {LABEL: data.x_dict[LABEL]}, edges, data.edge_attr_dict)
        first: Any = self.blocks[0]
        ends = (x_dict[LABEL], x_dict[LABEL])
        for t, attr in edge_attr_dict.items():
            if not (isinstance(attr, EdgeTensor) and is_plain(first, GraphNetworkBlock)):
                continue
            message: Any = first.node_conv.message[t][LABEL]
            outputs = {message: call(MessageMLP, message, ends, edges[t], attr)}
            phi_e: Any = first.edge_conv[t].phi_e if t in first.edge_conv else None
            if is_plain(phi_e, ConcatMLP) and is_plain(phi_e.lin1, ConcatLinear):
                outputs[phi_e.lin1.lins[0]] = apply_linear(phi_e.lin1.lins[0], attr)
            attr.outputs = outputs
        return LabelCache(x_dict, edge_attr_dict, {})

    def _checkpointed(self, batch: AssignmentBatch, cache: LabelCache | None) -> tuple[Tensor, Tensor]:
        """Process a few images at a time and keep only their inputs; image-independent values are computed once."""
        cache = self.precompute_labels(batch) if cache is None else cache
        M, C = batch.mask.shape[1], batch.num_labels
        parts = batch.split(max(1, CHECKPOINTED_EDGES // (M * C + C**2)))
        results = [checkpoint(self._match, part, cache, call, use_reentrant=False) for part in parts]
        match_logits, label_states = zip(*results, strict=True)
        states = [state.expand(part.num_graphs, -1, -1) for state, part in zip(label_states, parts, strict=True)]
        return torch.cat(match_logits), torch.cat(states)

    def _check(self, data: HeteroData | AssignmentBatch, cache: LabelCache | None, *, dense: bool = False) -> None:
        if not isinstance(data, (HeteroData, AssignmentBatch)):  # torch 2.8 does not compile unions
            raise ConfigError(f"The model takes a HeteroData or an AssignmentBatch, not {type(data).__name__}.")
        if (dense or cache is not None) and not isinstance(data, AssignmentBatch):
            raise ConfigError("A label cache needs an AssignmentBatch, not a HeteroData.")
        x_dict, edge_index_dict, edge_attr_dict = (data.collect(key, True) for key in ("x", "edge_index", "edge_attr"))
        check_sizes(x_dict, self.instance_dim, self.label_dim)
        for t in (*self.edge_types, MATCHES):
            if t not in edge_index_dict:
                raise ConfigError(
                    f"The model uses {' '.join(t)} edges, the graph has none: give both the same edge_types."
                )
        for t, spec in self.edge_types.items():
            width = x_dict[t[0]].shape[-1] + x_dict[t[2]].shape[-1] if spec.attr_dim is None else spec.attr_dim
            found = edge_attr_dict[t].shape[-1] if t in edge_attr_dict else None
            if found not in (width, None if spec.attr_dim is None else width) and width != -1:
                raise ConfigError(f"{' '.join(t)} edges need edge_attr of length {width}, got {found or 'none'}.")
        if cache is not None and cache.x_dict[LABEL].shape[1] != x_dict[LABEL].shape[1]:
            raise ConfigError(
                f"The graph has {x_dict[LABEL].shape[1]} labels, but {cache.x_dict[LABEL].shape[1]} are in the label "
                "cache: call precompute_labels on this batch."
            )
        if MATCHES in edge_attr_dict and (self.class_words or self.head.standardize is not None):
            raise ConfigError(
                "The graph stores the attributes of matching edges, and the model changes the instance features in "
                "them: give AssignmentGraph edge_attr=False."
            )
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), None)
        if dtype is None or torch.is_autocast_enabled(x_dict[INSTANCE].device.type):
            return
        tensors = {f"x_dict[{t!r}]": x for t, x in x_dict.items()}
        tensors |= {f"edge_attr_dict[{t!r}]": e for t, e in edge_attr_dict.items()}
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                raise ConfigError(
                    f"{name} of the graph is {tensor.dtype}, the model's parameters are {dtype}: convert one of them, "
                    f"as in AssignmentBatch.to({dtype}) or HeteroData.apply(lambda x: x.to({dtype}), 'x', 'edge_attr')."
                )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.instance_dim}, {self.label_dim}, k={self.k}, widths={list(self.widths)}, "
            f"fusion={self.fusion!r})"
        )
