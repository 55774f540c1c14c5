"""Tables and figure of numerics.md (with ``--full``: 1e7 tokens). Needs the test extra."""

import sys
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
from scipy import linalg

from loda_math import Moments, combine, isolated_subspace, second_moment

D, RANK, RIDGE = 64, 8, 1e-2
SINGLE, DOUBLE = (float(np.finfo(t).eps) for t in (np.float32, np.float64))


def table(title: str, header: str, rows: list[list[Any]]) -> None:
    """Print a Markdown table, column names split at semicolons."""
    cells = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    cells = [header.split(";"), ["---"] * len(rows[0]), *cells]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    sys.stdout.write("\n".join([f"**{title}**", "", *lines, "\n"]))


def unit(s: Any, ridge: float = 0.0) -> Any:
    """Moment of trace one, with the ridge on it: R, if it is the history."""
    return s / np.trace(s) + np.eye(len(s)) * (ridge / len(s))


def float32_cholesky(new: Any, old: Any) -> tuple[Any, float]:
    """Isolated basis by LAPACK's float32 pencil solver, and the jitter, relative to the mean."""
    s, r = ((unit(x) * len(x)).astype(np.float32) for x in (new, old))
    jitter = 0.0
    while True:
        try:
            lifted = r + np.float32(jitter) * np.eye(len(r), dtype=np.float32)
            return np.linalg.qr(linalg.eigh(s, lifted)[1][:, -RANK:])[0], jitter
        except np.linalg.LinAlgError:
            jitter = 10 * jitter or 1e-8


def share(u: Any, new: Any, r: Any) -> float:
    """The objective of u, tr((UᵀRU)⁻¹ UᵀS̄_newU), relative to the optimum by SciPy in float64."""
    best = linalg.eigh(unit(new), r, eigvals_only=True)[-RANK:].sum()
    return float(np.trace(np.linalg.solve(u.T @ r @ u, u.T @ unit(new) @ u)) / best)


def wide(x: Any) -> Any:
    """Copy with 50 digits, as an array of objects."""
    mpmath.mp.dps = 50
    return np.vectorize(mpmath.mpf, otypes=[object])(x)


def made_up(kind: str, cond: float) -> tuple[Any, Any, Any]:
    """New moment and history in 50 digits, and the direction in which both are exactly zero."""
    rng = np.random.default_rng(0)
    dead = np.ones((D, 1)) / D**0.5
    columns = np.concatenate([[dead, dead], rng.normal(size=(2, D, D - 1))], axis=2)
    first, second = np.linalg.qr(columns)[0][..., 1:]
    mixing = np.linalg.qr(rng.normal(size=(D - 1, D - 1)))[0]
    spread = np.geomspace(1, 0.1, D - 1)
    old = wide(first * np.geomspace(1, cond**-0.5, D - 1))
    old = old - old.sum(axis=0) / D  # takes the dead direction out to 50 digits
    new = wide(second * spread) if kind == "unrelated" else old @ wide(mixing * spread)
    new = new - new.sum(axis=0) / D
    return unit(new @ new.T), unit(old @ old.T), dead


def exact_shares(bases: list[Any], new: Any, r: Any) -> list[float]:
    """Like ``share``, in 50 digits but for the leading eigenvalues of the final L⁻¹SL⁻ᵀ."""
    factor, m = r * 0, new
    for j in range(D):
        column = r[j:, j] - factor[j:, :j] @ factor[j, :j]
        factor[j:, j] = column / mpmath.sqrt(column[0])
    for _ in range(2):
        m = m.T.copy()
        for i in range(D):
            m[i] = (m[i] - factor[i, :i] @ m[:i]) / factor[i, i]
    best = np.linalg.eigvalsh(m.astype(np.float64))[-RANK:].sum()
    parts = [[mpmath.matrix((u.T @ x @ u).tolist()) for x in (r, new)] for u in map(wide, bases)]
    inner = [np.array((mpmath.inverse(below) * above).tolist()) for below, above in parts]
    return [float(np.trace(m) / best) for m in inner]


