"""Run folders that lack a file, or hold a damaged one, are refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_contents import set_in_config
from safetensors.torch import load_file, save_file
from small_runs import tree

from training.finished.evaluate import evaluate_run
from training.finished.inference import load_classifier


@pytest.mark.parametrize(
    "name", ["config.yaml", "classes.json", "model.safetensors", "readouts.safetensors"]
)
def test_an_unfinished_run_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no finished run: {name} not there"):
        evaluate_run(copy)


def change(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        tensors = load_file(run / name)
        edit(tensors)
        save_file(tensors, run / name)

    return apply


def write(name: str, content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda run: (run / name).write_text(text, "utf-8") and None


def truncate(name: str) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return apply


def to_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).fill_(float("nan"))


MODEL, READOUT_FILE = "model.safetensors", "readouts.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a model": (truncate(MODEL), rf"cannot read .*{MODEL}"),
    "a model without a tensor": (
        change(MODEL, lambda t: t.pop("norm.bias")),
        rf"{MODEL} does not fit the model .*norm\.bias",
    ),
    "a model of another width": (
        change(MODEL, lambda t: t.update({"norm.bias": torch.zeros(8)})),
        rf"{MODEL} does not fit the model .*norm\.bias",
    ),
    "a model with more tensors": (
        change(MODEL, lambda t: t.update({"head.weight": torch.zeros(8)})),
        rf"{MODEL} does not fit the model .*head\.weight",
    ),
    "a model that is not finite": (change(MODEL, to_nan), rf"{MODEL} holds NaN"),
    "half of the read-outs": (truncate(READOUT_FILE), rf"cannot read .*{READOUT_FILE}"),
    "read-outs that are not finite": (change(READOUT_FILE, to_nan), rf"{READOUT_FILE} holds NaN"),
    "no read-outs": (change(READOUT_FILE, dict.clear), "lacks the read-out|of {} classes"),
    "no primary read-out": (
        change(READOUT_FILE, lambda t: t.pop("nearest_mean/weight")),
        "lacks the read-out 'nearest_mean'",
    ),
    "an unknown read-out": (
        change(READOUT_FILE, lambda t: t.update({"magic/weight": torch.zeros(6, 16)})),
        rf"{READOUT_FILE} does not fit .*'magic'",
    ),
    "a read-out of other features": (
        change(READOUT_FILE, lambda t: t.update({"heads/weight": torch.ones(6, 8)})),
        rf"{READOUT_FILE} does not fit",
    ),
    "a read-out of fewer classes": (
        change(READOUT_FILE, lambda t: t.update({"nearest_mean/weight": torch.ones(4, 16)})),
        rf"{READOUT_FILE} holds read-outs of .*classes",
    ),
    "no configuration": (write("config.yaml", "train: [1"), r"config\.yaml is not a configuration"),
    "an unknown setting": (write("config.yaml", "tran: {lr: 1}"), "is not a configuration"),
    "no JSON": (write("classes.json", "{"), r"cannot read .*classes\.json as JSON"),
    "a list": (write("classes.json", [1]), r"classes\.json: it is \[1\]; expected a mapping"),
    "no names": (write("classes.json", {"order": [1]}), r"classes\.json: it lacks 'class_names'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs_are_refused_and_the_file_is_named(copy: Path, damage: str) -> None:
    apply, said = DAMAGES[damage]
    apply(copy)
    with pytest.raises(ValueError, match=said):
        evaluate_run(copy)


def test_other_classes_than_those_trained_on_are_refused(
    copy: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / "zinnober")
    set_in_config(copy, "data", root=str(data))
    with pytest.raises(ValueError, match=r"other classes now than when .*copy was trained"):
        evaluate_run(copy)
    shutil.rmtree(data)
    with pytest.raises(FileNotFoundError, match=r"data\.root: no folder"):
        evaluate_run(copy)
    assert load_classifier(copy).classes  # prediction needs no data
