"""Class statistics, ridge sums and the read-outs built from them."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from backends.torch.readouts import (
    AlignmentSettings,
    ClassStatistics,
    Readout,
    RidgeStatistics,
    align_heads,
    alignment,
    alignment_loss,
    heads,
    load_readout,
    nearest_mean,
    ridge,
    solve_ridge,
)

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


def gathered(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> ClassStatistics:
    statistics = ClassStatistics(dtype=dtype)
    for features, labels, size in by_task(x, y):
        statistics.add_task(features, labels, size)
    return statistics


def accuracy(readout: Readout, x: Tensor, y: Tensor) -> float:
    return (readout.logits(x).argmax(1) == y).float().mean().item()


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
    with pytest.raises(ValueError, match="never refreshed"):
        statistics.collect(x[:1], torch.tensor([0]))


def test_statistics_round_trip() -> None:
    statistics = gathered(*made_up())
    again = ClassStatistics()
    again.load_state_dict(statistics.state_dict())
    assert again.task_sizes == SIZES
    assert torch.equal(
        align_heads(again, generator=seeded()), align_heads(statistics, generator=seeded())
    )
    with pytest.raises(ValueError, match="must hold"):
        again.load_state_dict({})


@pytest.mark.parametrize("kind", ["class", "ridge"])
def test_bad_features_are_refused(kind: str) -> None:
    statistics = ClassStatistics() if kind == "class" else RidgeStatistics(3, features=8)
    good, labels = torch.ones(4, 3), torch.tensor([0, 0, 1, 1])
    for bad in (float("nan"), float("inf")):
        broken = good.clone()
        broken[2, 1] = bad
        with pytest.raises(ValueError, match="1 of 4 feature rows"):
            statistics.collect(broken, labels)
    with pytest.raises(ValueError, match="begin at 0"):
        statistics.collect(good, labels - 1)
    with pytest.raises(ValueError, match=r"give floating \(N, D\)"):
        statistics.collect(good[None], labels)
    with pytest.raises(ValueError, match="integers"):
        statistics.collect(good, labels.float())
    with pytest.raises(ValueError, match="no classes"):
        statistics.end_task()
    statistics.collect(good, labels)
    with pytest.raises(ValueError, match="end_task before"):
        statistics.state_dict()
    with pytest.raises(ValueError, match="4 wide"):
        statistics.collect(torch.ones(1, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"Classes \[2\] have no features"):
        statistics.end_task(3)
    with pytest.raises(ValueError, match=r"Labels \[1\] lie beyond"):
        statistics.end_task(1)
    statistics.end_task(2)
    assert statistics.task_sizes == (2,)


def test_nearest_mean_and_heads_are_cosines() -> None:
    x, y = made_up()
    statistics = gathered(x, y, torch.float64)
    x = x.double()
    expected = torch.nn.functional.cosine_similarity(x[:, None], statistics.mean[None], dim=-1)
    torch.testing.assert_close(nearest_mean(statistics).logits(x), expected)
    torch.testing.assert_close(heads(statistics.mean).logits(x), expected)


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
    torch.testing.assert_close(ridge(streamed).weight, ridge(at_once).weight, rtol=1e-8, atol=1e-10)
    h = torch.relu(x @ streamed.projection).double()
    onehot = torch.nn.functional.one_hot(y).double()
    # The least-squares form of ridge: rows of sqrt(s)·I below the data.
    rows = torch.cat([h, streamed.strength**0.5 * torch.eye(50, dtype=torch.float64)])
    targets = torch.cat([onehot, torch.zeros(50, onehot.shape[1], dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, targets, driver="gelsd").solution
    torch.testing.assert_close(ridge(streamed).weight, expected, rtol=1e-6, atol=1e-8)


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
    assert ridge(statistics).logits(features).isfinite().all()


def test_ridge_state_round_trip() -> None:
    x, y = made_up()
    statistics = RidgeStatistics(x.shape[1], features=20)
    parts = by_task(x, y)
    statistics.add_task(*parts[0])
    again = RidgeStatistics(x.shape[1], features=20, seed=5)
    again.load_state_dict(statistics.state_dict())
    for s in (statistics, again):
        s.add_task(*parts[1])
    assert torch.equal(ridge(statistics).weight, ridge(again).weight)


def test_solve_ridge_floor_is_far_below_any_useful_strength() -> None:
    gram = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
    solved = solve_ridge(gram, torch.eye(2, dtype=torch.float64), 0.0)
    torch.testing.assert_close(solved, torch.diag(1 / gram.diagonal()), rtol=1e-12, atol=0)


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
    aligned = alignment(statistics, generator=seeded())
    # Oracle: the best rule for these classes, which share one covariance, is linear; it has a
    # bias, which cosines lack.
    covariance = statistics.covariance.double().mean(0)
    mean = statistics.mean.double()
    w = torch.linalg.solve(covariance, mean.T)
    best = (x.double() @ w - (mean.T * w).sum(0) / 2).argmax(1)
    best_accuracy = (best == y).float().mean().item()
    assert accuracy(aligned, x, y) > accuracy(nearest_mean(statistics), x, y) + 0.15
    assert accuracy(aligned, x, y) > best_accuracy - 0.05


def test_converged_alignment_depends_on_statistics_and_generator_alone() -> None:
    statistics = gathered(*made_up())
    weight = align_heads(statistics, generator=seeded())
    assert torch.equal(weight, align_heads(statistics, generator=seeded()))
    start = torch.randn(6, 12, generator=seeded(4))
    assert torch.equal(weight, align_heads(statistics, generator=seeded(), weight=start))
    other = align_heads(statistics, generator=seeded(1))
    assert not torch.equal(weight, other)
    # Another draw converges to the same rule.
    x, _ = made_up(images=100, seed=1)
    agree = heads(weight).logits(x).argmax(1) == heads(other).logits(x).argmax(1)
    assert agree.float().mean() > 0.95


def test_the_published_schedule() -> None:
    """A second, plain implementation of the table row, with the same draws."""
    statistics = gathered(*made_up(), torch.float64)
    settings = AlignmentSettings(epochs=5, temperature=0.2)
    start = torch.randn(6, 12, generator=seeded(7), dtype=torch.float64)
    weight = align_heads(statistics, settings, generator=seeded(), weight=start)

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


def test_the_published_schedule_leaves_the_first_task_alone() -> None:
    x, y = made_up()
    statistics = ClassStatistics()
    statistics.add_task(*by_task(x, y)[0])
    start = torch.randn(2, 12, generator=seeded())
    weight = align_heads(statistics, AlignmentSettings(epochs=5), generator=seeded(), weight=start)
    assert torch.equal(weight, start)


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
    for amount in (0.0, 1e-3):
        settings = AlignmentSettings(
            epochs=epochs, ridge=amount, relative=relative, shrinkage=0.0, max_steps=100
        )
        for shrinkage in (0.0, 0.3):
            weight = align_heads(
                statistics,
                replace(settings, shrinkage=shrinkage),
                generator=seeded(),
                weight=statistics.mean,
            )
            assert weight.isfinite().all()
            # An absolute ridge far above the features rightly drowns them.
            if epochs is None and (relative or amount == 0 or scale >= 1):
                assert heads(weight).logits(x).argmax(1).tolist() == [0, 1, 1, 2, 2]


def test_one_class_alone() -> None:
    statistics = ClassStatistics()
    statistics.add_task(torch.ones(1, 3), torch.tensor([0]))
    readout = alignment(statistics, generator=seeded())
    assert readout.logits(torch.ones(2, 3)).argmax(1).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stored_read_outs_give_the_same_logits_bit_for_bit(dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from safetensors.torch import load_file, save_file

    x, y = made_up()
    statistics, sums = gathered(x, y), RidgeStatistics(x.shape[1], features=30)
    sums.add_task(x, y)
    readouts: list[Readout] = [
        heads(statistics.mean),
        nearest_mean(statistics),
        alignment(statistics, generator=seeded()),
        ridge(sums),
    ]
    for readout in readouts:
        file = tmp_path / f"{readout.kind}.safetensors"
        save_file(readout.tensors(), file)
        again = load_readout(readout.kind, load_file(file))
        assert again.kind == readout.kind
        features = x.to(dtype)
        assert torch.equal(again.logits(features), readout.logits(features))
        assert readout.logits(features).shape == (len(x), 6)


def test_read_out_errors() -> None:
    empty = ClassStatistics()
    with pytest.raises(ValueError, match="no class yet"):
        nearest_mean(empty)
    with pytest.raises(ValueError, match="no class yet"):
        ridge(RidgeStatistics(3, features=4))
    with pytest.raises(ValueError, match="no class yet"):
        alignment(empty, generator=seeded())
    with pytest.raises(ValueError, match="Unknown read-out 'svm'"):
        load_readout("svm", {})
    with pytest.raises(ValueError, match="is stored as"):
        load_readout("ridge", {"weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="NaN"):
        load_readout("heads", {"weight": torch.full((1, 2), float("nan"))})
    with pytest.raises(ValueError, match=r"\(N, 2\)"):
        heads(torch.eye(2)).logits(torch.ones(1, 3))
    with pytest.raises(ValueError, match="features hold NaN"):
        heads(torch.eye(2)).logits(torch.full((1, 2), float("nan")))
    statistics = gathered(*made_up())
    with pytest.raises(ValueError, match="give their weight"):
        align_heads(statistics, AlignmentSettings(epochs=5), generator=seeded())
    with pytest.raises(ValueError, match=r"\(6, 12\)"):
        align_heads(statistics, generator=seeded(), weight=torch.ones(2, 12))


@pytest.mark.parametrize(
    "settings",
    [{"epochs": 0}, {"temperature": 0.0}, {"ridge": -1.0}, {"shrinkage": float("nan")}],
)
def test_alignment_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        AlignmentSettings(**settings)  # type: ignore[arg-type]
