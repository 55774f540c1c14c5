"""Mean and spread over seeds, and differences paired by seed with their interval."""

from collections.abc import Hashable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple


class Spread(NamedTuple):
    """Mean and sample standard deviation of a number of values; None for the spread of one."""

    mean: float
    deviation: float | None
    size: int


class Paired(NamedTuple):
    """Mean of a number of paired differences, and its interval; one pair gives none."""

    mean: float
    low: float | None
    high: float | None
    size: int


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n - 1) of at least one value.

    Examples
    --------
    >>> spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951, size=2)
    """
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


def paired(
    values: Mapping[Hashable, float],
    reference: Mapping[Hashable, float],
    *,
    confidence: float = 0.95,
) -> Paired | None:
    r"""Mean difference over the seeds that both have, with Student's interval.

    .. math:: \bar d \pm t_{n-1,\,(1+c)/2} \; s_d / \sqrt n

    for the n differences d of one seed each, with sample standard deviation s. The interval
    supposes that the differences are independent and near normal.

    Parameters
    ----------
    values, reference : mapping of hashable to float
        By seed, or whatever else makes a pair.
    confidence : float
        c, between 0 and 1.

    Returns
    -------
    Paired or None
        None without a common seed.

    Examples
    --------
    >>> found = paired({1: 3.0, 2: 5.0, 3: 9.0}, {1: 2.0, 2: 3.0, 4: 0.0})
    >>> found.mean, found.size, round(found.high, 2)
    (1.5, 2, 7.85)
    """
    from scipy.stats import t  # slow to import, and only needed here

    differences = [value - reference[seed] for seed, value in values.items() if seed in reference]
    if not differences:
        return None
    mean, deviation, size = spread(differences)
    if deviation is None:
        return Paired(mean, None, None, size)
    half = float(t.ppf((1 + confidence) / 2, size - 1)) * deviation / sqrt(size)
    return Paired(mean, mean - half, mean + half, size)
