"""What is read of the tasks of a run: settings, moments, history, branches; and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from run_contents import resealed, set_in_config
from safetensors.torch import load_file, save_file
from small_runs import finished

from training.analysis.analyse import analyse
from training.analysis.ranks import layer_ranks
from training.analysis.saved_tasks import read_settings, read_task, saved_tasks, task_file
from training.analysis.verify import verify
from training.config import read_experiment

LAYERS = ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
READERS: list[Callable[[Path], Any]] = [verify, analyse, lambda run: layer_ranks(run, [0.9])]


def test_settings_are_those_of_the_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    options = read_experiment(run / "config.yaml").method.options
    settings = json.loads(json.dumps(asdict(read_settings(run))))  # lists, as a file has them
    shared = settings.keys() & options.keys()
    assert shared >= {"rank", "ridge", "gamma", "isolated", "recalibration"}
    assert {k: settings[k] for k in shared} == {k: options[k] for k in shared}
    null = read_settings(finished(tmp_path_factory, "null_lora"))
    assert (null.branches, null.isolated) == ("isolated", "null")


@pytest.mark.parametrize("passes", ["merged", "trained", "both"])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_the_history_is_that_of_the_tasks_before(copy: Path, passes: str, decay: float) -> None:
    set_in_config(copy, "method", history=passes, history_decay=decay)
    for task in (1, 2, 3):  # the run has no need of this pass on its first task
        moments = load_file(task_file(copy, task, "moments"))
        moments |= {f"trained/{layer}": 2 * moments[f"new/{layer}"] for layer in LAYERS}
        save_file(moments, task_file(copy, task, "moments"))
    settings = read_settings(resealed(copy))
    tasks = list(saved_tasks(copy, settings, branches=True))
    assert [task.number for task in tasks] == [1, 2, 3]
    assert tasks[0].history == {}
    names = ["trained", "merged"] if passes == "both" else [passes]
    saved = [load_file(task_file(copy, task, "moments")) for task in (1, 2)]
    for layer in LAYERS:
        first, second = (sum(m[f"{name}/{layer}"] for name in names) for m in saved)
        history = tasks[2].history[layer]
        torch.testing.assert_close(torch.from_numpy(history.total), decay * first + second)
        assert history.weight == len(names) * (decay + 1)
    last = tasks[2].layers[LAYERS[0]]
    assert last["A_general"].shape == last["A_isolated"].shape == (settings.rank, 16)
    assert last["B_general"].shape == (48, settings.rank)
    assert last["coefficients"].shape == (settings.rank, settings.rank)
    assert "B_isolated" not in tasks[0].layers[LAYERS[0]]


def test_other_methods_are_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, "frozen")
    for read in READERS:
        with pytest.raises(ValueError, match="frozen"):
            read(run)
        with pytest.raises(FileNotFoundError, match="run folder"):
            read(tmp_path)


def test_a_run_that_saved_too_little_is_told_the_switches(copy: Path) -> None:
    task_file(copy, 2, "branches").unlink()
    assert len(layer_ranks(copy, [0.9])) == 3 * len(LAYERS)
    with pytest.raises(FileNotFoundError, match=r"--keep\.moments true --keep\.branches true"):
        verify(copy)
    task_file(copy, 3, "moments").unlink()
    with pytest.raises(FileNotFoundError, match=r"--keep\.moments true"):
        layer_ranks(copy, [0.9])


LAYER = LAYERS[1]
DAMAGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {
    "a pass that is not there": ("moments", lambda t: t.pop(f"merged/{LAYER}")),
    "a layer that is not there": ("moments", lambda t: [t.pop(k) for k in list(t) if LAYER in k]),
    "no layers": ("moments", dict.clear),
    "not square": ("moments", lambda t: t.update({f"merged/{LAYER}": torch.ones(16, 3)})),
    "another size": ("moments", lambda t: t.update({f"merged/{LAYER}": torch.eye(8)})),
    "not symmetric": (
        "moments",
        lambda t: t.update({f"merged/{LAYER}": torch.ones(16, 16).triu()}),
    ),
    "not finite": ("moments", lambda t: t[f"new/{LAYER}"].fill_(torch.nan)),
    "not real": (
        "moments",
        lambda t: t.update({f"merged/{LAYER}": torch.eye(16, dtype=torch.complex64)}),
    ),
    "whole numbers": ("moments", lambda t: t.update({f"new/{LAYER}": torch.eye(16).int()})),
    "half precision": ("branches", lambda t: t.update({k: v.bfloat16() for k, v in t.items()})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_named(copy: Path, damage: str) -> None:
    name, edit = DAMAGES[damage]
    path = task_file(copy, 2, name)
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    resealed(copy)
    # Rank selection looks at the moments before training, which no history holds.
    read = layer_ranks if damage == "whole numbers" else verify
    with pytest.raises(ValueError, match=f"{path.parent.name}.{name}"):
        read(copy, *([[0.9]] if read is layer_ranks else []))


def test_every_task_of_a_finished_run_is_expected(copy: Path) -> None:
    shutil.rmtree(copy / "tasks" / "003")
    for read in READERS:
        with pytest.raises(FileNotFoundError):
            read(copy)


def test_files_that_the_run_did_not_write_are_refused(copy: Path) -> None:
    second, third = (task_file(copy, number, "branches") for number in (2, 3))
    whole = third.read_bytes()
    zeroed = whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
    for content in (second.read_bytes(), zeroed):
        third.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(third))):
            verify(copy)
    third.write_bytes(whole)
    assert all(check.passed for check in verify(copy))


def test_half_a_file_is_named(copy: Path) -> None:
    path = task_file(copy, 1, "branches")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=str(path)):
        read_task(copy, 1, "branches")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=str(path)):
        read_task(copy, 1, "branches")
