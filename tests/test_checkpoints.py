"""Checkpoints are whole or not there, damage is found, and a full disk harms nothing."""

import errno
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import CutOff, at_step, differences, end, stopped
from run_contents import write_sealed
from small_runs import tiny, tree

from training.train import resume, train
from training.checkpoint import (
    has_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_checkpoints,
    write_checkpoint,
)

FILES = ("state.safetensors", "metrics.jsonl", "checkpoint.json")
pytestmark = pytest.mark.usefixtures("no_figure")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `tiny` that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.loop.accuracy_figure", lambda *_, **__: None)
        experiment = tiny(tree(tmp_path_factory), tmp_path_factory.mktemp("whole") / "run")
        return train(experiment, quiet=True)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two checkpoints."""
    folder = tmp_path / "checkpoints"
    for number in range(3):
        tensors = {"b": torch.full((40,), float(number)), "a": torch.arange(3)}
        write_checkpoint(folder, tensors, {"number": number}, b"{}\n" * number, keep=2)
    return folder


def test_the_last_are_kept_and_come_back_as_they_were(two: Path) -> None:
    assert sorted(p.name for p in two.iterdir()) == ["000002", "000003"]
    assert sorted(p.name for p in (two / "000003").iterdir()) == sorted(FILES)
    found = newest_checkpoint(two)
    assert list(found.tensors) == ["b", "a"]  # branches are summed in their order
    assert torch.equal(found.tensors["b"], torch.full((40,), 2.0))
    assert (found.record, found.metrics, found.path) == ({"number": 2}, b"{}\n{}\n", two / "000003")


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = tmp_path / "checkpoints", list[str]()
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(handle: int) -> None:
        identity = os.fstat(handle)
        (path,) = (p for p in tmp_path.rglob("*") if os.path.samestat(p.stat(), identity))
        seen.append(f"synced {path.name.replace(f'.{os.getpid()}.tmp', '').lstrip('.')}")
        fsync(handle)

    def named(give: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        return lambda path, to: seen.append(f"named {to.name}") or give(path, to)

    folder.mkdir()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named(replace))
    monkeypatch.setattr(Path, "rename", named(rename))
    write_checkpoint(folder, {"a": torch.zeros(2)}, {}, b"", keep=1)
    files = [f"{what} {name}" for name in FILES for what in ("synced", "named", "then")]
    wanted = ["synced new-000001" if what.startswith("then") else what for what in files]
    assert seen == [*wanted, "named 000001", "synced checkpoints"]


def test_ten_is_newer_than_nine(tmp_path: Path) -> None:
    for number in range(2):
        write_checkpoint(tmp_path, {}, {"number": number}, b"", keep=2)
    (tmp_path / "000002").rename(tmp_path / "9")
    for number in range(2, 4):
        write_checkpoint(tmp_path, {}, {"number": number}, b"", keep=2)
        assert newest_checkpoint(tmp_path).record == {"number": number}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000010", "000011"]


def test_another_schema_is_not_read(two: Path) -> None:
    path = two / "000003" / "checkpoint.json"
    write_sealed(path, {**json.loads(path.read_bytes()), "schema": 1})
    with pytest.raises(ValueError, match=r"000003 .*schema 1, and this version reads 2"):
        read_checkpoint(two / "000003")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_what_was_read_is_no_part_of_the_file(two: Path) -> None:
    found = newest_checkpoint(two)
    assert str(found.path) not in Path("/proc/self/maps").read_text()  # network disks keep it
    shutil.rmtree(found.path)
    assert torch.equal(found.tensors["b"], torch.full((40,), 2.0))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(two: Path, name: str, damage: str) -> None:
    path = two / "000003" / name
    content = path.read_bytes()
    # Every place of a bit is tried for one that reads like something else, not for a crash.
    places = range(0, 8 * len(content), 41) if damage == "flipped" else [0]
    for place in places:
        if damage == "gone":
            path.unlink()
        elif damage == "flipped":
            spoilt = bytearray(content)
            spoilt[place // 8] ^= 1 << place % 8
            path.write_bytes(spoilt)
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
        with pytest.warns(RuntimeWarning, match=r"000003 is damaged: .*000002 is used"):
            assert newest_checkpoint(two).record == {"number": 1}


def test_when_none_is_sound_that_is_an_error(two: Path) -> None:
    for folder in two.iterdir():
        (folder / "state.safetensors").write_bytes(b"")
    assert not has_checkpoint(two)
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used: .*000003.*000002"):
        newest_checkpoint(two)


def test_what_a_killed_process_left_is_no_checkpoint(two: Path) -> None:
    for name in (".new-000004", ".old-000001"):
        (two / name).mkdir()
        (two / name / "state.safetensors").write_bytes(b"half")
    assert newest_checkpoint(two).path.name == "000003"
    write_checkpoint(two, {}, {}, b"", keep=2)
    assert sorted(p.name for p in two.iterdir()) == ["000003", "000004"]
    remove_checkpoints(two)
    assert not two.exists()


def test_a_full_disk_harms_nothing(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("write_tensors", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(f"training.checkpoint.{function}", full)
            with pytest.raises(OSError, match=r"No space left on device; .*unharmed.*--resume"):
                write_checkpoint(two, {"a": torch.zeros(2)}, {}, b"", keep=2)
        assert sorted(p.name for p in two.iterdir()) == ["000002", "000003"]
        assert newest_checkpoint(two).record == {"number": 2}


def test_a_run_whose_files_cannot_grow_stops_and_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    # The system itself refuses to write, as it does on a full disk.
    root = tree(tmp_path_factory)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    experiment = tiny(root, tmp_path / "cut", checkpoint={"steps": 4})
    try:
        with (
            at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))),
            pytest.raises(OSError, match=r"cannot write a checkpoint .*File too large"),
        ):
            train(experiment, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert differences(resume(tmp_path / "cut", quiet=True), whole) == []


def test_a_damaged_checkpoint_of_a_run_costs_only_time(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path
) -> None:
    root = tree(tmp_path_factory)
    path = stopped(tiny(root, tmp_path / "cut", checkpoint={"steps": 2}), 10)
    newest = sorted((path / "checkpoints").iterdir())[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is damaged"):
        resume(path, quiet=True)
    assert differences(path, whole) == []


def test_a_damaged_checkpoint_takes_no_place_of_a_sound_one(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = stopped(tiny(tree(tmp_path_factory), tmp_path / "cut", checkpoint={"steps": 2}), 10)
    older, newest = sorted((path / "checkpoints").iterdir())
    (newest / "state.safetensors").write_bytes(b"")
    with (
        pytest.warns(RuntimeWarning, match="is damaged"),
        at_step(3, end),
        pytest.raises(CutOff),
    ):
        resume(path, quiet=True)
    left = sorted((path / "checkpoints").iterdir())
    assert [p.name for p in left] == [older.name, f"{int(newest.name) + 1:06d}"]
    for checkpoint in left:
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("other", [{"seed": 5}, {"train": {"lr": 0.01}}, {"data": {"tasks": 2}}])
def test_checkpoints_of_another_run_are_passed_over(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, whole: Path, other: dict[str, Any]
) -> None:
    root, steps = tree(tmp_path_factory), {"checkpoint": {"steps": 2}}
    path = stopped(tiny(root, tmp_path / "cut", **steps), 10)
    foreign = stopped(tiny(root, tmp_path / "other", **steps, **other), 10)
    shutil.copytree(sorted((foreign / "checkpoints").iterdir())[-1], path / "checkpoints" / "77")
    with pytest.warns(RuntimeWarning, match=r"77 is of a run with other settings"):
        resume(path, quiet=True)
    assert differences(path, whole) == []


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "file").write_text("")
    experiment = tiny(tree(tmp_path_factory), tmp_path / "file" / "run")
    with pytest.raises(
        OSError, match=r"cannot write to the run folder .*file.run: Not a directory"
    ):
        train(experiment, quiet=True)
