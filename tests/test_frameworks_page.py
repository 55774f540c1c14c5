"""The page for other frameworks: its JAX examples learn, need no torch, and match ours."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")


def example(heading: str) -> tuple[str, list[list[float]]]:
    """The first code of a section, and the numbers of each line that the page says it prints."""
    section = PAGE.partition(f"\n## {heading}\n")[2]
    code, printed = re.findall(r"^```\w*\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[:2]
    return code, shares(printed)


def test_the_mlx_example() -> None:
    pytest.importorskip("mlx", reason="MLX is not installed; make mlx has an environment with it")
    section = PAGE.partition("\n## MLX\n")[2]
    (code, *_) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    basis = np.asarray(names["basis"])
    assert names["new"].count == 100
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-6)


def shares(text: str) -> list[list[float]]:
    """The numbers of each line."""
    return [[float(x) for x in re.findall(r"\d\.\d\d", line)] for line in text.splitlines()]


def printed_by(code: str, promised: list[list[float]], *arguments: str) -> list[list[float]]:
    """Run an example in a process of its own, in which torch must not be loaded."""
    after = "import sys\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"{code}\n{after}", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    numbers = shares(done.stdout)
    # Other versions round otherwise: a few of some hundred labels may change sides.
    assert [len(x) for x in numbers] == [len(x) for x in promised]
    np.testing.assert_allclose(np.concatenate(numbers), np.concatenate(promised), atol=0.03)
    return numbers


@pytest.mark.jax
def test_the_jax_example() -> None:
    pytest.importorskip("jax")
    (first,), alone, _, loda = printed_by(*example("LoDA in JAX, with no torch"))
    assert first - loda[0] <= 0.04
    assert loda[0] > alone[0]
    assert loda[1] > alone[1]


# What the transformer of the page started from, was given and became, by the names of torch.
SAVE = """
import sys
def named(model):
    for number, block in enumerate(model.blocks):
        layers = {"qkv": block.qkv, "out": block.out, "mlp.0": block.mlp[0], "mlp.1": block.mlp[1]}
        for name, layer in layers.items():
            yield f"blocks.{number}.{name}.weight", layer.weight
            yield f"blocks.{number}.{name}.bias", layer.bias
saved = {f"start/{name}": x for name, x in named(start)}
saved |= {f"end/{name}": x for name, x in named(model)}
for number, (x, y, head, draws) in enumerate(tasks):
    parts = {"x": x, "y": y, "head": head, "head_end": heads[number]}
    parts |= {name: np.stack(x) for name, x in zip(("rows", "order", "radius"), zip(*draws))}
    saved |= {f"{name}{number}": x for name, x in parts.items()}
np.savez(sys.argv[1], **saved)
"""


@pytest.mark.jax
def test_the_transformer_matches_our_backend(tmp_path: Path) -> None:
    pytest.importorskip("equinox")
    code, promised = example("A transformer in JAX, the whole path")
    printed_by(f"{code}\n{SAVE}", promised, str(tmp_path / "page.npz"))
    import torch

    with np.load(tmp_path / "page.npz") as saved:
        theirs = {name: torch.from_numpy(saved[name]) for name in saved.files}
    ours = trained_by_torch(theirs)
    moved = 0.0
    for name, x in ours.items():
        assert float((x - theirs[f"end/{name}"]).abs().max()) < 1e-5
        moved = max(moved, float((x - theirs[f"start/{name}"]).abs().max()))
    assert moved > 1e-2


def trained_by_torch(saved: dict[str, Any]) -> dict[str, Any]:
    """The weights that our backend ends with, from the same weights, data and draws."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import nn

    from backends.torch import LoDA, LoDASettings

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(16) for _ in range(2)])
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 16)])

        def forward(self, x: Any) -> Any:
            q, k, v = self.qkv(self.norms[0](x)).chunk(3, -1)
            x = x + self.out(F.softmax(q @ k.mT / 4, -1) @ v)
            return x + self.mlp[1](F.gelu(self.mlp[0](self.norms[1](x))))

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(2)])
            self.head = nn.Linear(16, 4, bias=False)

        def forward(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean(dim=1))

    model = Transformer()
    start = {name[6:]: x for name, x in saved.items() if name.startswith("start/")}
    missing, unexpected = model.load_state_dict(start, strict=False)
    assert not unexpected
    assert all("norms" in name or name == "head.weight" for name in missing)
    loda = LoDA(model, LoDASettings(target="*.qkv", rank=4), trainable=["head.weight"])
    for task in range(2):
        x, y, head, head_end, rows, order, radius = (
            saved[f"{name}{task}"]
            for name in ("x", "y", "head", "head_end", "rows", "order", "radius")
        )
        with torch.no_grad():
            model.head.weight.copy_(head)
        loda.begin_task(x.split(64))
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.1)
        for batch, permutation, length in zip(rows, order, radius, strict=True):
            images, labels = x[batch], y[batch]
            loda.step(
                lambda half, images=images, labels=labels: F.cross_entropy(
                    model(images[half]), labels[half]
                ),
                labels,
                optimizer,
                radius=float(length),
                draw=1.0,
                permutation=permutation,
            )
        loda.end_task(x.split(64))
        assert float((model.head.weight - head_end).detach().abs().max()) < 1e-5
    return {name: model.get_parameter(name).detach() for name in start}
