"""Temperatures and calibration errors: known answers, invariances, and what a run records."""

import math
from pathlib import Path

import pytest
import torch
from small_runs import READOUTS
from torch.nn import functional

from training.calibration import calibration_error, fit_temperature, probabilities
from training.run_dir import read_json


def drawn(temperature: float, *, images: int = 4000, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Scores, and labels drawn from their softmax at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(images, 5, generator=generator) * 2 - 1
    shares = probabilities(scores, temperature)
    return scores, torch.multinomial(shares, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_the_temperature_that_drew_the_labels_is_recovered(temperature: float) -> None:
    scores, labels = drawn(temperature)
    assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.15)


def test_the_fit_minimises_the_cross_entropy_with_softened_targets() -> None:
    scores, labels = drawn(0.2, images=300)
    best = fit_temperature(scores, labels)

    def risk(temperature: float) -> float:
        targets = functional.one_hot(labels, 5).double() * (301 / 302 - 1 / 302 / 4) + 1 / 302 / 4
        return float(functional.cross_entropy(scores.double() / temperature, targets))

    assert risk(best) < min(risk(best * 1.001), risk(best / 1.001))


def test_scores_in_other_units_or_with_another_origin_give_the_same_probabilities() -> None:
    scores, labels = drawn(0.2, images=300)
    moved = 7 * scores - 3
    expected = probabilities(scores, fit_temperature(scores, labels))
    actual = probabilities(moved, fit_temperature(moved, labels))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_images_that_are_all_right_leave_a_doubt_that_more_of_them_reduce() -> None:
    doubts = []
    for images in (10, 100, 1000):
        scores = torch.eye(3).repeat(images, 1)
        labels = torch.arange(3).repeat(images)
        shares = probabilities(scores, fit_temperature(scores, labels))
        doubts.append(1 - float(shares.max(dim=1).values.mean()))
        assert doubts[-1] == pytest.approx(1 / (3 * images + 2), rel=1e-3)
    assert doubts == sorted(doubts, reverse=True)


def test_scores_that_say_nothing_give_equal_probabilities() -> None:
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    shares = probabilities(scores, fit_temperature(scores, torch.tensor([0, 1])))
    torch.testing.assert_close(shares, torch.full((2, 2), 0.5).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.full((2, 3), math.inf), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_scores_without_a_temperature_are_refused(
    scores: torch.Tensor, labels: torch.Tensor
) -> None:
    with pytest.raises(ValueError, match="scores"):
        fit_temperature(scores, labels)


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy() -> None:
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert calibration_error(sure, torch.tensor([0, 1])) == 0
    assert calibration_error(sure, torch.tensor([1, 0])) == 1
    # Two bins: all right at 0.9, all wrong at 0.6.
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).double()
    assert calibration_error(shares, torch.tensor([0, 1])) == pytest.approx((0.1 + 0.6) / 2)


def test_probabilities_that_drew_the_labels_are_calibrated() -> None:
    scores, labels = drawn(0.2)
    assert calibration_error(probabilities(scores, 0.2), labels) < 0.03
    assert calibration_error(probabilities(scores, 0.02), labels) > 0.1


def test_a_run_records_the_temperature_of_readouts_with_likelihoods(run: Path) -> None:
    calibration = read_json(run / "summary.json")["calibration"]
    assert set(calibration) == {"heads", "alignment", "compensated"} < set(READOUTS)
    for entry in calibration.values():
        assert entry["temperature"] > 0
        assert entry["images"] == 12  # those of the last task
        assert 0 <= entry["error"] <= 1
        assert 1 / 6 <= entry["confidence"] <= 1
