"""The page on backbones: its code runs, its commands train on small stand-ins."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from small_runs import tree
from transformers import ViTConfig, ViTModel

from training import cli
from training.backbones import BACKBONES
from training.run_dir import read_json

PAGE = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line)[1:]
    for language, text in BLOCKS
    if not language
    for line in text.replace("\\\n", "").splitlines()
    if "PHOTOS" in line
]
SMALL: dict[str, Any] = {"img_size": 28, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = "{img_size: 28, window_size: 7, patch_size: 1, embed_dim: 8, num_heads: [1, 1, 1, 1]}"


@pytest.fixture
def folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A working directory with what the commands name, small."""
    (tmp_path / "PHOTOS").symlink_to(tree(tmp_path_factory))
    torch.manual_seed(0)
    dino = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL)
    torch.save(
        {**dino.state_dict(), "mask_token": torch.zeros(1, 32)},
        tmp_path / "dinov2_vits14_pretrain.pth",
    )
    vit = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=28,
        patch_size=14,
    )
    ViTModel(vit).save_pretrained(tmp_path / "FOLDER")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[3])
def test_every_command_trains(
    command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = {
        "vit_small_patch14_dinov2": [f"--backbone.options={SMALL}"],
        "swin_tiny_patch4_window7_224": [f"--backbone.options={SWIN}", "--backbone.pretrained=no"],
    }
    given = [
        *command,
        *smaller.get(command[3], []),
        *("--data.resize=28", "--data.image_size=28", "--method.rank=2", "--train.epochs=1"),
        *("--data.tasks=1", "--device=cpu", "--out=run"),
    ]
    assert cli.main(given) == 0, capsys.readouterr().err
    recorded = read_json(folder / "run" / "environment.json")["backbone"]
    assert len(recorded["tensors_sha256"]) == 64
    if "dinov2" in command[3]:
        assert "mask_token" in recorded["notes"][0]
        assert "mask_token" in capsys.readouterr().out


def test_the_code_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    code = [text for language, text in BLOCKS if language == "python"]
    printed = [text for language, text in BLOCKS if language == "text"]
    assert code
    for block, expected in zip(code, printed, strict=True):
        exec(compile(block, "backbones.md", "exec"), {})
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("start", "name"),
    [("`glyphs`", "glyphs"), ("the name of a timm", "resnet18"), ("`hf:ORG", "hf:some/model")],
)
def test_the_table_has_every_option(start: str, name: str) -> None:
    (row,) = re.findall(rf"^\| {re.escape(start)}.*$", PAGE, re.MULTILINE)[:1]
    assert all(f"`{option}`" in row for option in BACKBONES.options(name))
