"""Ridge regression on random features against least squares."""

import pytest
import torch
from made_up_features import SIZES, by_task, made_up
from torch import Tensor

from backends.torch.readouts import RidgeStatistics, ridge, solve_ridge


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
