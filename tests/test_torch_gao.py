"""The gradient-aligned step against a plain one written out, and what it does on errors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from backends.torch import AlignedStep, draw_permutation, gradient_aligned_step, plain_step

CLASSES = 4
BROKEN = "it broke on purpose"
Make = Callable[[list[nn.Parameter]], Optimizer]


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


class Problem:
    """Two LoRA-like tensors and a head, in float64; ``spare`` takes part in no loss."""

    def __init__(self, seed: int = 0, *, spare: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed % 2**31)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.up, self.down = draw(16, 5), nn.Parameter(draw(6, 2)), nn.Parameter(draw(2, 5))
        self.head, self.spare = nn.Parameter(draw(CLASSES, 6)), nn.Parameter(draw(3))
        self.y = (torch.arange(16) % 5).clamp(max=CLASSES - 1)  # halves of unequal size
        self.perturbed = [self.up, self.down] + ([self.spare] if spare else [])
        self.parameters = [*self.perturbed, self.head]
        self.permutation = torch.randperm(CLASSES, generator=generator)

    def loss(self, rows: Tensor) -> Tensor:
        hidden = (self.x[rows] @ self.down.T @ self.up.T).tanh()
        return F.cross_entropy(hidden @ self.head.T, self.y[rows])

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def halves(self) -> tuple[Tensor, Tensor]:
        first = torch.isin(self.y, self.permutation[: CLASSES // 2])
        return first.nonzero().flatten(), (~first).nonzero().flatten()

    def step(self, optimizer: Optimizer, radius: float = 0.3, **keywords: Any) -> AlignedStep:
        return gradient_aligned_step(
            keywords.pop("loss", self.loss),
            keywords.pop("labels", self.y),
            optimizer,
            self.perturbed,
            radius=radius,
            permutation=keywords.pop("permutation", self.permutation),
            **keywords,
        )


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class PlainSGD:
    """Momentum and coupled weight decay, written out."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def __call__(self, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        out = []
        for i, (p, g) in enumerate(zip(values, gradients, strict=True)):
            g = g + 0.1 * p
            self.buffers[i] = 0.9 * self.buffers[i] + g if i in self.buffers else g
            out.append(p - 0.05 * self.buffers[i])
        return out


class PlainAdamW:
    """Decoupled weight decay, written out."""

    def __init__(self) -> None:
        self.m: dict[int, Tensor] = {}
        self.v: dict[int, Tensor] = {}
        self.t = 0

    def __call__(self, values: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        self.t += 1
        out = []
        for i, (p, g) in enumerate(zip(values, gradients, strict=True)):
            self.m[i] = 0.8 * self.m.get(i, torch.zeros_like(p)) + 0.2 * g
            self.v[i] = 0.9 * self.v.get(i, torch.zeros_like(p)) + 0.1 * g * g
            m, v = self.m[i] / (1 - 0.8**self.t), self.v[i] / (1 - 0.9**self.t)
            out.append(p - 0.05 * 0.1 * p - 0.05 * m / (v.sqrt() + 1e-6))
        return out


def by_hand(
    p: Problem,
    values: list[Tensor],
    update: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    radius: float,
    *,
    restore_first: bool = False,
) -> tuple[list[Tensor], float]:
    """Both half steps of method and paper, on copies; head last and never perturbed."""

    def gradients(at: list[Tensor], rows: Tensor) -> tuple[list[Tensor], float]:
        leaves = [v.clone().requires_grad_() for v in at]
        up, down, head = leaves
        logits = (p.x[rows] @ down.T @ up.T).tanh() @ head.T
        loss = F.cross_entropy(logits, p.y[rows])
        return list(torch.autograd.grad(loss, leaves)), float(loss.detach())

    first, second = p.halves()
    total = 0.0
    for source, goal in ((first, second), (second, first)):
        g, _ = gradients(values, source)
        shift = [radius * x / x.norm() for x in g[:2]] + [torch.zeros_like(values[2])]
        moved = [v - s for v, s in zip(values, shift, strict=True)]
        g, loss = gradients(moved, goal)
        if restore_first:
            values = update(values, g)
        else:
            values = [v + s for v, s in zip(update(moved, g), shift, strict=True)]
        total += loss * len(goal) / len(p.y)
    return values, total


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
    torch.testing.assert_close(p.values(), values, rtol=1e-8, atol=1e-10)


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
    assert equal(p.values(), q.values())


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
    assert equal(p.values(), q.values())


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
    assert equal(p.values(), q.values())


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


@pytest.mark.parametrize("call", [0, 1, 2, 3])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_loss_leaves_no_shift_behind(call: int, failure: type[BaseException]) -> None:
    def after_failing_at(call: int) -> list[Tensor]:
        p, calls = Problem(), iter(range(4))

        def loss(rows: Tensor) -> Tensor:
            if next(calls) == call:
                raise failure(BROKEN)
            return p.loss(rows)

        with pytest.raises(failure, match=BROKEN):
            p.step(sgd(p.parameters), loss=loss)
        return p.values()

    # From the third call on the first half step is done, and stays.
    expected = Problem().values() if call < 2 else after_failing_at(2)
    assert equal(after_failing_at(call), expected)
    assert equal(expected, Problem().values()) == (call < 2)


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
        assert equal(p.values(), before)


def test_shift_that_is_not_finite_is_noticed_where_the_other_half_does_not_use_it() -> None:
    p = Problem(spare=True)
    before = p.values()
    first = p.halves()[0]

    def loss(rows: Tensor) -> Tensor:
        value = p.loss(rows)
        return value + (p.spare * math.nan).sum() if torch.equal(rows, first) else value

    done = p.step(SGD(p.parameters, lr=0.1), loss=loss, skip_nonfinite=True)
    assert done.steps == 0
    assert equal(p.values(), before)


def test_plain_step_skips_too() -> None:
    p = Problem()
    before = p.values()
    done = plain_step(
        lambda rows: p.loss(rows) * math.inf, p.y, sgd(p.parameters), skip_nonfinite=True
    )
    assert done.steps == 0
    assert equal(p.values(), before)
    assert plain_step(p.loss, p.y, sgd(p.parameters), skip_nonfinite=True).steps == 1


@pytest.mark.parametrize("radius", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize("one_class", [False, True])
def test_radius_is_checked_before_anything_moves(radius: float, one_class: bool) -> None:
    p = Problem()
    before = p.values()
    labels = torch.zeros_like(p.y) if one_class else p.y
    with pytest.raises(ValueError, match="radius"):
        p.step(sgd(p.parameters), radius, labels=labels)
    assert equal(p.values(), before)


def test_wrong_arguments_are_refused() -> None:
    p = Problem()
    optimizer = sgd(p.parameters)
    for permutation in ([0, 1, 2], [0, 1, 2, 3, 3]):
        with pytest.raises(ValueError, match="permutation"):
            p.step(optimizer, permutation=torch.tensor(permutation))
    with pytest.raises(ValueError, match="perturb"):
        gradient_aligned_step(p.loss, p.y, optimizer, [], radius=0.1, permutation=p.permutation)
