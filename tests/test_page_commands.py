"""Commands on the pages: all are accepted; those of README and tutorials are run, on small data."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training import cli
from training.config import load_experiment, run_options
from training.sweep import plan, read_sweep

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

# Pages whose classes, or sweeps, another test provides and runs.
OTHERS = ("components.md", "protocol.md")
# Files that the pages let the reader write.
FILES = {
    "my.yaml": "train: {lr: 0.02}",
    "mine.yaml": "{configs: [caltech101], settings: {backbone.name: cifar_vit}, "
    "seeds: [1993], variants: [loda]}",
}
FOLDERS = ("PHOTOS", "NEW_PHOTOS", "IMAGES", "DATA", "SHARED")


def fences(text: str) -> list[tuple[str, str]]:
    """Language and text of all fenced blocks."""
    return re.findall(r"(?ms)^```(\S*)\n(.*?)^```", text)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the blocks of a page that are run, in their order."""
    found = fences(page.read_text("utf-8"))
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


def every_command() -> list[tuple[str, str]]:
    """Every page with every command line of `loda` in its blocks."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        if page.name in OTHERS or "generated" in page.parts:
            continue
        text = page.read_text("utf-8").replace("\\\n", " ")
        fenced = [block for kind, block in fences(text) if not kind]
        indented = re.findall(r"(?m)^    .*$", re.sub(r"(?ms)^```.*?^```", "", text))
        lines = "\n".join([*fenced, *indented]).splitlines()
        called = [x for x in lines if re.match(r"\s*(\.venv/bin/)?loda [a-z]", x)]
        found += [(str(page.relative_to(ROOT)), " ".join(line.split())) for line in called]
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The working directory of a reader, with the files and folders that pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    for name, text in FILES.items():
        (folder / name).write_text(text, "utf-8")
    for name in FOLDERS:
        write_photos(folder / name, ["one", "two"], 1, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


def test_the_pages_have_commands() -> None:
    assert len(every_command()) > 50


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize(("page", "line"), every_command())
def test_a_command_is_accepted(page: str, line: str) -> None:
    words = shlex.split(line.replace("$seed", "1993").replace("...", ""), comments=True)[1:]
    assert words[0] in cli._COMMANDS
    arguments, rest = cli._parser().parse_known_args(words)
    if "--help" in rest:
        return
    if words[0] == "train":
        _, settings = run_options(rest)
        assert load_experiment(settings)
    elif words[0] == "sweep":
        jobs = plan(read_sweep(arguments.sweep), arguments.out, rest, only=arguments.only)
        assert jobs
    else:
        assert words[0] in cli._TAKE_SETTINGS or not rest, rest


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.parametrize("name", PAGES)
def test_a_page(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_photos(Path("PHOTOS"), ["daisy", "rose", "tulip", "violet"], 12, seed=0)
    write_photos(Path("NEW_PHOTOS"), ["lily", "orchid"], 12, seed=1)
    write_photos(Path("JULY"), ["dahlia", "peony", "rose"], 12, seed=3)
    write_photos(Path("AUGUST"), ["poppy", "sage"], 12, seed=4)
    write_photos(Path("FOLDER"), ["any"], 3, seed=2)
    Image.open("PHOTOS/rose/0000.jpg").save("photo.jpg")
    if name.endswith("extend.md"):  # it goes on where the page before it ends
        run(["train", "PHOTOS", "--backbone", "cifar_vit", "--out", "runs/flowers"])
    found = blocks(ROOT / name)
    for command in [words for kind, text in found if not kind for words in commands(text)]:
        run(command)
    for text in [text for kind, text in found if kind]:  # which may use what the commands leave
        exec(compile(text, name, "exec"), {})


def run(command: list[str]) -> None:
    words = [SMALLER.get(word, word) for word in command]
    assert cli.main([*words, *SHORTER.get(words[0], [])]) == 0, command
