"""Tables on the scale of the ridge in docs/developers/numerics.md. Needs the test extra.

Parts 2 and 3 read the activations of pretrained transformers on photographs. They are skipped, with
the reason, where the folder that LODA_SHARED names (default: ../shared) lacks them.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg

from loda_math import isolated_subspace

SHARED = Path(os.environ.get("LODA_SHARED", Path(__file__).parents[3] / "shared")) / "data"
CAP = 8  # as the library has it, for the diagonal ridge
ALPHA = 1e-2

Moments = dict[tuple[int, int], Any]
"""Second moments by task and half of its images."""


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    lines = [f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows]]
    sys.stdout.write("\n".join([f"**{title}**", "", *lines, "\n"]))
    sys.stdout.flush()


def unit(s: Any) -> Any:
    """Moment of trace one; a zero moment stays zero."""
    return s / (np.trace(s) or 1)


def share(u: Any, s: Any) -> float:
    """Relative energy of a basis, which need not be orthonormal."""
    return float(np.trace(u.T @ s @ u) / np.trace(s))


# The ridges that are compared: each gives a basis from (new, old, rank, α).


def relative_to(scale: Callable[[Any, int], float]) -> Callable[..., Any]:
    """Isotropic ridge, α times a function of the falling eigenvalues (of sum D) and the rank."""

    def solve(new: Any, old: Any, rank: int, alpha: float) -> Any:
        values = np.clip(np.linalg.eigvalsh(unit(old))[::-1], 0, None) * len(old)
        c = scale(values, rank) if values[0] > 0 else 1.0
        return isolated_subspace(new, old, rank, ridge=alpha * c)

    return solve


def of_pooled_median(new: Any, old: Any, rank: int, alpha: float) -> Any:
    """Isotropic ridge, α times the median eigenvalue of the mean of both moments."""
    c = float(np.median(np.linalg.eigvalsh(unit(old) / 2 + unit(new) / 2)) * len(old))
    return isolated_subspace(new, old, rank, ridge=alpha * c)


def of_median_channel(new: Any, old: Any, rank: int, alpha: float) -> Any:
    """Isotropic ridge, α times the median energy of a channel."""
    c = float(np.median(np.diag(unit(old))) * len(old)) if old.any() else 1.0
    return isolated_subspace(new, old, rank, ridge=alpha * c)


def named(scale: Any) -> Callable[..., Any]:
    """A setting of the library."""
    return lambda new, old, rank, alpha: isolated_subspace(
        new, old, rank, ridge=alpha, ridge_scale=scale
    )


def diagonal(new: Any, old: Any, rank: int, alpha: float) -> Any:
    """Ridge α times the energy of each channel, at least the typical one."""
    d = np.diag(unit(old))
    sums, n = np.cumsum(np.sort(d)), np.arange(-(-len(d) // CAP))
    c = (sums[len(d) - 1 - n] / (len(d) - CAP * n)).min() if old.any() else 1 / len(d)
    return pencil(unit(new), unit(old) + alpha * np.diag(np.maximum(d, c)), rank)


def scaled(new: Any, old: Any, rank: int, alpha: float) -> Any:
    """Isotropic ridge after each channel is divided by its root energy in both tasks."""
    c = 1 / np.sqrt(np.diag(unit(old) + unit(new)))
    new, old = (unit(s) * np.outer(c, c) for s in (new, old))
    turned = isolated_subspace(new, old, rank, ridge=alpha)
    return np.linalg.qr(c[:, None] * turned)[0]


def pencil(new: Any, r: Any, rank: int) -> Any:
    """Leading generalised eigenvectors of (new, R), made orthonormal in this order."""
    values = (len(r) - rank, len(r) - 1)
    return np.linalg.qr(linalg.eigh(new, r, subset_by_index=values)[1][:, ::-1])[0]


def effective_dimension(values: Any, _: int) -> float:
    """The c with tr(S (S + c I)⁻¹) = D / 8."""
    low, high = 1e-12, CAP * values[0]
    for _ in range(100):
        middle = np.sqrt(low * high)
        above = (values / (values + middle)).sum() > len(values) / CAP
        low, high = (middle, high) if above else (low, middle)
    return float(np.sqrt(low * high))


RIDGES: dict[str, Callable[..., Any]] = {
    "mean (default)": named("mean"),
    "median eigenvalue": relative_to(lambda v, _: float(np.median(v))),
    "median eigenvalue, pooled": of_pooled_median,
    "mean without the r largest": relative_to(lambda v, r: float(v[r:].mean())),
    "geometric mean": relative_to(lambda v, _: float(np.exp(np.log(v + 1e-12).mean()))),
    "squared mean of roots": relative_to(lambda v, _: float(np.sqrt(v).mean() ** 2)),
    "effective dimension D/8": relative_to(effective_dimension),
    "`eigenvalues`": named("eigenvalues"),
    "median channel": of_median_channel,
    "`channels`": named("channels"),
    "diagonal, with a floor": diagonal,
    "channels scaled to one": scaled,
}


# Real activations do not tell the others from a small α.
ON_ACTIVATIONS = {
    name: RIDGES[name]
    for name in RIDGES
    if name not in ("median eigenvalue, pooled", "geometric mean", "squared mean of roots")
}


# 1. Spectra with outliers


def spectra() -> None:
    """Part 1: 60 features of energy 1, four of the new task alone, some of them enlarged."""
    size, rank = 64, 4
    amplitudes = (1, 10, 30, 100, 1000, 10000)
    for title, count, rotated, holders in (
        ("one channel, in both tasks", 1, False, "on"),
        ("four channels, in both tasks", 4, False, "on"),
        ("one direction, in both tasks", 1, True, "on"),
        ("four directions, in both tasks", 4, True, "on"),
        ("one channel, in the old task", 1, False, "o"),
    ):
        rows = []
        cases = [enlarged(size, count, a, rotated, holders) for a in amplitudes]
        for name, solve in RIDGES.items():
            cells = []
            for moments, own in cases:
                u = solve(moments["na"], moments["oa"], rank, ALPHA)
                ratio = share(u, moments["nb"]) / share(u, moments["ob"])
                cells.append(f"{ratio:.3g} ({np.linalg.norm(own.T @ u) ** 2 / rank:.2f})")
            rows.append([name, *cells])
        table(f"1. {title}", ["ridge", *(f"{a:g}" for a in amplitudes)], rows)
    # Without a history the best directions are known.
    new = enlarged(size, 1, 10, False, "on")[0]["na"]
    most = np.linalg.eigvalsh(new)[-rank:].sum() / np.trace(new)
    rows = [
        [name, f"{share(solve(new, 0 * new, rank, ALPHA), new) / most:.4f}"]
        for name, solve in RIDGES.items()
    ]
    table("1. no history: share of the most energy", ["ridge", "share"], rows)


def enlarged(
    size: int, count: int, amplitude: float, rotated: bool, holders: str
) -> tuple[dict[str, Any], Any]:
    """Moments of fresh tokens of old and new task, twice, and the directions of the new alone."""
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(size, size)))[0] if rotated else np.eye(size)
    moments = {}
    for which in ("oa", "ob", "na", "nb"):
        tokens = rng.normal(size=(4000, size))
        if which[0] == "o":
            tokens[:, -4:] *= 0.05
        if which[0] in holders:
            tokens[:, :count] *= amplitude
        tokens = tokens @ turn.T
        moments[which] = tokens.T @ tokens / len(tokens)
    return moments, turn[:, -4:]


# 2. and 3. Real activations


def photographs(classes: list[str], each: int, size: int) -> Any:
    """Images of some classes of Caltech-101, with values from 0 to 1."""
    import torch
    from PIL import Image

    folder = SHARED / "caltech101" / "train"
    files = [f for name in classes for f in sorted((folder / name).glob("*.jpg"))[:each]]
    opened = [Image.open(f).convert("RGB").resize((size, size)) for f in files]
    pixels = np.stack([np.asarray(image, np.float32) / 255 for image in opened])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def activations(model: Any, images: Callable[[list[str]], Any], names: list[str]) -> list[Moments]:
    """Moments of the inputs of some linear layers, by layer, of four tasks of ten classes.

    The halves of a task have different images.
    """
    import torch

    classes = sorted(f.name for f in (SHARED / "caltech101" / "train").iterdir())
    order = np.random.RandomState(0).permutation(len(classes))
    found: list[Moments] = [{} for _ in names]
    for task in range(4):
        pixels = images([classes[i] for i in order[10 * task : 10 * task + 10]])
        for half in range(2):
            hooks = []
            for name, layer in zip(names, found, strict=True):
                layer[task, half] = 0

                def add(_: Any, given: Any, layer: Any = layer, key: Any = (task, half)) -> None:
                    tokens = given[0].flatten(0, 1).double()
                    layer[key] = layer[key] + (tokens.T @ tokens).numpy()

                hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
            with torch.no_grad():
                for batch in pixels[half::2].split(40):
                    model(batch)
            for hook in hooks:
                hook.remove()
    return found


def transformer() -> tuple[list[str], list[Moments]]:
    """DINOv2 ViT-S/14: qkv, proj and fc1 of three blocks (fc2 is four times as wide)."""
    import timm
    import torch
    from safetensors.torch import load_file

    model: Any = timm.create_model(
        "vit_small_patch14_dinov2", img_size=518, dynamic_img_size=True, num_classes=0
    )
    weights = load_file(SHARED / "vit_small_patch14_dinov2.saliency.safetensors")
    model.load_state_dict({k: w.float() for k, w in weights.items()}, strict=False)
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1")
    names = [f"blocks.{b}.{x}" for b in (0, 6, 11) for x in kinds]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]

    def images(classes: list[str]) -> Any:
        return (photographs(classes, 24, 98) - mean) / std

    return names, activations(model.eval(), images, names)


def small_transformer() -> tuple[list[str], list[Moments]]:
    """The package's `cifar_vit`: all four target layers of every other block."""
    from training.backbones.build import build_backbone
    from training.config import BackboneConfig

    backbone = build_backbone(BackboneConfig(name="cifar_vit"))
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = [f"blocks.{b}.{x}" for b in (0, 2, 4) for x in kinds]

    def images(classes: list[str]) -> Any:
        return (photographs(classes, 24, backbone.image_size or 32) - 0.5) / 0.5

    return names, activations(backbone.module.eval(), images, names)


