"""Probabilities from the scores of a read-out: their temperature and their calibration error."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from backends.torch.readouts import Readouts

_BINS = 15
_HALVINGS = 100  # of the logarithm between the bounds, until float64 has no number between them
_LARGEST_SLOPE = 1e6  # for scores that barely differ


def fit_temperature(scores: Tensor, labels: Tensor) -> float:
    r"""Temperature T at which softmax(scores / T) fits the labels best.

    Minimises the mean cross-entropy, which is convex in 1/T. The right class of an image counts
    with (n + 1) / (n + 2) for n images, the rest is shared by the others (the targets of Platt,
    1999). Without this a read-out that decides all its training images rightly would get T = 0 and
    be certain of everything.

    Parameters
    ----------
    scores : Tensor, shape (N, C)
        Of at least one image and two classes.
    labels : Tensor, shape (N,)
        Their classes, 0 ... C - 1.

    Returns
    -------
    float
        Above 0.

    Raises
    ------
    ValueError
        For other shapes, or scores that are not finite.

    See Also
    --------
    calibration_error : how far the probabilities are from the shares of right answers.

    Examples
    --------
    >>> scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(fit_temperature(scores, torch.tensor([0, 0, 1, 1])), 2)
    1.44
    """
    if (
        scores.ndim != 2
        or scores.shape[1] < 2
        or labels.shape != scores.shape[:1]
        or not len(labels)
    ):
        msg = (
            f"scores must have shape (N, C) with at least one image and two classes, and labels "
            f"(N,), got {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
        raise ValueError(msg)
    if not bool(scores.isfinite().all()):
        msg = "scores must be finite, got NaN or infinity; check the model and the images"
        raise ValueError(msg)
    # Differences to the largest score: the softmax is the same, and large slopes overflow nowhere.
    wide = scores.detach().to("cpu", torch.float64)
    wide = wide - wide.amax(dim=1, keepdim=True)
    labels = labels.to("cpu")
    count, classes = wide.shape
    targets = torch.full_like(wide, 1 / (count + 2) / (classes - 1))
    targets[torch.arange(count), labels] = (count + 1) / (count + 2)
    expected = (targets * wide).sum(dim=1).mean()

    def derivative(slope: float) -> float:
        return float(((slope * wide).softmax(dim=1) * wide).sum(dim=1).mean() - expected)

    # The derivative of the mean cross-entropy by the slope 1/T increases: its zero is bisected.
    low, high = 1 / _LARGEST_SLOPE, _LARGEST_SLOPE
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if derivative(middle) < 0 else (low, middle)
    return 1 / high


def probabilities(scores: Tensor, temperature: float) -> Tensor:
    """softmax(scores / T) over the last axis, in float64.

    Examples
    --------
    >>> probabilities(torch.tensor([0.5, 0.5]), 0.1).tolist()
    [0.5, 0.5]
    """
    return (scores.double() / temperature).softmax(dim=-1)


def calibration_error(shares: Tensor, labels: Tensor) -> float:
    """Expected calibration error of the most likely class, in 15 bins of equal width.

    Guo et al., "On calibration of modern neural networks" (2017): the mean over images of the gap
    between probability and share of right answers, bin by bin. 0 is perfect.

    Parameters
    ----------
    shares : Tensor, shape (N, C)
        Probabilities.
    labels : Tensor, shape (N,)
        The classes of the images.

    See Also
    --------
    fit_temperature : the temperature that gives the probabilities.

    Examples
    --------
    >>> shares = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    >>> round(calibration_error(shares, torch.tensor([0, 1])), 3)
    0.3
    """
    confidence, chosen = shares.double().cpu().max(dim=1)
    gap = confidence - (chosen == labels.cpu()).double()
    bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
    sums = torch.zeros(_BINS, dtype=torch.float64).index_add_(0, bins, gap)
    return float(sums.abs().sum()) / len(labels)


def calibrate(
    readouts: Readouts,
    fitted: tuple[Tensor, Tensor],
    tested: tuple[Tensor, Tensor],
    before: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Temperature and calibration error of every read-out that has likelihoods.

    The temperature is fitted on the training images of the last task, the only ones at hand; the
    calibration error is that of all classes seen, on the images that the run is evaluated on.

    Parameters
    ----------
    readouts : Readouts
        With the classifiers of the last task.
    fitted, tested : tuple of Tensor
        Features (N, D) and labels (N,) of the training images of the last task, and of the
        evaluation images of all classes.
    before : dict of str to dict, optional
        What this function gave after the last task, if only images of known classes have come
        since. Its temperatures are kept: those images may be few, or of one class.

    Returns
    -------
    dict of str to dict
        By read-out: ``temperature``, ``images`` (number that it was fitted on), and of the
        evaluation images ``error`` (the calibration error) and ``confidence`` (the mean
        probability of the most likely class, to be compared with the accuracy).
    """
    calibration: dict[str, dict[str, Any]] = {}
    for name, classifier in readouts.classifiers.items():
        if not readouts.readouts[name].likelihoods:
            continue
        scores = classifier.logits(tested[0])
        if scores.shape[1] > 1:  # one class alone has probability one at every temperature
            kept = (before or {}).get(name) or {
                "temperature": fit_temperature(classifier.logits(fitted[0]), fitted[1]),
                "images": len(fitted[1]),
            }
            temperature = float(kept["temperature"])
            calibration[name] = {
                "temperature": temperature,
                "images": kept["images"],
                **measured(scores, tested[1], temperature),
            }
    return calibration


def measured(scores: Tensor, labels: Tensor, temperature: float) -> dict[str, float]:
    """Calibration error and mean confidence of scores (N, C) at a temperature."""
    shares = probabilities(scores, temperature)
    return {
        "error": calibration_error(shares, labels),
        "confidence": float(shares.max(dim=1).values.mean()),
    }
