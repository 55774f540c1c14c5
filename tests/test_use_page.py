"""The page on using a trained model: every command and every piece of code on it runs."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import finished, tree

from training import cli

PAGE = (Path(__file__).parents[1] / "docs" / "use.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
# What a block needs besides the packages of a run.
LIBRARIES = {
    "--format onnx": ("onnx", "onnxscript", "onnxruntime"),
    "import onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
    "--format hf": ("transformers",),
    "from transformers": ("transformers",),
    "import peft": ("peft",),
}


@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "runs").mkdir()
    run = finished(tmp_path_factory, head={"readout": "heads", "also": []})
    (tmp_path / "runs" / "mine").symlink_to(run)
    root = tree(tmp_path_factory)
    shutil.copytree(root / "test", tmp_path / "FOLDER")
    shutil.copy(root / "test" / "red" / "0.png", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    ran = 0
    for language, text in BLOCKS:
        needs = [name for mark, some in LIBRARIES.items() if mark in text for name in some]
        if any(not _is_installed(name) for name in needs):
            continue
        ran += 1
        if language == "python":
            exec(compile(text, "use.md", "exec"), names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "loda"
            assert cli.main(arguments) == 0, capsys.readouterr().err
    assert ran >= 6
    assert (tmp_path / "predictions.csv").read_text("utf-8").count("\n") == 19
    assert names["by_image"][0] == names["by_image"][1] == names["by_image"][2]
    if "answer" in names:
        assert names["answer"] == names["by_image"][0][0].name


def _is_installed(name: str) -> bool:
    try:
        __import__(name)
    except ModuleNotFoundError:
        return False
    return True


def test_the_page_shows_every_option_of_predict() -> None:
    _, arguments, _ = cli._COMMANDS["predict"]
    options = {name for names, _ in arguments for name in names if name.startswith("--")}
    assert all(option in PAGE for option in options)
