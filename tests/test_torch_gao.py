"""The gradient-aligned step against a plain straight-line implementation of the same rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gao_oracle import Make, PlainAdamW, PlainSGD, Problem, adamw, by_hand, sgd
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.optim import SGD

from backends.torch import draw_permutation, gradient_aligned_step, plain_step


@given(seed=seeds, radius=st.sampled_from([0.0, 0.1, 0.7]), steps=st.integers(1, 4))
@pytest.mark.parametrize(("make", "plain"), [(sgd, PlainSGD), (adamw, PlainAdamW)])
def test_step_is_that_of_the_plain_implementation(
    make: Make, plain: Callable[[], Any], seed: int, radius: float, steps: int
) -> None:
    p = Problem(seed)
    optimizer, update, values = make(p.parameters), plain(), p.values()
    for _ in range(steps):
        values, loss = by_hand(p, values, update, radius)
        done = p.step(optimizer, radius)
        assert done.steps == 2
        assert not done.loss.requires_grad
        assert float(done.loss) == pytest.approx(loss, rel=1e-9)
    for found, expected in zip(p.values(), values, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("make", "plain"), [(sgd, PlainSGD), (adamw, PlainAdamW)])
def test_weight_decay_sees_the_moved_parameters(make: Make, plain: Callable[[], Any]) -> None:
    p = Problem()
    optimizer, values = make(p.parameters), p.values()
    expected, _ = by_hand(p, values, plain(), 0.5)
    other, _ = by_hand(p, values, plain(), 0.5, restore_first=True)
    p.step(optimizer, 0.5)
    torch.testing.assert_close(p.up.detach(), expected[0])
    # Restoring before the step leaves out the decay of the shift, which is far above rounding.
    assert float((other[0] - expected[0]).norm()) > 1e-4


@pytest.mark.parametrize("make", [sgd, adamw])
def test_radius_zero_is_two_ordinary_half_steps(make: Make) -> None:
    p, q = Problem(), Problem()
    optimizer, other = make(p.parameters), make(q.parameters)
    p.step(optimizer, 0.0)
    for rows in q.halves()[::-1]:
        other.zero_grad()
        q.loss(rows).backward()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(p.values(), q.values(), strict=True))


def test_every_loss_sees_the_rows_of_one_half_in_turn() -> None:
    p = Problem()
    seen: list[Tensor] = []
    optimizer = sgd(p.parameters)
    p.step(optimizer, loss=lambda rows: (seen.append(rows), p.loss(rows))[1])
    first, second = p.halves()
    assert [r.tolist() for r in seen] == [x.tolist() for x in (first, second, second, first)]
    assert not set(p.y[first].tolist()) & set(p.y[second].tolist())


def test_mini_batch_of_one_class_is_one_plain_step() -> None:
    p, q = Problem(), Problem()
    p.y = q.y = torch.full((16,), 2)
    done = p.step(sgd(p.parameters), permutation=torch.tensor([2]))
    plain = plain_step(q.loss, q.y, sgd(q.parameters))
    assert done.steps == plain.steps == 1
    assert torch.equal(done.loss, plain.loss)
    assert all(torch.equal(a, b) for a, b in zip(p.values(), q.values(), strict=True))


def test_head_steps_but_is_never_perturbed() -> None:
    p = Problem()
    heads: list[Tensor] = []
    ups: list[Tensor] = []

    def loss(rows: Tensor) -> Tensor:
        heads.append(p.head.detach().clone())
        ups.append(p.up.detach().clone())
        return p.loss(rows)

    start = p.head.detach().clone()
    p.step(sgd(p.parameters), loss=loss)
    assert torch.equal(heads[0], start)
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[2], heads[3])
    assert not torch.equal(heads[1], heads[2])
    assert not torch.equal(p.head, heads[3])
    assert float((ups[1] - ups[0]).norm()) == pytest.approx(0.3)
    assert float((ups[3] - ups[2]).norm()) == pytest.approx(0.3)


def test_tensor_without_a_gradient_is_not_shifted() -> None:
    p = Problem(spare=True)
    before = p.spare.detach().clone()
    places: list[Tensor] = []
    p.step(
        SGD(p.parameters, lr=0.1),
        loss=lambda rows: (places.append(p.spare.detach().clone()), p.loss(rows))[1],
    )
    assert all(torch.equal(x, before) for x in (*places, p.spare))


def test_backward_can_be_replaced() -> None:
    p, q = Problem(), Problem()
    calls: list[float] = []

    def doubled(value: Tensor) -> None:
        calls.append(float(value.detach()))
        (2 * value).backward()

    p.step(SGD(p.parameters, lr=0.1), backward=doubled)
    q.step(SGD(q.parameters, lr=0.2))
    assert len(calls) == 2
    torch.testing.assert_close(p.values(), q.values())


def test_no_gradient_is_left_over_from_before() -> None:
    p, q = Problem(), Problem()
    p.loss(torch.arange(16)).backward()
    p.step(sgd(p.parameters))
    q.step(sgd(q.parameters))
    assert all(torch.equal(a, b) for a, b in zip(p.values(), q.values(), strict=True))


@given(seed=seeds)
def test_to_first_order_the_loss_falls_by_radius_times_the_alignment(seed: int) -> None:
    p = Problem(seed)
    optimizer = SGD(p.parameters, lr=0.0)
    slope = 0.0
    for source, goal in (p.halves(), p.halves()[::-1]):
        towards = torch.autograd.grad(p.loss(source), p.perturbed)
        along = torch.autograd.grad(p.loss(goal), p.perturbed)
        inner = sum(float((a * t).sum() / t.norm()) for a, t in zip(along, towards, strict=True))
        slope -= inner * len(goal) / len(p.y)
    radius = 1e-5
    rise = float(p.step(optimizer, radius).loss - p.step(optimizer, 0.0).loss) / radius
    assert rise == pytest.approx(slope, rel=1e-3, abs=1e-4)


@given(seed=seeds)
def test_step_raises_the_inner_product_of_two_gradients_of_equal_length(seed: int) -> None:
    """What the step adds to a plain one is, to first order, ascent on ⟨g₁, g₂⟩."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    roots = torch.randn(2, 4, 4, generator=generator, dtype=torch.float64)
    hessians = roots @ roots.mT + 0.1 * torch.eye(4, dtype=torch.float64)
    slopes = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    slopes /= slopes.norm(dim=1, keepdim=True)
    y = torch.tensor([0, 1])

    def gradients(theta: Tensor) -> Tensor:
        return torch.stack([h @ theta + s for h, s in zip(hessians, slopes, strict=True)])

    def trained(radius: float) -> Tensor:
        theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))

        def loss(rows: Tensor) -> Tensor:
            return 0.5 * theta @ hessians[rows[0]] @ theta + slopes[rows[0]] @ theta

        gradient_aligned_step(loss, y, SGD([theta], lr=1e-6), [theta], radius=radius, permutation=y)
        return theta.detach()

    gained, plain = trained(1e-3), trained(0.0)
    ascent = hessians[0] @ slopes[1] + hessians[1] @ slopes[0]
    torch.testing.assert_close((gained - plain) / 1e-9, ascent, rtol=1e-2, atol=1e-2)
    products = [float(torch.prod(gradients(t), dim=0).sum()) for t in (gained, plain)]
    assert products[0] > products[1] or float(ascent.norm()) < 0.1


@given(labels=st.lists(st.integers(-5, 5), min_size=1), seed=seeds)
def test_drawn_permutation_holds_every_class_once_and_follows_its_generator(
    labels: list[int], seed: int
) -> None:
    drawn = [
        draw_permutation(torch.tensor(labels), torch.Generator().manual_seed(seed)).tolist()
        for _ in range(2)
    ]
    assert sorted(drawn[0]) == sorted(set(labels))
    assert drawn[0] == drawn[1]


def test_every_order_of_the_classes_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {tuple(draw_permutation(torch.arange(3), generator).tolist()) for _ in range(100)}
    assert len(drawn) == 6
