"""The page about training loops: every recipe runs, and they all end with the same weights."""

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))

# Runs a recipe, then a check on its names, and writes the weights of its model.
RUN = """
import os, runpy, sys, torch
recipe, check, out = sys.argv[1:]
names = runpy.run_path(recipe)
exec(check, names)
torch.save(names["model"].state_dict(), out + os.environ.get("RANK", ""))
"""

# Recipes whose weights must be those of the plain one, and the library that each needs.
SAME = {
    "with_accelerate.py": "accelerate",
    "with_lightning.py": "lightning",
    "with_trainer.py": "transformers",
    "with_avalanche.py": "avalanche",
}
EXACT, HALF_PRECISION = 1e-5, 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the files of the page."""
    folder = tmp_path_factory.mktemp("loops")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Tensor]:
    """The weights that the plain loop ends with."""
    return here(folder, "plain.py")


def here(folder: Path, recipe: str) -> dict[str, Tensor]:
    """Run a recipe in this process, and give the weights of its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            names = runpy.run_path(str(folder / recipe))
        finally:
            sys.modules.pop("stream", None)
    assert names["loda"].tasks == 2
    weights: dict[str, Tensor] = names["model"].cpu().state_dict()
    return weights


def elsewhere(folder: Path, recipe: str, check: str = "", *, processes: int = 1) -> list[Path]:
    """Run a recipe in processes of its own; the files with their weights."""
    out = folder / f"{recipe}.pt"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*start, "run.py", recipe, check, str(out)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
    )
    assert done.returncode == 0, done.stderr
    return [out] if processes == 1 else [Path(f"{out}{rank}") for rank in range(processes)]


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of the weights, relative to the largest of each tensor."""
    assert list(a) == list(b)
    return max(float((a[k] - b[k]).abs().max() / b[k].abs().max()) for k in b)


def require(library: str) -> None:
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed; the extra integrations has it")


def test_every_recipe_is_tried() -> None:
    alone = {"stream.py", "plain.py", "read_out.py", "phases.py", "ddp.py"}
    assert set(FILES) == {*alone, "with_timm.py", "with_peft.py", *SAME}


def test_a_read_out_decides_between_the_classes_of_all_tasks(
    folder: Path, plain: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert distance(here(folder, "read_out.py"), plain) < EXACT  # it only looks on
    last_layer, read_out = map(int, re.findall(r"(\d+) % right", capsys.readouterr().out))
    assert last_layer < 50
    assert read_out >= 99


def test_phases_in_half_precision(folder: Path, plain: dict[str, Tensor]) -> None:
    start = runpy.run_path(str(folder / "stream.py"))["build_model"]().state_dict()
    moved = distance(plain, start)
    assert distance(here(folder, "phases.py"), plain) < HALF_PRECISION < moved / 3


# Not in the gate: with gloo, PyTorch itself may abort at the end of a process, LoDA or not.
@pytest.mark.slow
def test_several_processes(folder: Path, plain: dict[str, Tensor]) -> None:
    for path in elsewhere(folder, "ddp.py", processes=2):
        assert distance(torch.load(path), plain) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SAME)
def test_libraries_end_with_the_same_weights(
    recipe: str, folder: Path, plain: dict[str, Tensor]
) -> None:
    require(SAME[recipe])
    (path,) = elsewhere(folder, recipe)
    assert distance(torch.load(path), plain) < EXACT


@pytest.mark.slow
def test_timm(folder: Path) -> None:
    check = """
assert loda.tasks == 2
assert scheduler.base_values == [0.01, 0.1]
assert [group["lr"] for group in optimizer.param_groups] == [0, 0]
assert torch.equal(model.head.weight, average.module.head.weight)
assert float(F.cross_entropy(model(x), y)) < 1.3 < torch.tensor(4).log()
"""
    elsewhere(folder, "with_timm.py", check)


@pytest.mark.slow
def test_peft(folder: Path) -> None:
    require("peft")
    check = """
assert loda.tasks == 2
first = dict(lora.named_modules())["base_model.model.0"].lora_A["default"].weight
rows = [directions.weights["0"][b] * a for b, a in directions.downs["0"].items()]
torch.testing.assert_close(first, torch.cat(rows))
"""
    elsewhere(folder, "with_peft.py", check)
