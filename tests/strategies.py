"""Inputs of chosen spectra, and the way to and from the array libraries.

Strategies give float64 NumPy arrays; a test casts them to the library and dtype it looks at with
``to_library`` and computes its oracle from what that cast left (``to_numpy``), so that rounding of
the inputs never counts as an error of the result.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import libraries
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
"""Rounding units, rounded up."""

seeds = st.integers(0, 2**32 - 1)
# Draws float64 only where the library under test has it: JAX may be run without.
dtypes = st.sampled_from(["float32", "float64"]).filter(libraries.has_dtype)
gammas = st.sampled_from([1e-3, 0.5, 1.0, 3.0, 1e4])

SPECTRA: dict[str, Callable[[int, np.random.Generator], Matrix]] = {
    "random": lambda d, rng: rng.uniform(0.1, 1.0, d),
    "flat": lambda d, rng: np.ones(d),
    "clustered": lambda d, rng: (
        np.repeat([1.0, 1e-3], [(d + 1) // 2, d // 2]) * (1 + 1e-12 * rng.uniform(size=d))
    ),
    "deficient": lambda d, rng: np.concatenate(
        [rng.uniform(0.1, 1.0, (d + 1) // 2), np.zeros(d // 2)]
    ),
    "conditioned": lambda d, rng: np.logspace(0, -16, d) if d > 1 else np.ones(1),
    "spiked": lambda d, rng: np.concatenate([[1e6], rng.uniform(0.5, 1.0, d - 1)]),
    "rank one": lambda d, rng: np.concatenate([[1.0], np.zeros(d - 1)]),
}


def to_library(xp: ModuleType, x: Any, dtype: str = "float64") -> Any:
    """``x`` as an array of the library, on the device under test; skips if the dtype is missing."""
    x = np.array(x, dtype=dtype if dtype in ("float32", "float64") else None)
    return libraries.from_numpy(xp, x)


def to_numpy(x: Any) -> NDArray[Any]:
    """A NumPy array of the same values, floating point widened to float64."""
    x = libraries.to_host(x)
    return x.astype(np.float64) if x.dtype.kind in "fV" else x


def dtype_name(x: Any) -> str:
    """Name of the dtype without the library's prefix."""
    return str(x.dtype).rpartition(".")[2]


def orthogonal(size: int, rng: np.random.Generator) -> Matrix:
    """A random rotation (or reflection) of the given size."""
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return q


def from_spectrum(values: Matrix, q: Matrix) -> Matrix:
    """Q diag(s) Qᵀ, exactly symmetric."""
    m = (q * values) @ q.T
    return 0.5 * (m + m.T)


def unit(moment: Matrix) -> Matrix:
    """The moment over its trace; a zero moment as it is."""
    return moment / np.trace(moment) if np.trace(moment) > 0 else moment


def with_dead_direction(moment: Matrix, direction: Matrix) -> Matrix:
    """The moment with every energy along one direction taken out, as layer norm does."""
    d = direction / np.linalg.norm(direction)
    keep = np.eye(len(d)) - np.outer(d, d)
    m = keep @ moment @ keep
    return 0.5 * (m + m.T)


AMPLITUDES = (1.0, 30.0, 1e3, 1e4)
"""Of outlier channels, as real transformers have them, relative to the others."""


@st.composite
def outlier_channels(draw: st.DrawFn, size: int) -> tuple[Matrix, Matrix]:
    """Scales of the channels of two tasks: one or several large ones, shared or not."""
    amplitude = draw(st.sampled_from(AMPLITUDES))
    few = st.lists(st.integers(0, size - 1), min_size=1, max_size=3, unique=True)
    new, old = np.ones(size), np.ones(size)
    large = draw(few)
    new[large] = amplitude
    old[large if draw(st.booleans()) else draw(few)] = amplitude
    return new, old


def scaled(moment: Matrix, channels: Matrix) -> Matrix:
    """The moment of the same tokens with every channel multiplied."""
    return np.asarray(moment * np.outer(channels, channels))


PRECISIONS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that tokens come in."""


def rounded(tokens: Matrix, precision: str) -> Matrix:
    """Tokens with the digits of a dtype, as float64: other libraries read them as they are."""
    if precision == "bfloat16":
        # The upper half of a float32, rounded to the nearest.
        bits = tokens.astype(np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return np.asarray(bits.view(np.float32), dtype=np.float64)
    return np.asarray(tokens.astype(precision), dtype=np.float64)


@st.composite
def moment(draw: st.DrawFn, size: int, kinds: tuple[str, ...] = tuple(SPECTRA)) -> Matrix:
    """One second moment with one of the spectra, in random coordinates."""
    rng = np.random.default_rng(draw(seeds))
    values = SPECTRA[draw(st.sampled_from(kinds))](size, rng)
    return from_spectrum(values, orthogonal(size, rng))


@st.composite
def pencils(
    draw: st.DrawFn,
    max_size: int = 8,
    kinds: tuple[str, ...] = tuple(SPECTRA),
    *,
    dead: bool = True,
    outliers: bool = True,
) -> tuple[Matrix, Matrix, int]:
    """A pair (new, old) of moments of one size, sometimes with a shared dead direction; a rank.

    Sometimes with channels that are much larger than the others.
    """
    size = draw(st.integers(1, max_size))
    new, old = draw(moment(size, kinds)), draw(moment(size, kinds))
    if outliers:
        channels = draw(outlier_channels(size))
        new, old = scaled(new, channels[0]), scaled(old, channels[1])
    if dead and size > 2 and draw(st.booleans()):
        direction = np.random.default_rng(draw(seeds)).standard_normal(size)
        new, old = with_dead_direction(new, direction), with_dead_direction(old, direction)
    return new, old, draw(st.integers(1, size))


@st.composite
def branches(
    draw: st.DrawFn,
    kinds: tuple[str, ...] = tuple(SPECTRA),
    *,
    dead: bool = True,
    outliers: bool = True,
) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Up-projection, down-projection and two moments: the arguments of recalibration."""
    new, old, rank = draw(pencils(6, kinds, dead=dead, outliers=outliers))
    rng = np.random.default_rng(draw(seeds))
    up = rng.standard_normal((draw(st.integers(1, 7)), rank))
    down = rng.standard_normal((rank, len(new)))
    return up, down, new, old