def cosines(bases: list[Any], dead: Any) -> list[float]:
    """For each basis, the cosine of the smallest angle between its span and dead directions."""
    return [float(np.linalg.norm(dead.T @ u, 2)) for u in bases]


def conditioned(kind: str) -> list[list[list[Any]]]:
    """Part 1: rows for the default ridge and for the smallest one."""
    usual, bare = [], []
    for cond in 10.0 ** np.arange(2, 17, 2):
        new, old, dead = made_up(kind, cond)
        double = [x.astype(np.float64) for x in (new, old)]
        single = [x.astype(np.float32) for x in double]
        r = unit(double[1], RIDGE)
        jittered, jitter = float32_cholesky(*single)
        ours = [isolated_subspace(*s, RANK) for s in (double, single)]
        bases = [*ours, float32_cholesky(single[0], r)[0], jittered]
        shares = [share(u, double[0], r) for u in bases]
        usual.append([f"{cond:.0e}", *shares, *cosines(bases, dead), jitter])
        small = (isolated_subspace(*s, RANK, ridge=0) for s in (double, single))
        bases = [*small, ours[0], jittered]
        shares = exact_shares(bases, new, unit(old, 4 * D * DOUBLE))
        bare.append([f"{cond:.0e}", *shares, *cosines(bases, dead), jitter])
    return [usual, bare]


def real() -> list[list[list[Any]]]:
    """Part 2: every qkv layer of the glyph backbone, one digit class after another."""
    from backends.torch import collect_moments, find_layers
    from training.backbones.build import build_backbone
    from training.config import BackboneConfig, DataConfig
    from training.data import build_stream, loader, test_transform

    # With held-out training images the stream never opens the test split.
    data = DataConfig(init_cls=1, increment=1, tasks=2, validation=0.1)
    stream, usual, bare, tokens, moments = build_stream(data, seed=0), [], [], [], []
    for labels in stream.tasks:
        model = build_backbone(BackboneConfig()).module
        tokens.append({name: [] for name in find_layers(model)})
        for name, layer in find_layers(model).items():
            keep = tokens[-1][name].append
            layer.register_forward_pre_hook(lambda _, x, f=keep: f(x[0].flatten(0, 1).numpy()))
        images = stream.train.subset(labels).with_transform(test_transform(data))
        moments.append(collect_moments(model, loader(images, 16, shuffle=False, seed=0)))
    for name in moments[0]:
        batches = [task[name] for task in tokens]
        old, new = (x.T @ x / len(x) for x in (np.concatenate(b, dtype=float) for b in batches))
        double = [task[name].mean.numpy() for task in moments[::-1]]
        values, vectors = np.linalg.eigh(unit(old) + unit(new))
        dead = vectors[:, values < 1e-6]
        jittered, jitter = float32_cholesky(*(running_mean(b) for b in batches[::-1]))
        for rows, ridge, least in ((usual, RIDGE, RIDGE), (bare, 0.0, 4 * len(old) * DOUBLE)):
            r = unit(old, least)
            bases = [isolated_subspace(*double, RANK, ridge=ridge, accumulation_eps=SINGLE)]
            bases += [isolated_subspace(*(s.astype("f") for s in double), RANK, ridge=ridge)]
            bases += [jittered, np.linalg.qr(linalg.eigh(unit(new), r)[1][:, -RANK:])[0]]
            shares = [share(u, new, r) for u in bases[:3]]
            rows.append([name.split(".")[1], len(dead.T), *shares, *cosines(bases, dead), jitter])
    return [usual, bare]


def running_mean(batches: Any, mean: Any = 0, count: int = 0) -> Any:
    """Float32 mean of the moments of batches, weighted by tokens, as research code keeps it."""
    for x in batches:
        count += len(x)
        mean = mean + np.float32(len(x) / count) * (x.T @ x / np.float32(len(x)) - np.float32(mean))
    return mean


