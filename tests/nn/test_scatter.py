from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gm_mlic.nn import scatter


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "torch_scatter", None)


INF, NAN = float("inf"), float("nan")
# Values of groups 0, 1, 0, 1 and the expected positions.
UNUSUAL = [
    ([1.0, -INF, 2.0, -INF], [2, 1]),
    ([-INF, INF, -INF, 5.0], [0, 1]),
    ([3.0, -INF, NAN, NAN], [2, 3]),
    ([NAN, INF, NAN, NAN], [0, 3]),
    ([-INF, 0.0, -1e38, -0.5], [2, 1]),
]


def check_unusual(values: list[float], expected: list[int]) -> None:
    src = torch.tensor(values, requires_grad=True)
    maxima, positions = scatter.scatter_max(src, torch.tensor([0, 1, 0, 1]), 2)
    assert positions.tolist() == expected
    torch.testing.assert_close(maxima, src[expected], rtol=0, atol=0, equal_nan=True)
    maxima.sum().backward()
    assert src.grad is not None
    assert src.grad.nonzero().flatten().tolist() == sorted(expected)


@st.composite
def groups(draw: st.DrawFn, *, infinite: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Values with many ties, in non-empty groups, in any order."""
    G = draw(st.integers(1, 5))
    index = draw(st.permutations([*range(G), *draw(st.lists(st.integers(0, G - 1), max_size=12))]))
    value = st.sampled_from([-3.0, -1.5, 0.0, 2.0, 1e30, *([float("inf"), float("-inf")] if infinite else [])])
    values = draw(st.lists(value, min_size=len(index), max_size=len(index)))
    return torch.tensor(values), torch.tensor(index), G


def loop_max(src: torch.Tensor, index: torch.Tensor, G: int) -> tuple[list[float], list[int]]:
    maxima, positions = [], []
    for g in range(G):
        members = [e for e in range(len(src)) if index[e] == g]
        position = max(members, key=lambda e: (float(src[e]), -e))
        maxima.append(float(src[position]))
        positions.append(position)
    return maxima, positions


@settings(max_examples=60, deadline=None)
@given(case=groups(infinite=True))
def test_scatter_max_equals_a_loop_with_first_tie(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter, "torch_scatter", None)
        maxima, positions = scatter.scatter_max(*case)
    expected = loop_max(*case)
    assert maxima.tolist() == expected[0]
    assert positions.tolist() == expected[1]


@pytest.mark.usefixtures("native")
def test_gradient_goes_to_one_position() -> None:
    src = torch.tensor([1.0, 2.0, 2.0, 5.0, 5.0], requires_grad=True)
    scatter.scatter_max(src, torch.tensor([0, 0, 0, 1, 1]), 2)[0].backward(torch.tensor([1.0, 10.0]))
    assert src.grad is not None
    assert src.grad.tolist() == [0.0, 1.0, 0.0, 10.0, 0.0]


@pytest.mark.usefixtures("native")
def test_scatter_max_gradcheck() -> None:
    src = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    index = torch.tensor([2, 0, 1, 1, 2, 0, 2])
    assert torch.autograd.gradcheck(lambda x: scatter.scatter_max(x, index, 3)[0], (src,))


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scatter_max_keeps_the_dtype(dtype: torch.dtype) -> None:
    maxima, positions = scatter.scatter_max(torch.tensor([1, 3, 2], dtype=dtype), torch.tensor([0, 0, 0]), 1)
    assert maxima.dtype == dtype
    assert positions.tolist() == [1]


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(("values", "positions"), UNUSUAL)
def test_nan_propagates_and_infinities_are_values(values: list[float], positions: list[int]) -> None:
    check_unusual(values, positions)


@pytest.mark.scatter
@settings(max_examples=60, deadline=None)
@given(case=groups(infinite=True))
def test_torch_scatter_equals_the_native_path(case: tuple[torch.Tensor, torch.Tensor, int]) -> None:
    torch_scatter = pytest.importorskip("torch_scatter")
    results = []
    for library in (torch_scatter, None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(scatter, "torch_scatter", library)
            src = case[0].clone().requires_grad_()
            maxima, positions = scatter.scatter_max(src, *case[1:])
            maxima.backward(torch.arange(1.0, case[2] + 1))
            assert src.grad is not None
            results.append((maxima.tolist(), positions.tolist(), src.grad.tolist()))
    assert results[0] == results[1]


@pytest.mark.scatter
@pytest.mark.parametrize(("values", "positions"), UNUSUAL)
def test_torch_scatter_propagates_nan_and_infinities(values: list[float], positions: list[int]) -> None:
    pytest.importorskip("torch_scatter")
    assert scatter.torch_scatter is not None
    check_unusual(values, positions)


@pytest.mark.scatter
def test_compiled_code_does_not_use_torch_scatter() -> None:
    """torch.compile does not support its kernels."""
    pytest.importorskip("torch_scatter")
    src, index = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1])
    torch._dynamo.reset()
    compiled = torch.compile(scatter.scatter_max, backend="eager", fullgraph=True)
    for a, b in zip(compiled(src, index, 2), scatter.scatter_max(src, index, 2), strict=True):
        assert torch.equal(a, b)
