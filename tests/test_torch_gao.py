"""The gradient-aligned step against a plain one written out, and what it does on errors."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from backends.torch import (
    AlignedStep,
    Half,
    Halves,
    Part,
    draw_permutation,
    gradient_aligned_step,
    plain_step,
)
from loda_math import gradient_alignment, lookahead

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


# The look-ahead against its definition


def gradients_of_every_kind() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 1e-30, 1e30, 0.0)  # the square of the second underflows, of the third overflows
    return [s * torch.randn(5, 3, generator=generator) for s in scales]


def test_moves_and_alignment_are_those_of_the_mathematics() -> None:
    gradients = gradients_of_every_kind()
    tensors = [nn.Parameter(torch.randn(5, 3)) for _ in gradients]
    expected = lookahead([p.detach() for p in tensors], gradients, 0.4)
    optimizer = SGD(tensors, lr=0.0)
    places: list[list[Tensor]] = []

    def loss(rows: Tensor) -> Tensor:
        places.append([p.detach().clone() for p in tensors])
        sign = 1.0 if int(rows[0]) == 0 else -1.0
        return sign * sum((p * g).sum() for p, g in zip(tensors, gradients, strict=True))

    order = torch.tensor([0, 1])
    step = gradient_aligned_step(loss, order, optimizer, tensors, radius=0.4, permutation=order)
    torch.testing.assert_close(places[1], expected)
    assert step.alignment is not None
    assert float(step.alignment) == pytest.approx(-1.0)


@given(seed=seeds)
def test_alignment_is_the_cosine_of_the_two_gradients(seed: int) -> None:
    p = Problem(seed)
    values = []
    for source, goal in (p.halves(), p.halves()[::-1]):
        pair = [torch.autograd.grad(p.loss(rows), p.perturbed) for rows in (source, goal)]
        values.append(float(gradient_alignment(*pair)))
    step = p.step(SGD(p.parameters, lr=0.0), 0.0)  # neither moved nor stepped
    assert step.alignment is not None
    assert float(step.alignment) == pytest.approx(sum(values) / 2)


def test_source_loss_is_the_mean_loss_at_the_parameters_before() -> None:
    p = Problem()
    rows = torch.arange(16)
    step = p.step(SGD(p.parameters, lr=0.0), 0.7)
    assert step.source_loss is not None
    assert float(step.source_loss) == pytest.approx(float(p.loss(rows).detach()))
    assert float(step.loss) != pytest.approx(float(step.source_loss))
    plain = plain_step(p.loss, p.y, sgd(p.parameters))
    assert plain.source_loss is None
    assert plain.alignment is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_in_half_precision_move_and_come_back(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.randn(64).to(dtype))
    other = nn.Parameter(torch.randn(3, dtype=torch.float64))  # types may be mixed
    before, y, places = w.detach().clone(), torch.tensor([0, 1]), []

    def loss(rows: Tensor) -> Tensor:
        places.append(w.detach().float().clone())
        return ((w.float() - rows[0]) ** 2).sum() + (other**2).sum()

    tensors = [w, other]
    gradient_aligned_step(loss, y, SGD(tensors, lr=0.0), tensors, radius=0.5, permutation=y)
    assert float((places[1] - places[0]).norm()) == pytest.approx(0.5, rel=2e-2)
    assert torch.equal(w.detach(), before)


# Optimisers that miss the branches, losses that do not depend on them


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("held", ["none", "head", "some", "copies"])
def test_optimiser_that_misses_moved_tensors_is_refused(held: str, whole: bool) -> None:
    p = Problem()
    before = p.values()
    spare = nn.Parameter(torch.zeros(1))
    trained = {
        "none": [spare],
        "head": [p.head],
        "some": [p.up, p.head],
        "copies": [nn.Parameter(x.detach().clone()) for x in p.parameters],
    }[held]
    take = p.step if whole else partial(take_in_phases, p)
    with pytest.raises(ValueError, match="trainable_parameters"):  # the cure
        take(sgd(trained))
    assert equal(p.values(), before)


@pytest.mark.parametrize("one_class", [False, True])
@pytest.mark.parametrize("in_phases", [False, True])
def test_loss_that_depends_on_no_moved_tensor_is_an_error(one_class: bool, in_phases: bool) -> None:
    p = Problem()
    features = (p.x @ p.down.T @ p.up.T).tanh().detach()  # stored
    labels = torch.zeros_like(p.y) if one_class else p.y
    permutation = labels.unique()
    before = p.values()

    def loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(features[rows] @ p.head.T, p.y[rows])

    take = partial(take_in_phases, p) if in_phases else p.step
    with pytest.raises(RuntimeError, match="depends on no"):
        take(sgd(p.parameters), loss=loss, labels=labels, permutation=permutation)
    assert equal(p.values(), before)


def test_optimiser_that_takes_no_step_is_an_error() -> None:
    class Waiting:
        """As Accelerate wraps one while gradients are accumulated."""

        def __init__(self, inner: Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.inner.zero_grad(set_to_none)

        def step(self) -> None:
            pass

    p = Problem()
    before = p.values()
    with pytest.raises(RuntimeError, match="accumulated"):
        p.step(Waiting(sgd(p.parameters)))  # type: ignore[arg-type]
    assert equal(p.values(), before)


# Autocast


class Cast:
    """A product that autocast reaches, with float32 tensors."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.y = torch.randn(16, 8), torch.arange(16) % 4
        self.up, self.down = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 8))
        self.tensors = [self.up, self.down]

    def loss(self, rows: Tensor) -> Tensor:
        logits = F.linear(F.linear(self.x[rows], self.down), self.up)
        return F.cross_entropy(logits.float(), self.y[rows])

    def run(self, take: Callable[..., None], outside: bool) -> list[Tensor]:
        # Not autocast(enabled=False): inside it the cache would outlive the losses as well.
        autocast = torch.autocast("cpu", dtype=torch.bfloat16) if outside else nullcontext()

        def loss(rows: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.loss(rows)

        optimizer = SGD(self.tensors, lr=0.5)
        with autocast:
            for _ in range(3):
                if outside:
                    with torch.no_grad():  # an evaluation fills the cache with casts without graph
                        self.loss(torch.arange(16))
                take(self, optimizer, self.loss if outside else loss)
        return [p.detach().clone() for p in self.tensors]


def cast_whole(p: Cast, optimizer: Optimizer, loss: Any) -> None:
    order = torch.arange(4)
    gradient_aligned_step(loss, p.y, optimizer, p.tensors, radius=0.5, permutation=order)


def cast_plain(p: Cast, optimizer: Optimizer, loss: Any) -> None:
    plain_step(loss, p.y, optimizer)


def cast_in_phases(p: Cast, optimizer: Optimizer, loss: Any) -> None:
    halves = Halves(p.y, optimizer, p.tensors, radius=0.5, permutation=torch.arange(4))
    for half in halves:
        for part in half.source:
            loss(part.rows).backward()
        half.look_ahead()
        for part in half.target:
            loss(part.rows).backward()
        optimizer.step()
        half.restore()


@pytest.mark.parametrize("take", [cast_whole, cast_plain, cast_in_phases])
def test_autocast_around_the_step_is_autocast_inside_the_loss(take: Any) -> None:
    inside, around = Cast().run(take, outside=False), Cast().run(take, outside=True)
    assert equal(inside, around)


# The step in phases


def take_in_phases(
    p: Problem,
    optimizer: Optimizer | list[Optimizer],
    radius: float = 0.3,
    *,
    loss: Any = None,
    labels: Any = None,
    permutation: Tensor | None = None,
    between: Callable[[Half], None] = lambda _: None,
    sizes: tuple[int, ...] = (16,),
) -> Halves:
    """The step over a window of mini-batches; ``between`` is called before the optimisers step."""
    loss = loss or p.loss
    labels = p.y if labels is None else labels
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    window = [labels[a : a + n] for a, n in zip(starts, sizes, strict=True)]
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    halves = Halves(
        window,
        optimizers,
        p.perturbed,
        radius=radius,
        permutation=p.permutation if permutation is None else permutation,
    )
    for half in halves:
        for part in half.source:
            (part.weight * loss(part.rows + starts[part.batch])).backward()
        half.look_ahead()
        for part in half.target:
            (part.weight * loss(part.rows + starts[part.batch])).backward()
        between(half)
        for one in optimizers:
            one.step()
        half.restore()
    return halves


@pytest.mark.parametrize("sizes", [(16,), (4, 4, 4, 4), (1, 9, 6), (15, 1)])
@pytest.mark.parametrize("make", [sgd, adamw])
@given(seed=seeds)
def test_step_in_phases_is_the_step(make: Make, sizes: tuple[int, ...], seed: int) -> None:
    p, q = Problem(seed), Problem(seed)
    optimizer, other = make(p.parameters), make(q.parameters)
    for _ in range(2):
        step = p.step(optimizer)
        halves = take_in_phases(q, other, sizes=sizes)
        assert halves.steps == step.steps == 2
        torch.testing.assert_close(halves.alignment, step.alignment, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(p.values(), q.values(), rtol=1e-9, atol=1e-12)
    if len(sizes) == 1:
        assert equal(p.values(), q.values())


def test_gradients_from_before_and_those_on_the_source_do_not_reach_the_optimiser() -> None:
    p, q = Problem(), Problem()
    p.loss(torch.arange(16)).backward()
    stray = nn.Parameter(torch.zeros(2))
    stray.grad = torch.ones(2)
    seen: list[Tensor] = []
    take_in_phases(p, sgd([*p.parameters, stray]), between=lambda _: seen.append(p.head.grad))
    take_in_phases(q, sgd(q.parameters))
    assert equal(p.values(), q.values())
    assert not torch.count_nonzero(stray)
    # The head takes part in the target only.
    r = Problem()
    with_hands = by_hand(r, r.values(), PlainSGD(), 0.3)[0]
    torch.testing.assert_close(p.values(), with_hands, rtol=1e-8, atol=1e-10)


def test_gradients_may_be_clipped_and_several_optimisers_step() -> None:
    p, q = Problem(), Problem()
    separate = [SGD(p.perturbed, lr=0.05), SGD([p.head], lr=0.05)]
    together = SGD(q.parameters, lr=0.05)
    norms: list[float] = []

    def clip(problem: Problem) -> Callable[[Half], None]:
        def between(half: Half) -> None:
            half.share()
            norms.append(float(nn.utils.clip_grad_norm_(problem.parameters, 0.01)))

        return between

    halves = take_in_phases(p, separate, between=clip(p))
    take_in_phases(q, together, between=clip(q))
    assert halves.steps == 2
    assert min(norms) > 0.01
    assert equal(p.values(), q.values())
    start = Problem().values()
    for now, before in zip(p.values(), start, strict=True):
        assert 0 < float((now - before).norm()) <= 0.0011


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", ["source", "target"])
def test_a_step_that_a_scaler_skips_leaves_no_trace(bad: str, fused: bool) -> None:
    """A fused optimiser skips the step by itself, with a flag on the device."""
    torch.manual_seed(0)
    w, head = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
    before = [w.detach().clone(), head.detach().clone()]
    optimizer = SGD([w, head], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    halves = Halves(
        torch.tensor([0, 1]), optimizer, [w], radius=0.5, permutation=torch.tensor([0, 1])
    )
    scales = []
    for half in halves:

        def loss(overflows: bool) -> Tensor:
            value = (w**2).sum() + (w * head).sum()
            return value * math.inf if overflows else value

        scaler.scale(loss(bad == "source")).backward()
        half.look_ahead()
        scaler.scale(loss(bad == "target")).backward()
        half.share()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        half.restore()
        scales.append(scaler.get_scale())
    assert fused or halves.steps == 0
    assert scales == [2.0**15, 2.0**14]
    assert torch.equal(w, before[0])
    assert torch.equal(head, before[1])


def test_a_step_with_scaled_losses_is_the_step() -> None:
    p, q = Problem(), Problem()
    optimizer, scaler = sgd(p.parameters), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for half in Halves(p.y, optimizer, p.perturbed, radius=0.3, permutation=p.permutation):
        for part in half.source:
            scaler.scale(p.loss(part.rows)).backward()
        half.look_ahead()
        for part in half.target:
            scaler.scale(p.loss(part.rows)).backward()
        scaler.step(optimizer)
        half.restore()
        scaler.update()
    q.step(sgd(q.parameters))
    torch.testing.assert_close(p.values(), q.values())


def test_an_optimiser_with_a_closure_steps_on_the_target() -> None:
    p, q = Problem(), Problem()
    optimizer = torch.optim.LBFGS(p.parameters, lr=0.1, max_iter=1)
    seen: list[Tensor] = []
    for half in Halves(p.y, optimizer, p.perturbed, radius=0.3, permutation=p.permutation):

        def backward(parts: list[Part]) -> Tensor:
            for part in parts:
                optimizer.zero_grad()
                value = p.loss(part.rows)
                value.backward()
            return value.detach()

        backward(half.source)
        half.look_ahead()
        optimizer.step(partial(backward, half.target))
        half.restore()
        seen.append(p.values())
    rows = torch.arange(16)
    assert float(p.loss(rows).detach()) < float(q.loss(rows).detach())


@pytest.mark.parametrize("groups", [8, torch.arange(8) * 0 + 5])
def test_one_group_is_a_plain_step_and_a_number_a_random_split(groups: Any) -> None:
    w = nn.Parameter(torch.zeros(8, dtype=torch.float64))
    order = torch.tensor([5]) if isinstance(groups, Tensor) else torch.randperm(8)
    optimizer = SGD([w], lr=0.1)
    halves, rows = Halves(groups, optimizer, [w], radius=0.3, permutation=order), []
    for half in halves:
        for part in half.source:
            ((w[part.rows] - 1) ** 2).mean().backward()
        half.look_ahead()
        for part in half.target:
            rows += part.rows.tolist()
            ((w[part.rows] - 1) ** 2).mean().backward()
        optimizer.step()
        half.restore()
    assert sorted(rows) == list(range(8))
    assert half.last
    if isinstance(groups, Tensor):
        assert halves.steps == 1
        assert halves.alignment is None
        torch.testing.assert_close(w.detach(), torch.full((8,), 0.025, dtype=torch.float64))
    else:
        assert halves.steps == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_groups_may_be_any_integers(dtype: torch.dtype) -> None:
    p, q = Problem(), Problem()
    p.step(sgd(p.parameters))
    if dtype == torch.int64:
        names = torch.tensor([-7, 12345678, 0, 3])
    else:
        names = torch.tensor([70, 12, 0, 3])
    take_in_phases(
        q, sgd(q.parameters), labels=names[q.y].to(dtype), permutation=names[q.permutation]
    )
    assert equal(p.values(), q.values())


@pytest.mark.parametrize(
    ("groups", "failure"),
    [
        (torch.full((4,), 0.5), TypeError),
        ([], ValueError),
        (0, ValueError),
        ([3, torch.arange(2)], ValueError),
        ([0, 1, 0, 1], ValueError),  # labels of one mini-batch, not four numbers of rows
        (torch.arange(4)[:, None], ValueError),
        (torch.tensor(4), ValueError),
        (torch.arange(4).numpy(), TypeError),
        ([[0, 1], [0, 1]], TypeError),
        (None, TypeError),
        (True, TypeError),
        (-4, ValueError),
    ],
    ids=str,
)
def test_groups_that_are_none_are_refused(groups: Any, failure: type[Exception]) -> None:
    w = nn.Parameter(torch.zeros(2))
    with pytest.raises(failure):
        Halves(groups, SGD([w], lr=0.1), [w], radius=0.1, permutation=torch.arange(4))


@pytest.mark.parametrize("at", ["source", "target", "step"])
def test_error_in_the_loop_puts_everything_back(at: str) -> None:
    p = Problem()
    before = p.values()

    def loss(rows: Tensor) -> Tensor:
        moved = not torch.equal(p.up, before[0])
        if at == ("target" if moved else "source"):
            raise RuntimeError(BROKEN)
        return p.loss(rows)

    def between(_: Half) -> None:
        if at == "step":
            raise RuntimeError(BROKEN)

    with pytest.raises(RuntimeError, match=BROKEN):
        take_in_phases(p, sgd(p.parameters), loss=loss, between=between)
    assert equal(p.values(), before)
    sgd(p.parameters).step()  # no longer watched


def test_calls_out_of_order_are_errors() -> None:
    p = Problem()
    before = p.values()
    optimizer = sgd(p.parameters)

    def halves() -> Halves:
        return Halves(p.y, optimizer, p.perturbed, radius=0.1, permutation=p.permutation)

    def gradients(parts: list[Part]) -> None:
        for part in parts:
            p.loss(part.rows).backward()

    def too_soon(call: str) -> None:
        for half in halves():
            gradients(half.source)
            getattr(half, call)()

    def step_too_soon() -> None:
        for half in halves():
            gradients(half.source)
            optimizer.step()

    def forgotten() -> None:
        for half in halves():
            gradients(half.source)
            half.look_ahead()
            gradients(half.target)
            optimizer.step()

    def twice() -> None:
        for half in halves():
            gradients(half.source)
            half.look_ahead()
            half.look_ahead()

    for call in (
        lambda: too_soon("share"), lambda: too_soon("restore"), step_too_soon, forgotten, twice,
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="restore"):
            call()
    assert equal(p.values()[:2], before[:2])
    used = take_in_phases(p, optimizer)
    with pytest.raises(RuntimeError, match="once"):
        next(iter(used))


def test_what_accelerate_accumulates_is_an_error_and_the_window_is_not() -> None:
    accelerate = pytest.importorskip("accelerate")
    p, q = Problem(), Problem()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    optimizer = accelerator.prepare(sgd(p.parameters))
    before = p.values()
    for call in (
        lambda: p.step(optimizer, backward=accelerator.backward),
        lambda: take_in_phases(p, optimizer),
    ):
        with (
            accelerator.accumulate(nn.Linear(1, 1)),
            pytest.raises(RuntimeError, match="ccumulat"),
        ):
            call()
    assert equal(p.values(), before)
    for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState):
        state._reset_state()
    plain = accelerate.Accelerator(cpu=True)
    take_in_phases(p, plain.prepare(sgd(p.parameters)), sizes=(4, 4, 4, 4))
    q.step(sgd(q.parameters))
    torch.testing.assert_close(p.values(), q.values(), rtol=1e-9, atol=1e-12)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_trainer_may_take_the_step_of_the_last_half() -> None:
    p, q = Problem(), Problem()
    optimizer = sgd(p.parameters)
    halves = Halves(p.y, optimizer, p.perturbed, radius=0.3, permutation=p.permutation)
    steps = iter(halves)
    for half in steps:
        for part in half.source:
            p.loss(part.rows).backward()
        half.look_ahead()
        for part in half.target:
            p.loss(part.rows).backward()
        if half.last:
            break
        optimizer.step()
        half.restore()
    assert half.in_progress  # out of the loop, while somebody holds it
    optimizer.step()
    half.restore()
    q.step(sgd(q.parameters))
    assert equal(p.values(), q.values())
    assert halves.steps == 2