def pairs(layer: Moments) -> Iterator[tuple[Any, Any, Any, Any]]:
    """New and old moment to choose from, and those of other images to judge by."""
    for old, new in (((0,), 1), ((0, 1, 2), 3), ((2,), 0)):
        for half in range(2):
            olds = (sum(layer[t, h] for t in old) for h in (half, 1 - half))
            yield (layer[new, half], next(olds), layer[new, 1 - half], next(olds))


def mean_of(cells: list[tuple[float, float]]) -> str:
    """Geometric means of held-out ratios and new-task energies."""
    ratio, energy = np.exp(np.log(cells).mean(axis=0))
    return f"{ratio:.3f} ({100 * energy:.2f})"


def real(name: str, layers: list[Moments], rank: int = 16) -> None:
    """Part 2: activations as they are, at four strengths."""
    alphas = (1e-3, 1e-2, 3e-2, 1e-1)
    rows = []
    for ridge, solve in ON_ACTIVATIONS.items():
        row = [ridge]
        for alpha in alphas:
            cells = []
            for layer in layers:
                for new, old, unseen, unseen_old in pairs(layer):
                    u = solve(new, old, rank, alpha)
                    cells.append((share(u, unseen) / share(u, unseen_old), share(u, unseen)))
            row.append(mean_of(cells))
        rows.append(row)
    title = f"2. {name}: held-out ratio (new-task energy in per cent), r = {rank}"
    table(title, ["ridge", *(f"α = {a:g}" for a in alphas)], rows)


