"""Benchmark cases and executions, and their comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch, HeteroData

from gm_mlic.bench.measure import FlopCounter, interleaved, matrix_rate, peak_bytes
from gm_mlic.detection.protocol import InstanceExtractor, detect
from gm_mlic.graphs import AssignmentBatch, AssignmentBatchDataset, AssignmentGraph, AssignmentGraphDataset
from gm_mlic.losses import WeightedBCE
from gm_mlic.nn import GMMLIC
from gm_mlic.nn.gm_mlic import CHECKPOINTED_EDGES, Fusion, Norm

#: ``sparse``: message passing over ``edge_index``, with the attributes of eq. 1 to 3 concatenated on every edge;
#: ``dense``: dense tensors, eager; ``compiled``: the same after ``torch.compile``; ``checkpointed``: dense, with
#: gradient checkpointing.
EXECUTIONS = ("sparse", "dense", "compiled", "checkpointed")

INSTANCE_DIM, LABEL_DIM = 1024, 300


@dataclass(frozen=True)
class Case:
    """Benchmark case: its name in tables, m instances per image, C labels, images per batch, and model settings.

    k, ``fusion`` and ``norm`` are those of :class:`~gm_mlic.nn.GMMLIC`. ``num_label_neighbors`` is None for a complete
    label graph. ``precision`` is ``float32``, or ``bfloat16`` for autocast.
    """

    name: str
    m: int
    C: int
    k: int = 2
    batch: int = 16
    fusion: Fusion = "concat"
    norm: Norm = "all"
    num_label_neighbors: int | None = None
    precision: str = "float32"


#: The paper's three datasets, and a case with many labels and a 20-nearest-neighbor label graph.
CASES = {
    case.name: case
    for case in (
        Case("voc2007", 10, 20),
        Case("coco2014", 35, 80),
        Case("nuswide", 35, 81),
        Case("large", 100, 500, num_label_neighbors=20),
    )
}

#: Variables of the growth curves, with their values.
CURVES: dict[str, tuple[int, ...]] = {
    "m": (5, 10, 20, 35, 50, 100),
    "C": (20, 40, 80, 160, 320, 500),
    "k": (1, 2, 3, 4),
    "batch": (1, 2, 4, 8, 16),
}


class Execution:
    """Model, data and optimizer of one case, for one of :data:`EXECUTIONS`."""

    def __init__(self, case: Case, name: str, device: str = "cpu") -> None:
        torch.manual_seed(0)
        self.case, self.device = case, device
        label_vectors = torch.randn(case.C, LABEL_DIM)
        options = {"num_label_neighbors": case.num_label_neighbors, "edge_attr": name == "sparse"}
        graph = AssignmentGraph(label_vectors, m=case.m, **options)  # type: ignore[arg-type]
        graphs = AssignmentGraphDataset(RandomStore(case.batch, case.m, case.C, INSTANCE_DIM), graph)
        data: HeteroData | AssignmentBatch = Batch.from_data_list([graphs[i] for i in range(case.batch)])
        if name != "sparse":
            data = AssignmentBatch.from_hetero_data(data)
        self.data = data.to(device)
        torch.manual_seed(1)
        self.model = GMMLIC(
            INSTANCE_DIM,
            LABEL_DIM,
            k=case.k,
            fusion=case.fusion,
            norm=case.norm,
            gradient_checkpointing=name == "checkpointed",
        ).to(device)
        self.loss = WeightedBCE(torch.full((case.C,), 0.05), validate_args=False).to(device)
        self.targets = (torch.rand(case.batch, case.C) < 0.05).long().to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        if name == "compiled":
            self.model.compile()

    def forward(self) -> Tensor:
        """Label logits, without gradients."""
        with torch.no_grad(), self._autocast():
            logits: Tensor = self.model(self.data).logits
        return logits

    def train(self) -> None:
        """One training step: forward, loss, backward, optimizer."""
        with self._autocast():
            loss = self.loss(self.model(self.data).logits, self.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    def _autocast(self) -> torch.autocast:
        half = self.case.precision == "bfloat16"
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=half)


def flops(case: Case, execution: str) -> dict[str, int]:
    """FLOPs of the matrix products of a forward pass and of a training step.

    They are linear in the number of images, so they are counted for one and two images and extrapolated. ``compiled``
    and ``checkpointed`` count as ``dense``: compiled code hides its operations, and recomputation is left out.
    """
    counts = []
    for batch in (1, 2):
        run = Execution(replace(case, batch=batch), "sparse" if execution == "sparse" else "dense")
        for step in (run.forward, run.train):
            with FlopCounter() as counter:
                step()
            counts.append(counter.get_total_flops())
    forward, train, forward_2, train_2 = counts
    rest = case.batch - 1
    return {"forward": forward + rest * (forward_2 - forward), "train": train + rest * (train_2 - train)}


def compare(
    case: Case,
    executions: Sequence[str] = EXECUTIONS,
    *,
    repeats: tuple[int, int] = (3, 2),
    device: str = "cpu",
    memory_limit: int | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare time and memory of the executions of one case.

    Args:
        case: problem sizes and model settings.
        executions: names from :data:`EXECUTIONS`.
        repeats: timed rounds of forward passes and of training steps, after a warm-up of each.
        device: ``cpu`` or ``cuda``.
        memory_limit: maximum memory in bytes; executions with a higher estimate are left out.
        log: callback for progress messages.

    Returns:
        The case, and for each execution ``forward`` and ``train`` (seconds of all runs, and their median), ``memory``
        (peak bytes of a training step), ``flops``, and ``roofline`` (reached share of ``matrix_rate``, the FLOP/s of
        this machine's matrix product).
    """
    runs: dict[str, Execution] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name in executions:
        needed = expected_bytes(case, name)
        if memory_limit is not None and needed > memory_limit:
            rows[name] = {"left_out": f"needs about {needed / 2**30:.0f} GiB to train"}
            continue
        log(f"{case.name}: {name}, first run")
        run = runs[name] = Execution(case, name, device)
        if name == "compiled":
            torch.compiler.reset()  # each case has other sizes; the compiler's recompile limit would be reached
            run.forward()
            run.train()  # compiles, so that allocations of the compiler are not measured
        rows[name] = {"memory": peak_bytes(run.train, device)}
    dtype = torch.bfloat16 if case.precision == "bfloat16" else torch.float32
    product = (case.batch * case.m * case.C, 512, device, dtype)
    rates = [matrix_rate(*product)]  # before, between and after the runs, since clock rates vary
    for mode, rounds in zip(("forward", "train"), repeats, strict=True):
        log(f"{case.name}: {mode}, {rounds} rounds of {', '.join(runs)}")
        timings = interleaved({name: getattr(run, mode) for name, run in runs.items()}, rounds, device)
        for name, seconds in timings.items():
            rows[name][mode] = {"median": median(seconds), "all": seconds}
        rates.append(matrix_rate(*product))
    rate = max(rates)
    for name in runs:
        count = flops(case, name)
        share = {mode: count[mode] / rows[name][mode]["median"] / rate for mode in count}
        rows[name] |= {"flops": count, "roofline": share}
    return {"case": asdict(case), "device": device, "executions": rows, "matrix_rate": rate}


