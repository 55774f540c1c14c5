"""What the gradient-aligned step does when something is not finite, wrong or raises."""

import math
from typing import Any

import pytest
import torch
from gao_oracle import BROKEN, Problem, sgd
from torch import Tensor
from torch.optim import SGD

from backends.torch import gradient_aligned_step, plain_step


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_loss_leaves_no_shift_behind(call: int, failure: type[BaseException]) -> None:
    p, q = Problem(), Problem()
    calls = iter(range(4))

    def loss(rows: Tensor) -> Tensor:
        if next(calls) == call:
            raise failure(BROKEN)
        return p.loss(rows)

    with pytest.raises(failure, match=BROKEN):
        p.step(sgd(p.parameters), loss=loss)
    expected = q.values()
    if call >= 2:  # the first half step was done by then, and stays
        only_first = iter(range(4))

        def first_half(rows: Tensor) -> Tensor:
            if next(only_first) == 2:
                raise failure("stop")
            return q.loss(rows)

        with pytest.raises(failure):
            q.step(sgd(q.parameters), loss=first_half)
        expected = q.values()
        assert not torch.equal(expected[0], Problem().values()[0])
    assert all(torch.equal(a, b) for a, b in zip(p.values(), expected, strict=True))


def test_error_in_the_optimizer_leaves_the_moved_tensors_as_they_were() -> None:
    class Broken(SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            raise RuntimeError(BROKEN)

    p = Problem()
    before = p.values()
    with pytest.raises(RuntimeError, match=BROKEN):
        p.step(Broken(p.parameters, lr=0.1))
    assert torch.equal(p.up, before[0])
    assert torch.equal(p.down, before[1])


@pytest.mark.parametrize("bad_calls", [{1}, {3}, {1, 3}, {0}, {2}, {0, 2}])
def test_gradients_that_are_not_finite_are_skipped_bit_for_bit(bad_calls: set[int]) -> None:
    p = Problem()
    optimizer = SGD(p.parameters, lr=0.1)
    before = p.values()
    calls = iter(range(4))

    def loss(rows: Tensor) -> Tensor:
        value = p.loss(rows)
        return value * math.nan if next(calls) in bad_calls else value

    done = p.step(optimizer, loss=loss, skip_nonfinite=True)
    bad_halves = {c // 2 for c in bad_calls}
    assert done.steps == 2 - len(bad_halves)
    assert all(bool(v.isfinite().all()) for v in p.values())
    if len(bad_halves) == 2:
        assert all(torch.equal(a, b) for a, b in zip(p.values(), before, strict=True))


def test_shift_that_is_not_finite_is_noticed_where_the_other_half_does_not_use_it() -> None:
    p = Problem(spare=True)
    before = p.values()
    first = p.halves()[0]

    def loss(rows: Tensor) -> Tensor:
        value = p.loss(rows)
        return value + (p.spare * math.nan).sum() if torch.equal(rows, first) else value

    done = p.step(SGD(p.parameters, lr=0.1), loss=loss, skip_nonfinite=True)
    assert done.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(p.values(), before, strict=True))


def test_plain_step_skips_too() -> None:
    p = Problem()
    before = p.values()
    done = plain_step(
        lambda rows: p.loss(rows) * math.inf, p.y, sgd(p.parameters), skip_nonfinite=True
    )
    assert done.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(p.values(), before, strict=True))
    assert plain_step(p.loss, p.y, sgd(p.parameters), skip_nonfinite=True).steps == 1


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("one_class", [False, True])
def test_radius_is_checked_before_anything_moves(radius: float, one_class: bool) -> None:
    p = Problem()
    before = p.values()
    labels = torch.zeros_like(p.y) if one_class else p.y
    with pytest.raises(ValueError, match="radius must be finite and at least 0"):
        p.step(sgd(p.parameters), radius, labels=labels)
    assert all(torch.equal(a, b) for a, b in zip(p.values(), before, strict=True))


def test_wrong_arguments_are_refused() -> None:
    p = Problem()
    optimizer = sgd(p.parameters)
    with pytest.raises(ValueError, match="permutation must hold every class"):
        p.step(optimizer, permutation=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="permutation must hold every class"):
        p.step(optimizer, permutation=torch.tensor([0, 1, 2, 3, 3]))
    with pytest.raises(ValueError, match="nothing to perturb"):
        gradient_aligned_step(p.loss, p.y, optimizer, [], radius=0.1, permutation=p.permutation)