def accumulated(spread: float, count: int) -> list[Any]:
    """Part 3: smallest eigenvalue by several ways of summing, relative to float64 sums."""
    import torch

    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0].T
    colour = (np.geomspace(1, spread**0.5, D)[:, None] * turn).astype(np.float32)
    mean = np.zeros((D, D), np.float32)
    compensated = Moments(mean, 0, mean)
    ours, cast = (second_moment(torch.zeros(0, D, dtype=t)) for t in (torch.float, torch.bfloat16))
    truth, truth_half, half = (np.zeros((D, D)) for _ in range(3))
    for start in range(0, count, 1040):  # tokens of 16 images of 65
        size = min(1040, count - start)
        x = rng.standard_normal((size, D), dtype=np.float32) @ colour
        cut = torch.from_numpy(x).bfloat16()
        ours = combine(ours, second_moment(torch.from_numpy(x)))
        compensated = combine(compensated, Moments(x.T @ x, size, 0 * mean))
        mean = running_mean([x], mean, start)
        half += (cut.mT @ cut).double().numpy()
        cast = combine(cast, second_moment(cut))
        for total, tokens in ((truth, x.astype(float)), (truth_half, cut.double().numpy())):
            total += tokens.T @ tokens
    sums = (truth / count, ours.mean, compensated.mean, mean, half / count)
    sums = [np.asarray(s, np.float64) for s in (*sums, cast.mean, truth_half / count)]
    least = [float(np.linalg.eigvalsh((s + s.T) / 2)[0]) for s in sums]
    return [f"{spread:.0e}", *(x / least[0] for x in least[1:5]), least[5] / least[6]]


def main() -> None:
    """Print every table, then draw."""
    from matplotlib.figure import Figure

    head, alpha = "rule f64;rule f32;{}f32 + jitter;", ("= 0.01", "→ 0")
    for kind in ("unrelated", "related"):
        made = conditioned(kind)
        for k, third in enumerate(("f32, same R;", "rule, α = 0.01;")):
            names = "cond;" + (head + "cos: " + head).format(third, third) + "jitter"
            table(f"1. {kind} tasks, α {alpha[k]}", names, made[k])
    layers = real()
    for k in (0, 1):
        names = (head + "cos: " + head).format("", "")
        table(f"2. qkv layers, α {alpha[k]}", f"block;dead;{names}optimum;jitter", layers[k])
    count = 10_000_000 if "--full" in sys.argv else 1_000_000
    sums = [accumulated(s, count) for s in (1e-2, 1e-4, 1e-6, 1e-7, 1e-8, 1e-9)]
    names = "λ_min / λ_max;second_moment;compensated f32;f32 running mean;bf16 Gram;bf16, cast up"
    table(f"3. smallest eigenvalue, {count} tokens", names, sums)
    ways = ("rule, float64 input", "rule, float32 input", "float32 Cholesky + jitter")
    last = ("second_moment", "float32 running mean", "bfloat16 Gram")
    fig = Figure(figsize=(10, 7.4), layout="constrained")
    for panel, rows, columns, below, horizontal, scale, labels in (
        ("A. Related tasks, α = 0.01", made[0], (1, 2, 4), "cond(S_old)", "log", "log", ways),
        ("B. Related tasks, α → 0", made[1], (1, 2, 4), "cond(S_old)", "log", "linear", ways),
        ("C. qkv layers, α = 0.01", layers[0], (2, 3, 4), "block", "linear", "linear", ways),
        ("D. Smallest eigenvalue", sums, (1, 3, 4), "λ_min / λ_max", "log", "symlog", last),
    ):
        ax = fig.add_subplot(2, 2, "ABCD".index(panel[0]) + 1)
        for k, column in enumerate(columns):
            x, y = ([float(row[i]) for row in rows] for i in (0, column))
            ax.plot(x, y, "osD"[k] + "-", ms=9 - 2 * k, color=f"C{k}", label=labels[k])
        ax.set(title=panel, xlabel=below, xscale=horizontal, yscale=scale)
        ax.legend(frameon=False)
    fig.supylabel("share of the best (A to C) or of the true (D) value")
    fig.savefig(Path(__file__).parents[1] / "images" / "numerics.png", dpi=130)


if __name__ == "__main__":
    main()