def ratios(result: dict[str, Any]) -> dict[str, Any]:
    """Ratios of sparse execution to the best other execution, and the best roofline fractions of the others.

    Returns:
        ``forward_ratio``, ``train_ratio`` and ``memory_ratio``; ``arithmetic_ratio`` of forward FLOPs, the time ratio
        if both executions ran at the matrix product's rate; ``roofline_fraction`` (forward) and
        ``train_roofline_fraction``. None for values that were not measured.
    """
    rows = {name: row for name, row in result["executions"].items() if "left_out" not in row}
    sparse, fast = rows.get("sparse"), [row for name, row in rows.items() if name != "sparse"]

    def ratio(of: Callable[[dict[str, Any]], float]) -> float | None:
        return of(sparse) / min(map(of, fast)) if sparse and fast else None

    def share(mode: str) -> float | None:
        return max((row["roofline"][mode] for row in fast), default=None)

    return {
        "forward_ratio": ratio(lambda row: row["forward"]["median"]),
        "train_ratio": ratio(lambda row: row["train"]["median"]),
        "memory_ratio": ratio(lambda row: row["memory"]),
        "arithmetic_ratio": ratio(lambda row: row["flops"]["forward"]),
        "roofline_fraction": share("forward"),
        "train_roofline_fraction": share("train"),
    }


