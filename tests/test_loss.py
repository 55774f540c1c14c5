"""CosFace against its definition, finite differences and plain cross-entropy."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from training.loss import cosface


def brute_force(
    cosines: list[list[float]], targets: list[int], scale: float, margin: float
) -> float:
    losses = []
    for row, target in zip(cosines, targets, strict=True):
        powers = [math.exp(scale * (c - margin * (k == target))) for k, c in enumerate(row)]
        losses.append(-math.log(powers[target] / sum(powers)))
    return sum(losses) / len(losses)


@given(data=st.data(), scale=st.floats(0.5, 30), margin=st.floats(0, 0.5))
def test_the_definition(data: st.DataObject, scale: float, margin: float) -> None:
    n, c = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 6))
    cosine = st.floats(-1, 1)
    rows = data.draw(st.lists(st.lists(cosine, min_size=c, max_size=c), min_size=n, max_size=n))
    targets = data.draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))
    loss = cosface(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(targets), scale=scale, margin=margin
    )
    assert loss.item() == pytest.approx(brute_force(rows, targets, scale, margin), abs=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.15])
def test_the_gradient(margin: float) -> None:
    cosines = torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines.requires_grad_()
    targets = torch.tensor([0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda c: cosface(c, targets, margin=margin), (cosines,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_margin_it_is_cross_entropy(dtype: torch.dtype) -> None:
    cosines = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 - 1
    targets = torch.arange(8) % 5
    expected = torch.nn.functional.cross_entropy(20 * cosines, targets)
    torch.testing.assert_close(cosface(cosines, targets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    cosines = (torch.rand(16, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(dtype)
    targets = torch.arange(16) % 7
    loss = cosface(cosines, targets, margin=0.1)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, cosface(cosines.float(), targets, margin=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(cosface(cosines, targets, margin=0.1), loss, rtol=0, atol=0)


def test_a_very_large_scale_stays_finite() -> None:
    cosines = torch.tensor([[1.0, -1.0]], requires_grad=True)
    loss = cosface(cosines, torch.tensor([1]), scale=1e4, margin=1.0)
    torch.autograd.backward(loss)
    assert loss.item() == pytest.approx(3e4)
    assert cosines.grad is not None
    assert cosines.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "targets", "settings", "message"),
    [
        ((2, 3), [0, 1], {"scale": 0.0}, "scale"),
        ((2, 3), [0, 1], {"scale": math.nan}, "scale"),
        ((2, 3), [0, 1], {"margin": -0.1}, "margin"),
        ((2, 3), [0, 1, 2], {}, r"\(3,\)"),
        ((0, 3), [], {}, "at least 1"),
        ((2, 3), [0, 3], {}, "0 to 3"),
        ((2, 3), [-1, 0], {}, "-1 to 0"),
    ],
)
def test_errors(
    shape: tuple[int, int], targets: list[int], settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        cosface(torch.zeros(shape), torch.tensor(targets, dtype=torch.int64), **settings)


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="int64"):
        cosface(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(TypeError, match="floating"):
        cosface(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
