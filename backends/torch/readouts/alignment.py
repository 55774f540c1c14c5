"""Classifier alignment: head weights retrained on samples of each class's stored Gaussian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from backends.torch.readouts.checks import finite
from backends.torch.readouts.heads import cosines
from backends.torch.readouts.statistics import ClassStatistics

if TYPE_CHECKING:
    from backends.torch.readouts.readout import Alignment

_EPS = 1e-6
_ROUND = 50  # steps whose losses are averaged before they are judged
_AT_ONCE = 50  # steps at most whose samples are drawn together
_HALVINGS = 5  # of the learning rate, before training ends
_PUBLISHED = 1e-3  # the diagonal that the published schedule adds to a covariance
# From which the diagonal is chosen, relative to the mean variance of a feature. The strongest is
# first: it is taken where several serve equally well, up to rounding.
_RIDGES = tuple(10 ** (k / 2) for k in range(2, -9, -1))
_TIE = 1e-6


def alignment_loss(
    cosines: Tensor, labels: Tensor, sizes: Sequence[int], temperature: float
) -> Tensor:
    """Cross-entropy of logits over their mean per-task norm and over τ, without scale or margin.

    The logits (N, C) of a sample are divided by the mean over tasks of the norms of their
    per-task parts (`sizes` classes each), so only their direction counts.
    """
    norms = torch.stack([part.norm(dim=1) for part in torch.split(cosines, list(sizes), dim=1)])
    scale = (norms + 1e-7).mean(0)[:, None] * temperature
    return functional.cross_entropy(cosines / scale, labels)


def align_heads(
    statistics: ClassStatistics,
    settings: Alignment,
    *,
    generator: torch.Generator,
    weight: Tensor | None = None,
) -> Tensor:
    """Head weights (C, D) retrained on samples of each class's stored Gaussian.

    `Alignment` explains the two ways to train. Without ``epochs`` the weights start at the
    least-squares solution S⁻¹μ_c (S: the second moment of the mixture) and are trained by Adam in
    coordinates that whiten S. Every step draws anew, so the mean loss of a round of 50 steps
    estimates the true risk. A round that lowers the best so far by less than ``tolerance`` halves
    the learning rate (from 0.1); training ends at the sixth such round, at a loss below 1e-6, or
    at ``max_steps``.

    Parameters
    ----------
    statistics : ClassStatistics
    settings : Alignment
    generator : torch.Generator
        Source of all randomness: the same state gives the same weights.
    weight : (C, D) tensor, optional
        The heads' weights: where the published schedule starts, and needed there only. To
        reproduce it, old classes start at their weights of the alignment before.

    Raises
    ------
    ValueError
        While no task is finished, if the mean features of all classes are zero, or when the weight
        is missing or does not fit.

    Examples
    --------
    >>> from backends.torch.readouts import Alignment, CosineClassifier
    >>> statistics = ClassStatistics()
    >>> x = torch.tensor([[2.0, 0.1], [2.0, -0.1], [1.0, 2.0], [1.2, 2.0]])
    >>> statistics.add_task(x, torch.tensor([0, 0, 1, 1]))
    >>> weight = align_heads(statistics, Alignment(), generator=torch.Generator().manual_seed(0))
    >>> CosineClassifier(weight).logits(x).argmax(1).tolist()
    [0, 0, 1, 1]
    """
    statistics.require_classes()
    mean = statistics.mean
    if weight is not None and weight.shape != mean.shape:
        msg = f"head weights must have shape {tuple(mean.shape)}, got {tuple(weight.shape)}"
        raise ValueError(msg)
    if not bool(mean.any()):
        msg = (
            "the mean features of all classes are zero, so none can be told from another: check "
            "the model and the images"
        )
        raise ValueError(msg)
    if settings.epochs is None:
        return finite("aligned weights", _converge(statistics, settings, generator))
    if weight is None:
        msg = "the published schedule starts from the heads: give their weight, or set epochs=None"
        raise ValueError(msg)
    # A copy: the heads themselves stay as they were trained.
    start = finite("head weights", weight.detach().to(mean).clone())
    if len(statistics.task_sizes) == 1:  # as published: nothing to align with yet
        return start
    aligned = _schedule(statistics, settings, settings.epochs, generator, start)
    return finite("aligned weights", aligned)


def _schedule(
    statistics: ClassStatistics,
    s: Alignment,
    epochs: int,
    generator: torch.Generator,
    weight: Tensor,
) -> Tensor:
    """The published schedule: epochs of C steps of 256 fresh samples."""
    sizes = statistics.task_sizes
    device = weight.device
    tasks = torch.arange(1, len(sizes) + 1, device=device)
    shift = (0.9 + 0.1 * tasks / len(sizes)).repeat_interleave(torch.tensor(sizes, device=device))
    mean = statistics.mean * shift[:, None].to(weight)
    amount = _PUBLISHED if s.covariance is None else s.covariance
    covariance = statistics.covariance.double()
    factors = _factors(covariance, _ridges(covariance, amount, s), weight.dtype)
    weight.requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = s.lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        samples, labels = _draw(mean, factors, 256, generator)
        order = torch.randperm(len(labels), generator=generator, device=generator.device).to(device)
        for batch in torch.split(order, 256):
            logits = cosines(samples[batch], weight)
            _step(optimiser, alignment_loss(logits, labels[batch], sizes, s.temperature))
    return weight.detach()


def _converge(statistics: ClassStatistics, s: Alignment, generator: torch.Generator) -> Tensor:
    """Run to convergence: see `align_heads`."""
    mean, covariance = statistics.mean, _shrunk(statistics, s.shrinkage)
    amount = chosen_diagonal(statistics) if s.covariance is None else s.covariance
    wide = mean.double()
    within = covariance.mean(0)
    moment = within + wide.mT @ wide / len(wide)
    ridges, ridge = _ridges(covariance, amount, s), _ridges(moment[None], amount, s)
    basis = _span(within, wide)
    if basis is not None:
        wide, moment = wide @ basis, basis.mT @ moment @ basis
        mean, covariance = wide.to(mean.dtype), basis.mT @ covariance @ basis
    factors = _factors(covariance, ridges, mean.dtype)
    whitener = _factors(moment[None], ridge, torch.float64)[0]
    # Rows v of the trained matrix give w = K⁻ᵀv with S = K Kᵀ; v starts at K⁻¹μ.
    start = torch.linalg.solve_triangular(whitener, wide.mT, upper=False).mT
    start = start / start.square().mean().sqrt().clamp(min=_EPS)
    whitener = whitener.to(mean.dtype)
    rows = start.to(mean.dtype).requires_grad_()

    def unwhiten() -> Tensor:
        weight: Tensor = torch.linalg.solve_triangular(whitener, rows, upper=False, left=False)
        return weight

    optimiser = torch.optim.Adam([rows], lr=0.1, betas=(0.9, 0.99))
    # As many samples as the published batch, and enough of every class where there are many.
    batches = _batches(mean, factors, max(4, math.ceil(256 / len(mean))), generator)
    best, halvings, total = math.inf, 0, torch.zeros((), dtype=torch.float64, device=mean.device)
    for step in range(1, s.max_steps + 1):
        samples, labels = next(batches)
        loss = alignment_loss(
            cosines(samples, unwhiten()), labels, statistics.task_sizes, s.temperature
        )
        _step(optimiser, loss)
        total += loss.detach()  # read once per round, not once per step
        if step % _ROUND == 0:
            risk = float(total) / _ROUND
            total.zero_()
            if risk > (1 - s.tolerance) * best:
                halvings += 1
                optimiser.param_groups[0]["lr"] /= 2
            if halvings > _HALVINGS or risk < 1e-6:
                break
            best = min(best, risk)
    weight = unwhiten().detach()
    return weight if basis is None else (weight.double() @ basis.mT).to(weight.dtype)


def _step(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()


def _shrunk(statistics: ClassStatistics, shrinkage: float) -> Tensor:
    """Covariances (C, D, D) in float64, each drawn to the pooled one by how few images it has."""
    covariance = statistics.covariance.double()
    freedom = (statistics.count - 1).to(covariance).clamp(min=0)[:, None, None]
    pooled = (covariance * freedom).sum(0) / freedom.sum().clamp(min=1)
    prior = shrinkage * covariance.shape[-1]
    share = prior / (prior + freedom) if prior else torch.zeros_like(freedom)
    return torch.lerp(covariance, pooled.expand_as(covariance), share)


def _spectrum(scatter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, eigenvectors, and which are more than the rounding of stored covariances."""
    squares, basis = torch.linalg.eigh(scatter)
    return squares, basis, squares > torch.finfo(torch.float32).eps * squares.sum()