def expected_bytes(case: Case, execution: str) -> int:
    """Estimate of the memory of a training step, from the edge states saved for the backward pass."""
    matches = case.m * case.C
    labels = case.C * (case.num_label_neighbors or case.C)
    # Measured number of saved tensors per edge; width 512 (encoder, first k - 1 blocks) or 256 (last block).
    kept = 7.0 if execution == "sparse" else 3.5
    per_edge = kept * (512 * case.k + 256)
    inputs = (INSTANCE_DIM + LABEL_DIM) * 3 if execution == "sparse" else 0
    images = max(1, CHECKPOINTED_EDGES // (matches + labels)) if execution == "checkpointed" else case.batch
    return int(4 * images * (matches + labels) * (per_edge + inputs))


def grow(
    start: Case,
    curves: Sequence[str] = tuple(CURVES),
    executions: Sequence[str] = ("sparse", "dense"),
    *,
    repeats: tuple[int, int] = (2, 1),
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Growth curves of time and memory over m, C, k and the batch: :func:`compare` for the values of :data:`CURVES`.

    Args:
        start: the base case; each curve varies one variable.
        curves: names from :data:`CURVES`.
        executions, repeats: see :func:`compare`.
        **options: see :func:`compare`.
    """
    points: dict[str, list[dict[str, Any]]] = {curve: [] for curve in curves}
    for curve, results in points.items():
        for value in CURVES[curve]:
            case = replace(start, name=f"{curve}={value}", **{curve: value})  # type: ignore[arg-type]
            results.append(compare(case, executions, repeats=repeats, **options))
    return points


def shares(
    detector: InstanceExtractor, images: Sequence[Tensor], case: Case, device: str = "cpu", repeats: int = 3
) -> dict[str, float]:
    """Time per image of the stages of prediction, and of a training step.

    ``images`` are (3, H, W) in [0, 1]. ``device`` is that of the network; the detector has its own.

    Returns:
        Median seconds per image: ``detection``; ``data``, reading a batch from an instance store; ``graph``, the
        network with a label cache; ``train``, a training step.
    """
    network = Execution(replace(case, batch=len(images)), "dense", device)
    batch = network.data
    assert isinstance(batch, AssignmentBatch)
    with torch.no_grad():
        cache = network.model.precompute_labels(batch)
    store = AssignmentBatchDataset(
        RandomStore(8 * len(images), case.m, case.C), AssignmentGraph(batch.label_vectors.cpu(), m=case.m)
    )
    rows = torch.randperm(8 * len(images))[: len(images)].tolist()

    @torch.no_grad()
    def graph() -> None:
        network.model(batch, cache)

    runs: dict[str, Callable[[], object]] = {
        "detection": lambda: detect(detector, images, case.m),
        "data": lambda: store.__getitems__(rows).to(device),
        "graph": graph,
        "train": network.train,
    }
    for run in runs.values():
        run()
    timings = interleaved(runs, repeats, device)
    return {name: median(seconds) / len(images) for name, seconds in timings.items()}


class RandomStore:
    """In-memory instance store of ``size`` images with m random instances and C absent labels."""

    def __init__(self, size: int, m: int, C: int, dim: int = INSTANCE_DIM) -> None:
        rng = np.random.default_rng(0)
        self.features = rng.standard_normal((size, 1, m, dim), dtype=np.float32).astype(np.float16)
        corner = rng.random((size, 1, m, 2), dtype=np.float32) / 2
        self.boxes = np.concatenate([corner, corner + 0.3], axis=-1)
        self.scores = np.ones((size, 1, m), dtype=np.float32)
        self.detected_labels = np.zeros((size, 1, m), dtype=np.int64)
        self.counts = np.full((size, 1), m)
        self.targets = np.zeros((size, C), dtype=np.int8)
        self.difficult: np.ndarray | None = None
        self.rows = np.arange(size)
