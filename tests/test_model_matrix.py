"""The matrix of models: what works on which, and the page that says so."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from backends.torch import PRESETS

DOCS = Path(__file__).parents[1] / "docs"


def load() -> ModuleType:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("model_matrix", DOCS / "model_matrix.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page() -> str:
    return (DOCS / "models.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_has_the_table_that_the_script_prints() -> None:
    table = load().table()
    assert table in page()
    assert "no" not in {cell.strip(" *") for cell in table.replace("\n", "|").split("|")}


@pytest.mark.parametrize("name", ["timm BEiT", "torchvision ViT", "transformers GPT-2"])
def test_weights_that_are_read_packed_or_transposed_are_adapted(name: str) -> None:
    row = load().seen(name)
    assert row.layers > 0
    assert row[3:] == (True, True, True)


def test_the_code_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(page().partition("```python\n")[2].partition("```")[0], names)
    layers = names["loda"].target_layers()
    assert len(layers) == 22
    ranks = {n: own.rank for n, own in names["loda"].settings.by_layer(layers).items()}
    assert {ranks["blocks.1.mlp.fc1"], ranks["blocks.1.attn.qkv"]} == {8, 16}
    assert len(capsys.readouterr().out.split()) == 24


def test_the_page_names_every_preset() -> None:
    rows = page().splitlines()
    for name, pattern in PRESETS.items():
        assert any(f'`"{name}"`' in row and f"`{pattern}`" in row for row in rows)
