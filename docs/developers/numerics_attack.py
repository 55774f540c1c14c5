"""Attacks on loda_math by independent oracles: prints how many cases were tried, and how many held.

``make attack`` runs it; an argument scales the number of cases (0.1: a tenth of them).
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import combinations, product
from typing import Any

import array_api_strict
import mpmath
import numpy as np
import scipy.linalg

import loda_math as lm

mpmath.mp.dps = 60
EPS = float(np.finfo(np.float64).eps)
Case = tuple[float, str]
"""By how much a result misses the oracle, relative to what it may be, and what it was."""

SPECTRA: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "random": lambda d, rng: rng.uniform(0.1, 1, d),
    "clustered": lambda d, rng: (
        np.where(np.arange(d) < (d + 1) // 2, 1, 1e-2) * (1 + 1e-9 * rng.random(d))
    ),
    "deficient": lambda d, rng: np.where(np.arange(d) < (d + 1) // 2, rng.uniform(0.1, 1, d), 0),
    "conditioned": lambda d, _: np.geomspace(1, 1e-12, d),
    "spiked": lambda d, rng: np.append(1e6, rng.uniform(0.5, 1, d - 1)),
}


def wide(x: Any) -> Any:
    """Every entry as a number of 60 digits."""
    return np.vectorize(mpmath.mpf, otypes=[object])(x)


def factor(size: int, rng: np.random.Generator, kind: str, loud: float = 1.0) -> Any:
    """X of a moment XᵀX with the spectrum, in random coordinates, one channel scaled."""
    q = [np.linalg.qr(rng.standard_normal((size, size)))[0] for _ in range(2)]
    x = (q[0] * np.sqrt(SPECTRA[kind](size, rng))) @ q[1].T
    x[:, 0] *= loud
    return x


def moments(x: Any) -> tuple[Any, Any]:
    """XᵀX in 60 digits, and rounded to float64."""
    exact = wide(x).T @ wide(x)
    rounded = exact.astype(np.float64)
    return exact, (rounded + rounded.T) / 2


def eigenvalues(m: Any) -> Any:
    """Falling eigenvalues of a symmetric matrix, in 60 digits."""
    values = mpmath.eigsy(mpmath.matrix(m.tolist()), eigvals_only=True)
    return np.array(sorted(values, reverse=True), dtype=object)


def inverse(m: Any) -> Any:
    """M⁻¹ in 60 digits."""
    return np.array((mpmath.matrix(m.tolist()) ** -1).tolist(), dtype=object)


def pseudo_inverse(m: Any) -> Any:
    """M⁺ of a positive semi-definite matrix that is exact to more than 40 digits."""
    values, vectors = mpmath.eigsy(mpmath.matrix(m.tolist()))
    q = np.array(vectors.tolist(), dtype=object)
    least = max(abs(v) for v in values) * mpmath.mpf(10) ** -40
    return (q * np.array([1 / v if abs(v) > least else 0 for v in values], dtype=object)) @ q.T


def pencils(count: int, seed: int, ridges: tuple[float, ...]) -> Iterator[tuple[Any, ...]]:
    """X_new, X_old, a rank, a ridge, and what they are; one in three shares a dead direction."""
    kinds = tuple(SPECTRA)
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        size = int(rng.integers(3, 7))
        new, old = kinds[k % 5], kinds[k // 5 % 5]
        loud = (1.0, 1.0, 30.0, 1e3)[k % 4]
        x, y = factor(size, rng, new, loud), factor(size, rng, old, loud)
        if k % 3 == 0:
            x, y = (m - m.sum(axis=1, keepdims=True) / size for m in (x, y))
        ridge = ridges[k % len(ridges)]
        yield x, y, int(rng.integers(1, size)), ridge, f"{new}/{old}, channel {loud:g}, α {ridge:g}"


def general() -> Iterator[Case]:
    """Energy of the general subspace, against the leading eigenvalues."""
    for x, y, rank, _, name in pencils(count(150), 1, (0.0,)):
        (n, new), (o, old) = moments(x), moments(y)
        u = wide(lm.general_subspace(new, old, rank))
        best = sum(eigenvalues(n + o)[:rank])
        yield float(1 - np.trace(u.T @ (n + o) @ u) / best), name


def isolated(seed: int, ridges: tuple[float, ...], cases: int) -> Iterator[Case]:
    """The objective of Theorem 2.2, of bases whose moments were rounded to float64."""
    for x, y, rank, ridge, name in pencils(cases, seed, ridges):
        (n, new), (o, old) = moments(x), moments(y)
        size = len(new)
        alpha = mpmath.mpf(max(ridge, 4 * size * EPS))
        s, r = n / np.trace(n), o / np.trace(o) + alpha / size * wide(np.eye(size))
        lower = np.array(mpmath.cholesky(mpmath.matrix(r.tolist())).tolist(), dtype=object)
        half = inverse(lower)
        best = sum(eigenvalues(half @ s @ half.T)[:rank])
        u = lm.isolated_subspace(new, old, rank, ridge=ridge)
        u = wide(u[:, u.any(axis=0)])
        reached = np.trace(inverse(u.T @ r @ u) @ (u.T @ s @ u))
        yield float(1 - reached / best), name


def trace_ratio() -> Iterator[Case]:
    """κ* as the root of the sum of the leading eigenvalues of S − κR, in 60 digits."""
    for x, y, rank, ridge, name in pencils(count(60), 3, (1e-2,)):
        (n, new), (o, old) = moments(x), moments(y)
        size = len(new)
        s = n / np.trace(n)
        r = o / np.trace(o) + mpmath.mpf(ridge) / size * wide(np.eye(size))
        solution = lm.trace_ratio_solution(new, old, rank, ridge=ridge)
        kappa = mpmath.mpf(float(solution.ratio))
        for _ in range(3):  # Newton's steps, from next to the root
            values, vectors = mpmath.eigsy(mpmath.matrix((s - kappa * r).tolist()))
            leading = np.argsort([-float(v) for v in values])[:rank]
            u = np.array(vectors.tolist(), dtype=object)[:, leading]
            kappa = np.trace(u.T @ s @ u) / np.trace(u.T @ r @ u)
        yield float(abs(1 - float(solution.ratio) / kappa)), name


def floors() -> Iterator[Case]:
    """Every basis of coordinate axes of a diagonal pencil, against the certificate."""
    for k in range(count(400)):
        rng = np.random.default_rng((4, k))
        size = int(rng.integers(2, 7))
        rank, tau = int(rng.integers(1, size + 1)), float(rng.choice([0, 0.3, 0.7, 0.95, 1.0]))
        s, o = rng.uniform(0.1, 1, size), rng.uniform(0.1, 1, size) ** 3
        s, o = s / s.sum(), o / o.sum() + 1e-2 / size
        new, old = np.diag(s), np.diag(o - 1e-2 / size)
        solution = lm.trace_ratio_solution(new, old, rank, energy_floor=tau)
        most, miss = np.sort(s)[-rank:].sum(), float(solution.ratio - solution.upper)
        for axes in combinations(range(size), rank):
            subset = list(axes)
            ratio = s[subset].sum() / o[subset].sum()
            if s[subset].sum() >= tau * most:
                miss = max(miss, ratio / float(solution.upper) - 1)
            if s[subset].sum() >= float(solution.energy) * most * (1 + 1e-12):
                miss = max(miss, ratio / float(solution.ratio) - 1)
        yield miss, f"floor {tau}"


def loss(c: Any, gram: Any, p: Any, q: Any, gamma: Any) -> Any:
    """J(Λ) of Theorem 2.3, of the Gram matrix BᵀB and the projected moments."""
    rest = c - wide(np.eye(len(gram)))
    return np.trace(gram @ (c @ p @ c.T + gamma * rest @ q @ rest.T))


def recalibrations() -> Iterator[Case]:
    """Least losses in 60 digits: K⁺ for the full form, every set of bounds for the box."""
    scales = (1.0, 1e-40, 1e40)
    for k in range(count(1500)):
        rng = np.random.default_rng((5, k))
        size, rank = int(rng.integers(2, 6)), int(rng.integers(1, 4))
        kinds = tuple(SPECTRA)
        x = factor(size, rng, kinds[k % 5], (1.0, 1e3)[k % 2]) * np.sqrt(scales[k % 3])
        y = factor(size, rng, kinds[k // 5 % 5], (1.0, 1e3)[k % 2]) * np.sqrt(scales[k // 3 % 3])
        up, down = rng.standard_normal((4, rank)), rng.standard_normal((rank, size))
        if k % 4 == 0:
            down[-1] = down[0]  # rows that depend on each other
        if k % 7 == 0:
            up[:, 0] = 0
        gamma = float(rng.choice([1e-3, 0.5, 1, 30, 1e4]))
        (n, new), (o, old) = moments(x), moments(y)
        gram, a = wide(up).T @ wide(up), wide(down)
        p, q = a @ o @ a.T, a @ n @ a.T
        # Moments of any scale: what counts is their ratio, which γ follows.
        gamma *= float(np.trace(p) / np.trace(q))
        if not 1e-300 < gamma < 1e300:
            continue
        scale = loss(wide(np.zeros((rank, rank))), gram, p, q, gamma)
        if scale == 0:  # one column of B, and that is zero: every Λ is as good
            continue
        for form, best in least_losses(gram, p, q, mpmath.mpf(gamma)).items():
            ours = lm.recalibration(up, down, new, old, gamma, form)
            miss = (loss(wide(ours), gram, p, q, gamma) - best) / scale
            yield float(miss), f"{form}, {kinds[k % 5]}/{kinds[k // 5 % 5]}, γ {gamma:.0e}"


def least_losses(gram: Any, p: Any, q: Any, gamma: Any) -> dict[str, Any]:
    """The least J of each form that has an optimum in closed form."""
    rank = len(gram)
    k = p + gamma * q
    quadratic, linear = gram * k, gamma * (gram * q).sum(axis=1)
    boxed = []
    for fixed in product((None, 0, 1), repeat=rank):
        free = [i for i in range(rank) if fixed[i] is None]
        point = wide(np.array([0 if f is None else f for f in fixed], dtype=float))
        if free:
            rest = linear[free] - quadratic[free] @ point
            point[free] = pseudo_inverse(quadratic[np.ix_(free, free)]) @ rest
        if all(0 <= v <= 1 for v in point):
            boxed.append(loss(np.diag(point), gram, p, q, gamma))
    return {
        "full": loss(gamma * q @ pseudo_inverse(k), gram, p, q, gamma),
        "diagonal": loss(np.diag(pseudo_inverse(quadratic) @ linear), gram, p, q, gamma),
        "box": min(boxed),
        "scalar": loss(
            wide(np.eye(rank)) * (gamma * np.sum(gram * q) / np.sum(gram * k)), gram, p, q, gamma
        ),
    }


def partial_spectra() -> Iterator[Case]:
    """Lanczos, part of a spectrum and the null space, at sizes where they run, against SciPy."""
    for k in range(count(40)):
        rng = np.random.default_rng((6, k))
        size, rank = (200, 320)[k % 2], int(rng.integers(1, 24))
        kinds = tuple(SPECTRA)
        x, y = (factor(size, rng, kinds[i % 5], (1.0, 1e3)[k % 2]) for i in (k, k // 5))
        new, old = x.T @ x, y.T @ y
        new, old = new / np.trace(new), old / np.trace(old)
        r = old + 1e-2 / size * np.eye(size)
        u = lm.isolated_subspace(new, old, rank)
        u = u[:, u.any(axis=0)]
        best = scipy.linalg.eigh(new, r, eigvals_only=True)[::-1][:rank].sum()
        reached = np.trace(np.linalg.solve(u.T @ r @ u, u.T @ new @ u))
        yield float(1 - reached / best), f"isolated {size}"
        values = np.linalg.eigvalsh(old)
        v = lm.null_subspace(old, rank)
        yield abs(float(np.trace(v.T @ old @ v) - values[:rank].sum()) / values[-1]), f"null {size}"
        w = lm.general_subspace(old, None, rank)
        yield abs(float(1 - np.trace(w.T @ old @ w) / values[-rank:].sum())), f"general {size}"


def solved(new: Any, old: Any, up: Any, down: Any) -> list[Any]:
    """What a task asks for, as numbers that do not depend on the choice of a basis."""
    energy = lm.relative_energy
    general, isolated = lm.general_subspace(new, old, 3), lm.isolated_subspace(new, old, 3)
    best = lm.trace_ratio_solution(new, old, 3, energy_floor=0.6)
    update = lm.recalibration(up, down, new, old, 1.5)
    return [
        energy(general, new + old),
        energy(isolated, new),
        energy(isolated, old),
        best.ratio,
        energy(lm.null_subspace(old, 3), old),
        lm.recalibration_loss(update, up, down, new, old, 1.5),
    ]


def drawn(k: int) -> list[Any]:
    """Moments and a branch for each of four layers."""
    rng = np.random.default_rng((7, k))
    x, y = rng.standard_normal((2, 4, 12, 6)) * np.geomspace(1, 0.1, 6)
    both = [m.swapaxes(-1, -2) @ m / 12 for m in (x, y)]
    return [*both, rng.standard_normal((4, 5, 2)), rng.standard_normal((4, 2, 6))]


def difference(one: list[Any], other: list[Any]) -> float:
    """Largest relative difference between two lists of results."""
    return max(
        float(np.max(np.abs(np.asarray(a, dtype=float) / np.asarray(b, dtype=float) - 1)))
        for a, b in zip(one, other, strict=True)
    )


def libraries() -> Iterator[Case]:
    """Each library against NumPy, in stacks of four layers."""
    import jax
    import torch

    jax.config.update("jax_enable_x64", True)
    ways: dict[str, Callable[[Any], Any]] = {
        "torch": torch.from_numpy,
        "array-api-strict": array_api_strict.asarray,
        "jax": jax.numpy.asarray,
    }
    for name, made in ways.items():
        solve = jax.jit(solved) if name == "jax" else solved
        for k in range(count(40)):
            arrays = drawn(k)
            yield difference(solve(*map(made, arrays)), solved(*arrays)), name


def sharded() -> Iterator[Case]:
    """JAX arrays whose layers lie on two devices, compiled, against NumPy."""
    import jax

    jax.config.update("jax_enable_x64", True)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("layers",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("layers"))
    solve = jax.jit(solved)
    for k in range(count(40)):
        arrays = drawn(k)
        there = [jax.device_put(x, place) for x in arrays]
        yield difference(solve(*there), solved(*arrays)), f"{len(jax.devices())} devices"


def count(cases: int) -> int:
    """The number of cases, scaled by the argument of the command."""
    is_scaled = __name__ == "__main__" and len(sys.argv) > 1
    return math.ceil(cases * float(sys.argv[1] if is_scaled else 1))


ATTACKS: list[tuple[str, str, float, Callable[[], Iterator[Case]]]] = [
    ("general subspace", "60 digits", 1e-12, general),
    ("isolated subspace", "60 digits", 1e-11, lambda: isolated(2, (1e-2, 1.0), count(150))),
    ("hard pencils", "60 digits", 1e-11, lambda: isolated(8, (1e-10, 1e-6), count(200))),
    ("the same without a ridge", "60 digits", 1e-2, lambda: isolated(9, (0.0,), count(100))),
    ("trace ratio", "60 digits", 1e-11, trace_ratio),
    ("energy floors", "all subsets", 1e-9, floors),
    ("recalibration, four forms", "60 digits", 1e-9, recalibrations),
    ("large moments", "SciPy, whole spectrum", 1e-9, partial_spectra),
    ("torch, strict, JAX", "NumPy", 1e-9, libraries),
    ("sharded JAX", "NumPy", 1e-9, sharded),
]


def write(line: str) -> None:
    """A line of the report, as soon as it is known."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """Print a row for each attack; returns how many cases failed."""
    # Two devices for JAX, which is imported later.
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    write("| what | oracle | allowed | tried | held | largest miss | in |")
    write("| --- | --- | --- | --- | --- | --- | --- |")
    failed = 0
    for what, oracle, allowed, attack in ATTACKS:
        if attack in (libraries, sharded) and not (find_spec("jax") and find_spec("torch")):
            write(f"| {what} | {oracle} | {allowed:.0e} | 0 | | JAX or torch is not installed | |")
            continue
        cases = list(attack())
        held = sum(miss <= allowed for miss, _ in cases)
        worst, where = max(cases, key=lambda case: case[0])
        row = (what, oracle, f"{allowed:.0e}", len(cases), held, f"{worst:.1e}", where)
        write("| " + " | ".join(map(str, row)) + " |")
        failed += len(cases) - held
    return failed


if __name__ == "__main__":
    sys.exit(bool(main()))