def injected(name: str, layers: list[Moments], rotated: bool, rank: int = 16) -> None:
    """Part 3: some channels, or directions, enlarged; judged by all the others."""
    cases = [(0, 1), (1, 10), (1, 100), (4, 10), (4, 100), (12, 100)]
    rows: dict[str, list[str]] = {ridge: [] for ridge in ON_ACTIVATIONS}
    for count, amplitude in cases:
        cells: dict[str, list[tuple[float, float]]] = {ridge: [] for ridge in ON_ACTIVATIONS}
        for layer in layers:
            for new, old, unseen, unseen_old in list(pairs(layer))[:2]:
                stretch, rest = enlarge(old, count, amplitude, rotated)
                for ridge, solve in ON_ACTIVATIONS.items():
                    seen = [stretch @ s @ stretch.T for s in (new, old)]
                    u = rest @ solve(*seen, rank, ALPHA)
                    clean = [rest @ s @ rest for s in (unseen, unseen_old)]
                    energy = share(u, clean[0])
                    cells[ridge].append((energy / share(u, clean[1]), energy))
        for ridge in ON_ACTIVATIONS:
            rows[ridge].append(mean_of(cells[ridge]))
    what = "directions" if rotated else "channels"
    head = ["none", *(f"{count} × {amplitude}" for count, amplitude in cases[1:])]
    title = f"3. {name}, {what} enlarged: held-out ratio (new-task energy in per cent) of the rest"
    table(title, ["ridge", *head], [[ridge, *cells] for ridge, cells in rows.items()])