def _span(within: Tensor, mean: Tensor) -> Tensor | None:
    """Orthonormal basis (D, S) of where the images are, or None if they are everywhere.

    Given are the mean covariance (D, D) of the classes and their means (C, D). Elsewhere samples
    are the ridge alone, and whitening gives their noise the weight of the features: with few images
    and many features little else would be learned.
    """
    centre = mean.mean(0)
    between = mean - centre
    _, basis, seen = _spectrum(within + between.mT @ between / len(mean))
    if bool(seen.all()):
        return None
    basis = basis[:, seen]
    beside = centre - basis @ (basis.mT @ centre)  # what all images have in common
    length = beside.norm()
    if length > torch.finfo(torch.float32).eps * centre.norm():
        basis = torch.cat([basis, (beside / length)[:, None]], dim=1)
    return basis if basis.shape[1] else None


def chosen_diagonal(statistics: ClassStatistics) -> float:
    """The diagonal by generalised cross-validation: see `Alignment`.

    A regression needs no images but the sums XᵀX and XᵀY, which the statistics give.
    """
    count, mean = statistics.count.double(), statistics.mean.double()
    images = count.sum()
    centred = mean - count @ mean / images
    between = centred.mT * count  # XᵀY, with the indicators of the classes for Y
    within = torch.tensordot((count - 1).clamp(min=0), statistics.covariance.double(), 1)
    squares, basis, seen = _spectrum(within + between @ centred)
    squares[~seen] = 0
    unit, squares = squares.mean(), squares[seen]
    # ‖Y - XW‖² and N - df are sums of what no ridge fits and what this one leaves: as differences
    # they would cancel where X can explain nearly all.
    gain = (basis[:, seen].mT @ between).square().sum(1) / squares
    free = (images - 1 - len(squares)).clamp(min=0)
    rest = (images - count.square().sum() / images - gain.sum()).clamp(min=0) * (free > 0)
    scores = []
    for ridge in _RIDGES:
        kept = ridge * unit / (squares + ridge * unit)
        scores.append((rest + (gain * kept**2).sum()) / (free + kept.sum()) ** 2)
    found = torch.stack(scores)
    best = int((found <= (1 + _TIE) * found.min()).byte().argmax())  # the first
    return float(_RIDGES[best] * unit / images)


