"""The README and the tutorials: every command and every piece of Python works, on small data."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/index.md",
    *(f"docs/tutorials/{name}.md" for name in ("first-run", "photos", "extend")),
]
# What prepares the machine is run by other tests, or by whoever runs this one.
PREPARATION = ("make ", "pip ", ". .venv")
# A network that needs no download, and little training.
SMALLER = {"vit_base_patch16_224.augreg_in21k": "cifar_vit"}
SHORTER = {"train": ["--train.epochs=1", "--device=cpu"], "extend": []}

pytestmark = [pytest.mark.slow, pytest.mark.gate]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the blocks of a page that are run, in their order."""
    found = re.findall(r"(?m)^```(\w*)\n(.*?)^```", page.read_text("utf-8"), re.DOTALL)
    return [(kind, text) for kind, text in found if kind in ("", "python") and ">>>" not in text]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a block, without the program's name."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    words = [shlex.split(line, comments=True) for line in lines]
    for line, command in zip(lines, words, strict=True):
        assert line.startswith(PREPARATION) or command[0].endswith("loda"), line
    return [command[1:] for command in words if command[0].endswith("loda")]


def write_photos(folder: Path, classes: list[str], count: int, seed: int) -> None:
    """Photos that a small network can learn: a colour for each class, noise on top."""
    rng = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        colour = rng.integers(0, 256, 3)
        for number in range(count):
            noise = rng.integers(-40, 40, (48, 64, 3))
            pixels = np.clip(colour + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:04}.jpg")


@pytest.mark.parametrize("name", PAGES)
def test_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("PHOTOS"), ["daisy", "rose", "tulip", "violet"], 12, seed=0)
    write_photos(Path("NEW_PHOTOS"), ["lily", "orchid"], 12, seed=1)
    write_photos(Path("FOLDER"), ["any"], 3, seed=2)
    Image.open("PHOTOS/rose/0000.jpg").save("photo.jpg")
    if name.endswith("extend.md"):  # it goes on where the page before it ends
        run(["train", "PHOTOS", "--backbone", "cifar_vit", "--out", "runs/flowers"])
    if name.endswith("index.md"):
        run(["train", "PHOTOS", "--backbone", "cifar_vit", "--out", "runs/mine"])
        run(["train", "PHOTOS", "--backbone", "cifar_vit", "--out", "RUN"])
    for kind, text in blocks(ROOT / name):
        if kind == "python":
            exec(compile(text, name, "exec"), {})
        for command in [] if kind else commands(text):
            run(command)


def run(command: list[str]) -> None:
    words = [SMALLER.get(word, word) for word in command]
    assert cli.main([*words, *SHORTER.get(words[0], [])]) == 0, command