def enlarge(old: Any, count: int, amplitude: float, rotated: bool) -> tuple[Any, Any]:
    """Map that gives directions ``amplitude`` times the median channel, and the projection off."""
    size, rng = len(old), np.random.default_rng(count)
    chosen = rng.choice(size, count, replace=False)
    some = np.linalg.qr(rng.normal(size=(size, count)))[0] if rotated else np.eye(size)[:, chosen]
    present = np.sqrt(np.sum(some * (old @ some), axis=0))
    factor = amplitude * np.sqrt(np.median(np.diag(old))) / np.maximum(present, 1e-9)
    rest = np.eye(size) - some @ some.T
    return rest + (some * factor) @ some.T, rest


def shares(names: list[str], layers: list[Moments]) -> None:
    """Typical over mean energy of the history, layer by layer."""
    from loda_math._subspaces import typical_share

    rows = []
    for name, layer in zip(names, layers, strict=True):
        s = unit(layer[0, 0])
        channels, values = np.diag(s), np.linalg.eigvalsh(s)
        row = [channels.max() / np.median(channels), values[-1]]
        row += [float(typical_share(np, x)) for x in (channels, values)]
        rows.append([name.removeprefix("blocks."), *(f"{x:.3g}" for x in row)])
    head = ["layer", "largest channel / median", "λ₁ / tr", "`channels`", "`eigenvalues`"]
    table("2. typical over mean energy", head, rows)


def main() -> None:
    """Print every table."""
    spectra()
    for name, read, needed in (
        ("DINOv2 ViT-S/14", transformer, "vit_small_patch14_dinov2.saliency.safetensors"),
        ("cifar_vit", small_transformer, "caltech101"),
    ):
        missing = [f for f in {"caltech101", needed} if not (SHARED / f).exists()]
        if missing:
            absent = " and no ".join(sorted(missing))
            sys.stdout.write(f"{name} skipped: {SHARED} has no {absent}\n\n")
            continue
        names, layers = read()
        shares(names, layers)
        real(name, layers)
        if name == "cifar_vit":
            for rotated in (False, True):
                injected(name, layers, rotated)


if __name__ == "__main__":
    main()