def _ridges(covariance: Tensor, amount: float, s: Alignment) -> Tensor:
    """What is added to the diagonal of each covariance (C, D, D)."""
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    return amount * trace / covariance.shape[-1] if s.relative else torch.full_like(trace, amount)


def _factors(covariance: Tensor, ridges: Tensor, dtype: torch.dtype) -> Tensor:
    """Cholesky factors (C, D, D) of covariance + ridge, factorised in float64.

    Stored covariances carry the rounding of float32: half an eps of the Frobenius norm at most,
    hence of the trace. A ridge of one eps·trace (plus a tiny one for zero matrices) therefore
    makes any of them positive definite.
    """
    trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    least = torch.finfo(torch.float32).eps * trace
    jitter = torch.maximum(ridges, least).clamp(min=torch.finfo(torch.float64).tiny)
    eye = torch.eye(covariance.shape[-1]).to(covariance)
    # One class at a time: a batch of large float64 matrices needs several copies of them all.
    return torch.stack(
        [
            torch.linalg.cholesky((c + c.mT) / 2 + j * eye).to(dtype)
            for c, j in zip(covariance, jitter, strict=True)
        ]
    )


def _batches(
    mean: Tensor, factors: Tensor, number: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch of ``number`` samples of each class, and their labels.

    Several are drawn at once: a draw reads all factors (C, D, D) from memory, and that takes longer
    than the arithmetic on a few samples. Neither they nor their noise take more memory than these.
    """
    classes, dim = mean.shape
    at_once = max(1, min(_AT_ONCE, dim // number))
    labels = torch.arange(classes, device=mean.device).repeat_interleave(number)
    while True:
        samples, _ = _draw(mean, factors, at_once * number, generator)
        for batch in samples.view(classes, at_once, number, dim).unbind(1):
            yield batch.flatten(0, 1), labels
        del samples, batch  # before the next ones are drawn


def _draw(
    mean: Tensor, factors: Tensor, number: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`number` samples of each class (C·number, D) and their labels, in order of class."""
    classes, dim = mean.shape
    # Drawn on the generator's device, so that a GPU aligns to the same samples as a CPU.
    noise = torch.randn(
        classes, number, dim, generator=generator, device=generator.device, dtype=mean.dtype
    ).to(mean.device)
    samples = torch.baddbmm(mean[:, None], noise, factors.mT)
    labels = torch.arange(classes, device=mean.device).repeat_interleave(number)
    return samples.flatten(0, 1), labels
