"""Read-outs: statistics, heads, alignment, ridge, and the collection that a training loop holds."""

from typing import Any, ClassVar

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends.torch.readouts import (
    READOUTS,
    Alignment,
    Classifier,
    ClassStatistics,
    Compensated,
    CompensatedStatistics,
    CosineClassifier,
    CosineHead,
    CosineHeads,
    Heads,
    NearestMean,
    Readout,
    Readouts,
    Ridge,
    RidgeStatistics,
    TaskStatistics,
    alignment_loss,
    class_mean_start,
    solve_ridge,
)
from backends.torch.readouts.alignment import chosen_diagonal

SIZES = (2, 3, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_up(images: int = 40, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Elongated classes on a common offset: nearest mean fails where a linear rule need not."""
    g = seeded(seed)
    shapes = torch.Generator().manual_seed(99)
    classes = sum(SIZES)
    stretch = torch.randn(dim, dim, generator=shapes) * torch.logspace(0, -1.5, dim)
    means = 0.8 * torch.randn(classes, dim, generator=shapes) @ stretch + 2.0
    y = torch.arange(classes).repeat(images)
    return means[y] + torch.randn(len(y), dim, generator=g) @ stretch, y


def by_task(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    ends = [sum(SIZES[: k + 1]) for k in range(len(SIZES))]
    parts = []
    for end, size in zip(ends, SIZES, strict=True):
        mask = (y >= end - size) & (y < end)
        parts.append((x[mask], y[mask], size))
    return parts


def gathered(x: Tensor, y: Tensor, statistics: Any = None) -> Any:
    """Statistics of all tasks, those of the classes by default."""
    statistics = statistics or ClassStatistics()
    for features, labels, size in by_task(x, y):
        statistics.add_task(features, labels, size)
    return statistics


def accuracy(classifier: Classifier, x: Tensor, y: Tensor) -> float:
    return (classifier.logits(x).argmax(1) == y).float().mean().item()


def align(
    statistics: ClassStatistics, seed: int = 0, weight: Tensor | None = None, **options: Any
) -> CosineClassifier:
    return Alignment(**options).fit(statistics, generator=seeded(seed), head_weight=weight)


# Statistics


def moved(statistics: ClassStatistics, tasks: int = 3, **drift: Any) -> ClassStatistics:
    """Statistics of a stream in which every task moves all features by `drifted`."""
    parts = by_task(*made_up())[:tasks]
    for number, (features, labels, size) in enumerate(parts):
        statistics.begin(drifted(features, max(number - 1, 0), **drift))
        statistics.add_task(drifted(features, number, **drift), labels, size)
    return statistics


def drifted(x: Tensor, times: int, turn: float = 0.3, curve: float = 0.0) -> Tensor:
    """Features after a number of tasks: turned, stretched, shifted, and bent a little."""
    g = seeded(7)
    matrix = torch.eye(12) + turn * torch.randn(12, 12, generator=g) / 12**0.5
    for _ in range(times):
        x = x @ matrix + turn + curve * x.square()
    return x


def test_statistics_follow_a_drift_that_is_affine() -> None:
    x, y = made_up()
    expected = gathered(drifted(x, 2), y)  # of the images of all tasks, through the last network
    stale, followed = moved(ClassStatistics()), moved(CompensatedStatistics())
    for name in ("mean", "covariance"):
        want, old, new = (getattr(s, name)[:2] for s in (expected, stale, followed))
        assert (new - want).norm() < 0.1 * (old - want).norm(), name
    assert torch.equal(followed.count, expected.count)
    # Classes of the last task are as they are in both.
    assert torch.equal(followed.mean[-1], stale.mean[-1])


def test_a_drift_that_is_not_affine_is_followed_in_part() -> None:
    x, y = made_up()
    expected = gathered(drifted(x, 2, curve=0.03), y).mean[:2]
    stale, followed = (
        moved(kind(), curve=0.03).mean[:2] for kind in (ClassStatistics, CompensatedStatistics)
    )
    assert (followed - expected).norm() < 0.5 * (stale - expected).norm()


def test_without_a_drift_nothing_moves_by_a_bit() -> None:
    still = moved(CompensatedStatistics(), turn=0.0)
    assert torch.equal(still.mean, moved(ClassStatistics(), turn=0.0).mean)
    assert torch.equal(still.covariance, moved(ClassStatistics(), turn=0.0).covariance)


@pytest.mark.parametrize("images", [1, 3])
def test_few_images_move_old_classes_only_as_far_as_they_show(images: int) -> None:
    x, y = made_up()
    statistics = CompensatedStatistics()
    statistics.add_task(x[y < 2], y[y < 2])
    old = statistics.mean.clone()
    new = x[y == 2][:images]
    statistics.begin(new)
    statistics.add_task(new + 5.0, torch.full((images,), 2))
    torch.testing.assert_close(statistics.mean[:2], old + 5.0, rtol=0.0, atol=1e-3)
    assert statistics.covariance.isfinite().all()


@pytest.mark.parametrize("images", [20, 42, 60, 400])
def test_old_classes_do_not_follow_noise(images: int) -> None:
    # About as many images as features: a map that fits them exactly says nothing about old classes.
    g = seeded(3)
    old, new = torch.randn(50, 40, generator=g), torch.randn(images, 40, generator=g) + 1
    seen = new + 0.3 * torch.randn(images, 40, generator=g)
    statistics = CompensatedStatistics()
    statistics.add_task(old, torch.zeros(50, dtype=torch.int64))
    before = statistics.mean[0].clone()
    statistics.begin(new)
    statistics.add_task(seen, torch.ones(images, dtype=torch.int64))
    exact = torch.linalg.lstsq(new - new.mean(0), seen - seen.mean(0)).solution
    thrown = (before - new.mean(0)) @ exact + seen.mean(0) - before
    assert (statistics.mean[0] - before).norm() < (0.5 if images < 100 else 0.9) * thrown.norm()


@pytest.mark.parametrize("images", [6, 12, 40, 200])
@pytest.mark.parametrize("noise", [0.01, 0.3, 3.0])
def test_the_map_of_a_drift_is_the_most_likely(images: int, noise: float) -> None:
    g, dim = seeded(images), 12
    old, new, turn, error = (
        torch.randn(n, dim, generator=g, dtype=torch.float64) for n in (5, images, dim, images)
    )
    after = new + 0.3 * new @ turn + noise * error + 2.0
    statistics = CompensatedStatistics(dtype=torch.float64)
    statistics.add_task(old, torch.zeros(5, dtype=torch.int64))
    statistics.begin(new)
    statistics.add_task(after, torch.ones(images, dtype=torch.int64))
    # Oracle: the likelihood of the centred change, whose columns have the covariance
    # s² (I + B Bᵀ / τ) in N - 1 dimensions, at its best s².
    b = new - new.mean(0)
    change = after - after.mean(0) - b
    basis = torch.linalg.svd(torch.eye(images, dtype=torch.float64) - 1 / images)[0][:, :-1]
    rows, changed = basis.mT @ b, basis.mT @ change
    loss = {}
    for power in range(4, -5, -1):
        ridge = 10 ** (power / 2) * b.square().sum() / dim
        spread = torch.eye(images - 1, dtype=torch.float64) + rows @ rows.mT / ridge
        size = (changed * torch.linalg.solve(spread, changed)).sum() / changed.numel()
        loss[float(ridge)] = changed.numel() * size.log() + dim * torch.linalg.slogdet(spread)[1]
    best = min(loss, key=loss.__getitem__)
    move = torch.linalg.solve(b.mT @ b + best * torch.eye(dim, dtype=torch.float64), b.mT @ change)
    shift = old.mean(0) - new.mean(0)
    torch.testing.assert_close(statistics.mean[0], after.mean(0) + shift + shift @ move)


@given(power=st.floats(-3, 3), seed=st.integers(0, 100))
def test_a_followed_drift_does_not_depend_on_the_axes_or_the_scale(power: float, seed: int) -> None:
    x, _ = made_up()
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=seeded(seed), dtype=torch.float64))
    first, second, labels = x[:40].double(), x[80:160].double(), torch.zeros(40, dtype=torch.int64)
    after = drifted(second.float(), 1, curve=0.1).double()
    followed = []
    for change in (torch.eye(12, dtype=torch.float64), turn * 10**power):
        statistics = CompensatedStatistics(dtype=torch.float64)
        statistics.add_task(first @ change, labels)
        statistics.begin(second @ change)
        statistics.add_task(after @ change, torch.ones(80, dtype=torch.int64))
        followed.append(statistics)
    plain, other = followed
    torch.testing.assert_close(
        other.mean, plain.mean @ turn * 10**power, rtol=1e-6, atol=1e-6 * 10**power
    )


def test_features_from_before_a_task_are_needed_for_compensation() -> None:
    statistics = CompensatedStatistics()
    (first, *_), (second, labels, size), _ = by_task(*made_up())
    statistics.add_task(first, torch.arange(2).repeat(40))
    with pytest.raises(ValueError, match="begin_task"):
        statistics.add_task(second, labels, size)
    other = moved(CompensatedStatistics(), 1)
    other.begin(second[:-1])
    with pytest.raises(ValueError, match="same images"):
        other.add_task(second, labels, size)
    with pytest.raises(ValueError, match="wide"):
        other.begin(second[:, 1:])


def test_an_open_task_is_stored_with_the_features_from_before_it(tmp_path: Any) -> None:
    whole, again = moved(CompensatedStatistics(), 2), CompensatedStatistics()
    features, labels, size = by_task(*made_up())[2]
    whole.begin(drifted(features, 1))
    save_file(whole.state_dict(), tmp_path / "state")
    again.load_state_dict(load_file(tmp_path / "state"))
    for statistics in (whole, again):
        statistics.add_task(drifted(features, 2), labels, size)
    assert same(whole.state_dict(), again.state_dict())


@given(
    cuts=st.lists(st.integers(1, 59), max_size=5, unique=True),
    offset=st.sampled_from([0.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_streaming_statistics_equal_the_definition(
    cuts: list[int], offset: float, dtype: torch.dtype
) -> None:
    x = torch.randn(60, 5, generator=seeded(), dtype=torch.float64).to(dtype) + offset
    y = torch.randint(0, 3, (60,), generator=seeded(1))
    statistics = ClassStatistics(dtype=torch.float64)
    for part in torch.arange(60).tensor_split(sorted(cuts)):
        statistics.collect(x[part], y[part])
    statistics.end_task(3)
    for label in range(3):
        rows = x[y == label].double()
        assert int(statistics.count[label]) == len(rows)
        torch.testing.assert_close(statistics.mean[label], rows.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            statistics.covariance[label], torch.cov(rows.T), rtol=1e-9, atol=1e-9
        )


def test_finished_classes_are_never_refreshed() -> None:
    x, y = made_up()
    statistics = gathered(x, y)
    first = ClassStatistics()
    first.add_task(*by_task(x, y)[0])
    assert torch.equal(statistics.mean[:2], first.mean)
    assert torch.equal(statistics.covariance[:2], first.covariance)
    with pytest.raises(ValueError, match="finished"):
        statistics.collect(x[:1], torch.tensor([0]))


@given(
    cut=st.integers(0, 59),
    offset=st.sampled_from([0.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_new_images_of_finished_classes_count_as_if_they_had_come_at_once(
    cut: int, offset: float, dtype: torch.dtype
) -> None:
    x = torch.randn(60, 5, generator=seeded(), dtype=torch.float64) + offset
    y = torch.arange(60) % 3
    order = torch.cat([torch.arange(3), 3 + torch.randperm(57, generator=seeded(cut))])
    first, later = order[: max(cut, 3)], order[max(cut, 3) :]  # every class has a first image
    statistics = ClassStatistics(dtype=dtype)
    statistics.add_task(x[first], y[first])
    statistics.update(x[later], y[later])
    wide = dtype == torch.float64
    for label in range(3):
        rows = x[y == label]
        assert int(statistics.count[label]) == len(rows)
        for measured, expected in (
            (statistics.mean[label], rows.mean(0)),
            (statistics.covariance[label], torch.cov(rows.T)),
        ):
            # A mean stored in float32 has the rounding of the offset, which moves the covariance.
            rtol, atol = (1e-9, 1e-9) if wide else (1e-3, 1e-6 * max(offset, 1))
            torch.testing.assert_close(measured.double(), expected, rtol=rtol, atol=atol)
    assert statistics.mean.dtype == dtype


def test_new_images_enter_the_sums_of_the_ridge() -> None:
    x, y = made_up()
    y = y.sort().values  # any classes will do
    keep = torch.arange(len(y)) % 3 != 0
    updated, at_once = (RidgeStatistics(x.shape[1], features=50, seed=3) for _ in range(2))
    updated.add_task(x[keep], y[keep])
    updated.update(x[~keep], y[~keep])
    at_once.add_task(x, y)
    at_once.strength = updated.strength
    torch.testing.assert_close(
        Ridge().fit(updated).weight, Ridge().fit(at_once).weight, rtol=1e-8, atol=1e-10
    )


def test_an_update_is_of_finished_classes_between_tasks() -> None:
    x, y = made_up()
    readouts = Readouts([NearestMean(), Ridge(features=20)], dim=x.shape[1])
    readouts.add_task(*by_task(x, y)[0])
    before = {name: s.state_dict() for name, s in readouts.statistics.items()}
    with pytest.raises(ValueError, match="from 0 to 1"):
        readouts.update(x[:2], torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        readouts.update(x[:2], torch.tensor([0, -1]))
    readouts.update(x[:0], y[:0])  # no image changes nothing
    after = {name: s.state_dict() for name, s in readouts.statistics.items()}
    for name, state in before.items():
        assert all(torch.equal(after[name][key], tensor) for key, tensor in state.items())
    statistics = ClassStatistics()
    statistics.add_task(*by_task(x, y)[0])
    statistics.collect(x[:1], torch.tensor([2]))
    with pytest.raises(ValueError, match="end_task"):
        statistics.update(x[:1], torch.tensor([0]))


def test_statistics_of_ones_own_may_refuse_new_images() -> None:
    class Counts(TaskStatistics):
        def gather(self, features: Tensor, labels: Tensor) -> None: ...
        def finish(self, first: int, end: int) -> None: ...
        def tensors(self) -> dict[str, Tensor]:
            return {}

        def load(self, tensors: Any, classes: int) -> None: ...

    counts = Counts()
    counts.add_task(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="Counts"):
        counts.update(torch.ones(1, 3), torch.tensor([0]))


@pytest.mark.parametrize("kind", ["class", "ridge"])
def test_bad_features_are_refused(kind: str) -> None:
    statistics = ClassStatistics() if kind == "class" else RidgeStatistics(3, features=8)
    good, labels = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="1 of 4"):
            statistics.collect(broken, labels)
    with pytest.raises(ValueError, match="at least 0"):
        statistics.collect(good, labels - 1)
    with pytest.raises(ValueError, match="floating"):
        statistics.collect(good[None], labels)
    with pytest.raises(ValueError, match="integers"):
        statistics.collect(good, labels.float())
    with pytest.raises(ValueError, match="class"):
        statistics.end_task()
    statistics.collect(good, labels)
    with pytest.raises(ValueError, match="end_task"):
        statistics.state_dict()
    with pytest.raises(ValueError, match="wide"):
        statistics.collect(torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\[2\]"):
        statistics.end_task(3)
    with pytest.raises(ValueError, match=r"\[1\]"):
        statistics.end_task(1)
    statistics.end_task(2)
    assert statistics.task_sizes == (2,)


def test_alignment_loss_is_the_definition() -> None:
    cosines = torch.randn(5, 6, generator=seeded(), dtype=torch.float64)
    labels = torch.tensor([0, 5, 2, 3, 1])
    total = 0.0
    for row, label in zip(cosines, labels.tolist(), strict=True):
        norm = (row[:2].norm() + row[2:5].norm() + row[5:].norm()) / 3
        logits = row / norm / 0.2
        total -= (logits[label] - logits.logsumexp(0)).item() / 5
    loss = alignment_loss(cosines, labels, SIZES, 0.2)
    assert loss.item() == pytest.approx(total, rel=1e-6)
    # Only the direction of the logits counts.
    assert alignment_loss(7 * cosines, labels, SIZES, 0.2).item() == pytest.approx(total, rel=1e-5)


def test_converged_alignment_is_much_better_than_nearest_mean() -> None:
    statistics = gathered(*made_up())
    x, y = made_up(images=300, seed=1)
    aligned = align(statistics)
    # Oracle: the best rule for these classes, which share one covariance, is linear; it has a
    # bias, which cosines lack.
    covariance = statistics.covariance.double().mean(0)
    mean = statistics.mean.double()
    w = torch.linalg.solve(covariance, mean.T)
    best = (x.double() @ w - (mean.T * w).sum(0) / 2).argmax(1)
    best_accuracy = (best == y).float().mean().item()
    assert accuracy(aligned, x, y) > accuracy(NearestMean().fit(statistics), x, y) + 0.15
    assert accuracy(aligned, x, y) > best_accuracy - 0.05


def normal_shapes(
    dim: int, classes: int, decay: float, distance: float, g: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Means of classes (C, D), and the standard deviations (D,) that they share."""
    spread = torch.logspace(0, decay, dim)
    means = distance * torch.randn(classes, dim, generator=g) * spread / spread.norm() + 1
    return means, spread


def normal_classes(
    dim: int, classes: int, images: int, decay: float, distance: float = 1.5
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes of one shape, whose standard deviations fall to 10^decay; few images and 300 more."""
    g = seeded(dim + images)
    means, spread = normal_shapes(dim, classes, decay, distance, g)
    sets = []
    for count in (images, 300):
        y = torch.arange(classes).repeat(count)
        sets += [means[y] + torch.randn(len(y), dim, generator=g) * spread, y]
    return sets[0], sets[1], sets[2], sets[3]


@pytest.mark.parametrize(
    ("dim", "classes", "images", "decay", "distance"),
    [
        (100, 5, 8, 0.0, 4.0),
        (100, 5, 8, -2.0, 1.5),
        (100, 20, 10, -1.0, 1.5),
        (40, 5, 200, -2.0, 1.5),
        (20, 8, 40, -1.5, 1.5),
    ],
)
def test_the_diagonal_that_alignment_chooses_is_near_the_best(
    dim: int, classes: int, images: int, decay: float, distance: float
) -> None:
    x, y, new, labels = normal_classes(dim, classes, images, decay, distance)
    statistics = ClassStatistics()
    statistics.add_task(x, y)
    unit = float(x.var(0).mean())

    def right(alignment: Alignment) -> float:
        return accuracy(alignment.fit(statistics, generator=seeded()), new, labels)

    fixed = [right(Alignment(covariance=unit * 10.0**power)) for power in range(-3, 2)]
    assert right(Alignment()) > max(fixed) - 0.05
    assert max(fixed) - min(fixed) > 0.08  # or else the choice would not matter


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_refused_task_leaves_nothing_behind(dtype: torch.dtype) -> None:
    x, y, new, labels = normal_classes(12, 4, 20, 0.0, 4.0)
    first, second = y < 2, y >= 2
    readouts, right = (Readouts([Compensated(), Ridge(20)], dim=12) for _ in range(2))
    for each in (readouts, right):
        each.add_task(x[first], y[first].to(dtype))
    with pytest.raises(ValueError, match="begin_task"):  # forgotten
        readouts.add_task(x[second], y[second])
    for each in (readouts, right):
        each.begin_task(x[second])
    with pytest.raises(ValueError, match="every class"):
        readouts.add_task(x[second], y[second], 3)
    for each in (readouts, right):
        each.add_task(x[second] + 1, y[second].to(dtype), 2)
        each.update(new[labels == 0], labels[labels == 0].to(dtype))
    assert same(readouts.state_dict(), right.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "images"), [(2, 5), (2, 10), (5, 5), (10, 5), (2, 40)])
@pytest.mark.parametrize("readout", [Alignment, Compensated])
def test_few_images_of_many_features_are_learned(
    readout: type[Alignment], classes: int, images: int, dtype: torch.dtype
) -> None:
    x, y, new, labels = normal_classes(200, classes, images, 0.0, 7.0)
    readouts = Readouts([readout(), NearestMean()], dim=200)
    readouts.add_task(x.to(dtype), y)
    fitted = readouts.fit()
    right = {name: accuracy(f, new.to(dtype), labels) for name, f in fitted.items()}
    assert right["nearest_mean"] > 0.9  # the classes are far apart
    assert right[readout.name] > right["nearest_mean"] - 0.05


def validated(x: Tensor, y: Tensor) -> tuple[float, list[float]]:
    """The diagonal by cross-validation with the hat matrix of the images, and all scores."""
    x = x.double() - x.double().mean(0)
    indicators = torch.eye(int(y.max()) + 1, dtype=torch.float64)[y]
    indicators = indicators - indicators.mean(0)
    gram = x @ x.mT  # the same hat matrix with as many rows as images
    unit = float(gram.trace()) / x.shape[1]
    scores = {}
    for power in range(2, -9, -1):
        ridge = unit * 10 ** (power / 2)
        eye = torch.eye(len(x), dtype=torch.float64)
        left = ridge * torch.linalg.inv(gram + ridge * eye)  # I - H, but for the mean
        freedom = float(left.trace()) - 1
        scores[ridge / len(x)] = float((left @ indicators).square().sum()) / freedom**2
    return min(scores, key=scores.__getitem__), sorted(scores.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "decay"), [(20, -1.0), (100, 0.0), (100, -1.0), (300, -1.5)])
@pytest.mark.parametrize("seed", range(4))
def test_alignment_chooses_by_cross_validation(
    dim: int, decay: float, seed: int, dtype: torch.dtype
) -> None:
    g = seeded(seed)
    y = torch.arange(4).repeat_interleave(torch.tensor([5, 30, 10, 15]))
    means, spread = normal_shapes(dim, 4, decay, 2.0, g)
    x = means[y] + torch.randn(len(y), dim, generator=g) * spread
    best, scores = validated(x, y)
    statistics = ClassStatistics(dtype=dtype)
    statistics.add_task(x.to(dtype), y)
    assert scores[1] > (1 + 1e-5) * scores[0]  # the best is no tie
    assert chosen_diagonal(statistics) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_of_equal_diagonals_the_strongest_is_chosen(seed: int) -> None:
    x = torch.randn(2, 10, generator=seeded(seed))  # one image of either class: all score the same
    statistics = ClassStatistics()
    statistics.add_task(x, torch.tensor([0, 1]))
    variance = (x - x.mean(0)).square().sum() / 10
    assert chosen_diagonal(statistics) == pytest.approx(float(10 * variance / 2), rel=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_features_does_not_matter_to_alignment(scale: float) -> None:
    x, y, new, _ = normal_classes(40, 5, 20, -1.0)
    decided = []
    for factor in (1.0, scale):
        statistics = ClassStatistics()
        statistics.add_task(x * factor, y)
        fitted = Alignment().fit(statistics, generator=seeded())
        decided.append(fitted.logits(new * factor).argmax(1))
    assert (decided[0] == decided[1]).float().mean() > 0.99


def test_converged_alignment_depends_on_statistics_and_generator_alone() -> None:
    statistics = gathered(*made_up())
    weight = align(statistics).weight
    assert torch.equal(weight, align(statistics).weight)
    start = torch.randn(6, 12, generator=seeded(4))
    assert torch.equal(weight, align(statistics, weight=start).weight)
    other = align(statistics, 1).weight
    assert not torch.equal(weight, other)
    # Another draw converges to the same rule.
    x, _ = made_up(images=100, seed=1)
    votes = [CosineClassifier(w).logits(x).argmax(1) for w in (weight, other)]
    assert (votes[0] == votes[1]).float().mean() > 0.95


def test_the_published_schedule() -> None:
    """A second, plain implementation of the table row, with the same draws."""
    statistics = gathered(*made_up(), ClassStatistics(dtype=torch.float64))
    start = torch.randn(6, 12, generator=seeded(7), dtype=torch.float64)
    weight = align(statistics, weight=start, epochs=5, temperature=0.2).weight

    g = seeded()
    w = start.clone().requires_grad_()
    momentum = torch.zeros_like(w)
    task_of = [0, 0, 1, 1, 1, 2]
    for epoch in range(5):
        noise = torch.randn(6, 256, 12, generator=g, dtype=torch.float64)
        samples = []
        for c in range(6):
            factor = torch.linalg.cholesky(
                statistics.covariance[c] + 1e-3 * torch.eye(12, dtype=torch.float64)
            )
            mean = statistics.mean[c] * (0.9 + 0.1 * (task_of[c] + 1) / 3)
            samples.append(mean + noise[c] @ factor.T)
        order = torch.randperm(6 * 256, generator=g)
        x, y = torch.cat(samples)[order], (order // 256)
        lr = 0.01 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 5)).item())
        for step in range(6):
            rows = slice(256 * step, 256 * (step + 1))
            unit = x[rows] / x[rows].norm(dim=1, keepdim=True)
            cosines = unit @ (w / w.norm(dim=1, keepdim=True)).T
            norms = (
                cosines[:, :2].norm(dim=1) + cosines[:, 2:5].norm(dim=1) + cosines[:, 5].abs()
            ) / 3
            loss = torch.nn.functional.cross_entropy(cosines / norms[:, None] / 0.2, y[rows])
            (grad,) = torch.autograd.grad(loss, w)
            with torch.no_grad():
                momentum = 0.9 * momentum + grad + 5e-4 * w
                w -= lr * momentum
    torch.testing.assert_close(weight, w.detach(), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(weight, start, atol=1e-3)


def test_the_published_diagonal_is_a_thousandth_and_may_be_relative() -> None:
    statistics = gathered(*made_up())
    for relative in (False, True):
        default, same, other = (
            align(statistics, weight=statistics.mean, epochs=1, relative=relative, **amount)
            for amount in ({}, {"covariance": 1e-3}, {"covariance": 1e-2})
        )
        assert torch.equal(default.weight, same.weight)
        assert not torch.equal(default.weight, other.weight)


def test_the_published_schedule_leaves_the_first_task_alone() -> None:
    x, y = made_up()
    statistics = ClassStatistics()
    statistics.add_task(*by_task(x, y)[0])
    start = torch.randn(2, 12, generator=seeded())
    assert torch.equal(align(statistics, weight=start, epochs=5).weight, start)


@pytest.mark.parametrize("epochs", [None, 5])
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_alignment_never_fails_on_singular_covariances(
    epochs: int | None, relative: bool, scale: float
) -> None:
    # One class of a single image, one of two, one constant: ranks 0, 1 and 0 in 8 dimensions.
    x = scale * torch.randn(5, 8, generator=seeded())
    x[4] = x[3]
    statistics = ClassStatistics()
    statistics.add_task(x[:3], torch.tensor([0, 1, 1]))
    statistics.add_task(x[3:], torch.tensor([2, 2]))
    for amount in (0.0, 1e-3, *([] if relative else [None])):
        for shrinkage in (0.0, 0.3):
            aligned = align(
                statistics, weight=statistics.mean, epochs=epochs, covariance=amount,
                relative=relative, shrinkage=shrinkage, max_steps=100,
            )  # fmt: skip
            assert aligned.weight.isfinite().all()
            # An absolute amount far above the features rightly drowns them.
            if epochs is None and (relative or not amount or scale >= 1):
                assert aligned.logits(x).argmax(1).tolist() == [0, 1, 1, 2, 2]


def test_one_class_alone() -> None:
    statistics = ClassStatistics()
    statistics.add_task(torch.ones(1, 3), torch.tensor([0]))
    assert align(statistics).logits(torch.ones(2, 3)).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("readout", "options"),
    [
        (Alignment, {"epochs": 0}), (Alignment, {"temperature": 0.0}),
        (Alignment, {"epochs": 1.5}), (Alignment, {"max_steps": 10.5}), (Ridge, {"features": True}),
        (Alignment, {"covariance": -1.0}), (Alignment, {"relative": True}),
        (Alignment, {"shrinkage": float("nan")}),
        (Ridge, {"features": 0}),
    ],
)  # fmt: skip
def test_options_are_checked(readout: Any, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must be"):
        readout(**options)


# Ridge regression


def test_random_features_solve_ridge_regression_by_task_as_at_once() -> None:
    x, y = made_up()
    streamed = RidgeStatistics(x.shape[1], features=50, seed=3)
    for features, labels, size in by_task(x, y):
        for part in torch.split(torch.arange(len(labels)), 17):
            streamed.collect(features[part], labels[part])
        streamed.end_task(size)
    at_once = RidgeStatistics(x.shape[1], features=50, seed=3)
    at_once.add_task(x, y)
    at_once.strength = streamed.strength
    torch.testing.assert_close(
        Ridge().fit(streamed).weight, Ridge().fit(at_once).weight, rtol=1e-8, atol=1e-10
    )
    h = torch.relu(x @ streamed.projection).double()
    onehot = torch.nn.functional.one_hot(y).double()
    # The least-squares form of ridge: rows of sqrt(s)·I below the data.
    rows = torch.cat([h, streamed.strength**0.5 * torch.eye(50, dtype=torch.float64)])
    targets = torch.cat([onehot, torch.zeros(50, onehot.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution
    torch.testing.assert_close(Ridge().fit(streamed).weight, expected, rtol=1e-6, atol=1e-8)


def test_the_strength_is_the_best_on_the_last_fifth() -> None:
    x, y = made_up()
    statistics = RidgeStatistics(x.shape[1], features=30)
    statistics.add_task(x, y)
    h = torch.relu(x @ statistics.projection).double()
    onehot = torch.nn.functional.one_hot(y).double()
    held = torch.zeros(len(y), dtype=torch.bool)
    for label in range(sum(SIZES)):
        held[(y == label).nonzero().flatten()[32:]] = True
    errors = {}
    for k in range(-8, 9):
        a = h[~held].T @ h[~held] + 10.0**k * torch.eye(30, dtype=torch.float64)
        w = torch.linalg.lstsq(a, h[~held].T @ onehot[~held], driver="gelsd").solution
        errors[10.0**k] = (h[held] @ w - onehot[held]).square().sum().item()
    assert errors[statistics.strength] <= min(errors.values()) * (1 + 1e-6)


@pytest.mark.parametrize("features", [torch.ones(3, 4), torch.zeros(3, 4), torch.full((1, 4), 1e6)])
def test_ridge_never_fails_on_degenerate_features(features: Tensor) -> None:
    statistics = RidgeStatistics(4, features=20)
    statistics.add_task(features, torch.zeros(len(features), dtype=torch.int64))
    assert Ridge().fit(statistics).logits(features).isfinite().all()


def test_solve_ridge_floor_is_far_below_any_useful_strength() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    solved = solve_ridge(gram, torch.eye(2, dtype=torch.float64), 0.0)
    torch.testing.assert_close(solved, torch.diag(1 / gram.diagonal()), rtol=1e-12, atol=0)


# Heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cosines_of_a_head(dtype: torch.dtype) -> None:
    head = CosineHead(3, 5, generator=seeded()).to(dtype)
    x = torch.randn(7, 5, generator=seeded(1), dtype=dtype)
    expected = torch.nn.functional.cosine_similarity(x[:, None], head.weight[None], dim=-1)
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head(1e4 * x), expected)


def test_cosines_stay_in_range_and_gradients_finite() -> None:
    x = torch.randn(200, 64, generator=seeded())
    head = CosineHead(200, 64, start=3 * x)
    assert head(x).abs().max() <= 1
    features = torch.zeros(2, 64, requires_grad=True)
    head(features).sum().backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision() -> None:
    head, x = CosineHead(3, 8, generator=seeded()), torch.randn(4, 8, generator=seeded(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = head(x)
    torch.testing.assert_close(low, head(x), rtol=0, atol=0)


def test_random_start_is_seeded_and_truncated() -> None:
    weight = CosineHead(100, 100, generator=seeded()).weight
    assert torch.equal(weight, CosineHead(100, 100, generator=seeded()).weight)
    assert not torch.equal(weight, CosineHead(100, 100, generator=seeded(1)).weight)
    assert weight.abs().max() <= 0.04
    # A normal cut at two deviations keeps 0.88 of its deviation.
    assert weight.std().item() == pytest.approx(0.02 * 0.88, rel=0.05)


def test_class_mean_start_gives_the_nearest_mean() -> None:
    means = torch.randn(4, 6, generator=seeded())
    start = class_mean_start(means)
    torch.testing.assert_close(start.norm(dim=1), torch.ones(4))
    assert CosineHead(4, 6, start=start)(5 * means).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_class_mean_start_needs_a_direction(bad: float) -> None:
    means = torch.ones(3, 4)
    means[1] = bad
    with pytest.raises(ValueError, match=r"\[1\]"):
        class_mean_start(means)


def test_only_the_current_head_is_trained() -> None:
    heads = CosineHeads(6)
    first = heads.add(2, generator=seeded())
    second = heads.add(3, generator=seeded(1))
    before = first.weight.detach().clone()
    optimiser = torch.optim.SGD([p for p in heads.parameters() if p.requires_grad], lr=1.0)
    heads(torch.randn(4, 6, generator=seeded(2))).square().sum().backward()
    optimiser.step()
    assert first.weight.grad is None
    assert torch.equal(first.weight, before)
    assert second.weight.grad is not None
    assert second.weight.grad.abs().sum() > 0
    assert heads.current is second


def test_concatenation_follows_the_tasks() -> None:
    heads = CosineHeads(6)
    parts = [heads.add(n, generator=seeded(n)) for n in (2, 1, 3)]
    x = torch.randn(4, 6, generator=seeded())
    assert torch.equal(heads(x), torch.cat([part(x) for part in parts], dim=1))
    assert torch.equal(heads.weight(), torch.cat([part.weight for part in parts]))
    assert heads.sizes == (2, 1, 3)


def test_heads_round_trip() -> None:
    heads = CosineHeads(5)
    heads.add(2, generator=seeded())
    heads.add(4, generator=seeded(1))
    again = CosineHeads(5, sizes=heads.sizes)
    again.load_state_dict(heads.state_dict())
    assert torch.equal(again.weight(), heads.weight())


def test_new_heads_follow_the_type_of_the_old() -> None:
    heads = CosineHeads(5, sizes=(2,)).double()
    assert heads.add(1).weight.dtype == torch.float64


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="classes"):
        CosineHead(0, 3)
    with pytest.raises(ValueError, match="start"):
        CosineHead(2, 3, start=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="features"):
        CosineHead(2, 3)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="head"):
        CosineHeads(3)(torch.zeros(1, 3))


# Classifiers, and the collection


def test_read_outs_by_cosine_follow_the_definition() -> None:
    x, y = made_up()
    statistics = gathered(x, y, ClassStatistics(dtype=torch.float64))
    x = x.double()
    expected = torch.nn.functional.cosine_similarity(x[:, None], statistics.mean[None], dim=-1)
    for classifier in (NearestMean().fit(statistics), Heads().fit(head_weight=statistics.mean)):
        torch.testing.assert_close(classifier.logits(x), expected)


def all_readouts(seed: int = 3, **options: Any) -> Readouts:
    settings: dict[str, Any] = {"max_steps": 100, **options}
    trained = [Alignment(**settings), Heads(), NearestMean(), Compensated(**settings)]
    return Readouts([*trained, Ridge(features=30)], dim=12, seed=seed)


def after(readouts: Readouts, tasks: int, first: int = 0) -> Readouts:
    """Gather and fit a few tasks, with heads at random."""
    x, y = made_up()
    for task, part in list(enumerate(by_task(x, y)))[first:tasks]:
        readouts.begin_task(part[0] / 2)  # as a task that doubles all features would have it
        readouts.add_task(*part)
        weight = torch.randn(sum(SIZES[: task + 1]), 12, generator=seeded(task))
        readouts.fit(weight, seed=task)
    return readouts


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_packaged_read_outs_are_known_by_name() -> None:
    assert {name: type(r) for name, r in all_readouts().readouts.items()} == READOUTS


def test_a_read_out_is_called_as_its_class_unless_it_says_otherwise() -> None:
    class Plain(NearestMean):
        pass

    class Bare(Readout):
        def fit(self, statistics: Any, **_: Any) -> Any:
            return statistics

    assert (Plain.name, Bare.name) == ("nearest_mean", "Bare")
    assert list(Readouts([Bare()], dim=2).readouts) == ["Bare"]


def test_each_is_fitted_on_what_it_gathers() -> None:
    readouts = after(all_readouts(epochs=2), 3)
    assert list(readouts.classifiers) == list(all_readouts().readouts)
    statistics = gathered(*made_up())
    # Two share the first.
    assert list(readouts.statistics) == ["statistics", "compensated", "ridge"]
    assert same(readouts.statistics["statistics"].state_dict(), statistics.state_dict())
    sums = gathered(*made_up(), statistics=RidgeStatistics(12, features=30, seed=3))
    weight = torch.randn(6, 12, generator=seeded(2))
    expected = {
        "heads": Heads().fit(head_weight=weight),
        "nearest_mean": NearestMean().fit(statistics),
        "ridge": Ridge().fit(sums),
    }
    for name, classifier in expected.items():
        assert same(readouts.classifiers[name].tensors(), classifier.tensors()), name


def test_the_published_alignment_goes_on_from_the_one_before() -> None:
    aligned, statistics = torch.empty(0, 12), ClassStatistics()
    for task, part in enumerate(by_task(*made_up())):
        statistics.add_task(*part)
        start = torch.randn(sum(SIZES[: task + 1]), 12, generator=seeded(task))
        start[: len(aligned)] = aligned
        aligned = align(statistics, task, start, epochs=2).weight
    readouts = after(all_readouts(epochs=2), 3)
    assert torch.equal(readouts.classifiers["alignment"].tensors()["weight"], aligned)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.parametrize("epochs", [None, 2])
def test_a_stored_state_goes_on_bit_for_bit(done: int, epochs: int | None, tmp_path: Any) -> None:
    whole, again = all_readouts(epochs=epochs), all_readouts(5, epochs=epochs)
    save_file(after(whole, done).state_dict(), tmp_path / "state")
    again.load_state_dict(load_file(tmp_path / "state"))
    for name, statistics in again.statistics.items():
        assert statistics.task_sizes == whole.statistics[name].task_sizes == SIZES[:done]
    for readouts in (whole, again):
        after(readouts, 3, done)
    assert same(whole.tensors(), again.tensors())
    assert same(whole.state_dict(), again.state_dict())
    assert whole.stored_bytes() == again.stored_bytes()


def foreign_states() -> dict[str, dict[str, Tensor]]:
    """States that `all_readouts` has to refuse, by what is wrong with them."""
    state = after(all_readouts(), 2).state_dict()
    later = after(all_readouts(), 3).state_dict()
    wide = Readouts(list(all_readouts().readouts.values()), dim=13)
    x, y = torch.randn(6, 13, generator=seeded(0)), torch.arange(6)
    wide.add_task(x, y)
    sums = Readouts([NearestMean(), Compensated(), Ridge(features=29)], dim=12)
    sums.add_task(x[:, :12], y)
    part = {name: x for name, x in later.items() if name.startswith("gathered/ridge")}
    return {
        "read-outs": {name: x for name, x in state.items() if "ridge" not in name},
        "nothing": {},
        "classifiers": {**state, "fitted/heads/weight": torch.ones(2, 2)},
        "others": {**state, "others/x": torch.ones(2)},
        "more": {**state, "gathered/ridge/more": torch.zeros(1)},
        "less": {name: x for name, x in state.items() if not name.endswith("mean")},
        "width": wide.state_dict(),
        "random features": sums.state_dict(),
        "tasks": {**state, **part},
    }


@pytest.mark.parametrize("wrong", foreign_states())
def test_a_state_that_does_not_fit_is_refused_and_leaves_everything_as_it_was(wrong: str) -> None:
    readouts = after(all_readouts(), 1)
    before = {name: x.clone() for name, x in readouts.state_dict().items()}
    with pytest.raises(ValueError, match="must"):
        readouts.load_state_dict(foreign_states()[wrong])
    assert same(readouts.state_dict(), before)
    assert same(after(readouts, 3, 1).state_dict(), after(all_readouts(), 3).state_dict())


def test_read_outs_that_share_statistics_must_agree_on_them() -> None:
    class Second(Ridge):
        name = "second"

    assert list(Readouts([Ridge(), Second()], dim=2).statistics) == ["ridge"]
    with pytest.raises(ValueError, match="share"):
        Readouts([Ridge(features=20), Second(features=30)], dim=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stored_classifiers_give_the_same_logits_bit_for_bit(
    dtype: torch.dtype, tmp_path: Any
) -> None:
    readouts = after(all_readouts(), 3)
    save_file(readouts.tensors(), tmp_path / "readouts")
    stored = all_readouts().load(load_file(tmp_path / "readouts"))
    features = made_up()[0].to(dtype)
    assert stored.keys() == readouts.classifiers.keys()
    for name, classifier in readouts.classifiers.items():
        logits = classifier.logits(features)
        assert logits.shape == (len(features), 6)
        assert torch.equal(stored[name].logits(features), logits)


def test_none_depends_on_the_others() -> None:
    alone = after(Readouts([Alignment(max_steps=100)], dim=12, seed=3), 3)
    assert same(
        alone.tensors(),
        {"alignment/weight": after(all_readouts(), 3).tensors()["alignment/weight"]},
    )


def test_statistics_can_be_kept_for_their_own_sake() -> None:
    readouts = Readouts([Heads()], dim=12, keep_statistics=True)
    assert same(
        after(readouts, 3).statistics["statistics"].state_dict(), gathered(*made_up()).state_dict()
    )
    assert readouts.stored_bytes() == {"statistics": 6 * 8 + 6 * 12 * 4 + 6 * 144 * 4 + 3 * 8}
    assert not Readouts([Heads()], dim=12).statistics


class Count(TaskStatistics):
    """How often each class occurred."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(0)

    def gather(self, features: Tensor, labels: Tensor) -> None:
        self.count = torch.cat([self.count, torch.bincount(labels - self.classes).float()])

    def finish(self, first: int, end: int) -> None:
        assert len(self.count) == end

    def tensors(self) -> dict[str, Tensor]:
        return {"count": self.count}

    def load(self, tensors: Any, classes: int) -> None:
        assert len(tensors["count"]) == classes
        self.count = tensors["count"]


class MostFrequent(Readout):
    """One of one's own: takes whatever class it has seen most."""

    name, gathers = "most_frequent", "count"
    made: ClassVar[list[tuple[int, int]]] = []

    def statistics(self, dim: int, seed: int) -> Count:
        self.made.append((dim, seed))
        return Count()

    def fit(self, statistics: Count, **_: Any) -> CosineClassifier:
        return CosineClassifier(statistics.count[:, None].repeat(1, 12))


def test_a_read_out_of_ones_own_is_one_among_others() -> None:
    readouts = after(Readouts([MostFrequent(), NearestMean()], dim=12, seed=5), 2)
    assert MostFrequent.made == [(12, 5)]
    assert readouts.classifiers["most_frequent"].tensors()["weight"][:, 0].tolist() == [40] * 5
    again = Readouts([MostFrequent(), NearestMean()], dim=12)
    again.load_state_dict(readouts.state_dict())
    assert same(after(again, 3, 2).tensors(), after(readouts, 3, 2).tensors())


def test_features_of_another_width_are_refused() -> None:
    readouts = Readouts([Compensated()], dim=7)
    readouts.load_state_dict(readouts.state_dict())  # before the first task
    for take in (readouts.begin_task, lambda x: readouts.add_task(x, torch.zeros(3).long())):
        with pytest.raises(ValueError, match=r"7 wide.*got 12"):
            take(torch.randn(3, 12))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="names"):
        Readouts([Ridge(), Ridge(features=2)], dim=3)
    with pytest.raises(ValueError, match="names"):
        Readouts([type("Odd", (NearestMean,), {"name": "a/b"})()], dim=3)
    tensors = after(all_readouts(epochs=2), 1).tensors()
    for wrong in (
        {k: v for k, v in tensors.items() if "heads" not in k},
        tensors | {"ridge/bias": torch.ones(2)},
        tensors | {"heads/weight": torch.full((1, 2), torch.nan)},
    ):
        with pytest.raises(ValueError, match="must be"):
            all_readouts().load(wrong)


def test_a_fit_needs_what_it_is_fitted_on() -> None:
    for readout in (NearestMean(), Alignment()):
        with pytest.raises(ValueError, match="class"):
            readout.fit(ClassStatistics(), generator=seeded())
    x, y = made_up()
    dead = gathered(torch.zeros_like(x), y)
    with pytest.raises(ValueError, match="zero"):
        Alignment().fit(dead, generator=seeded())
    with pytest.raises(ValueError, match="class"):
        Ridge().fit(RidgeStatistics(3, features=4))
    with pytest.raises(ValueError, match="head_weight"):
        Heads().fit()
    statistics = gathered(*made_up())
    with pytest.raises(ValueError, match="weight"):
        align(statistics, epochs=5)
    with pytest.raises(ValueError, match="shape"):
        align(statistics, weight=torch.ones(2, 12))
    for features in (torch.ones(1, 3), torch.full((1, 2), torch.nan), torch.ones(1, 2).long()):
        with pytest.raises(ValueError, match="features"):
            CosineClassifier(torch.eye(2)).logits(features)
