"""Checkpoints are whole or not there, damage is found, a full disk harms nothing; signals."""

import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.checkpoint import (
    Checkpoints,
    StopSignals,
    has_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    seal,
    write_checkpoint,
)
from training.config import CheckpointConfig
from training.run_dir import RunFolder, remove_checkpoints

FIRST, SECOND = "000002.safetensors", "000003.safetensors"


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    for number in range(3):
        tensors = {"b": torch.full((40,), float(number)), "a": torch.arange(3)}
        write_checkpoint(tmp_path, tensors, {"number": number}, b"{}\n" * number, keep=2)
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_last_are_kept_and_come_back_as_they_were(two: Path) -> None:
    assert names(two) == [FIRST, SECOND]
    newest = newest_checkpoint(two)
    assert list(newest.tensors) == ["b", "a"]  # branches are summed in their order
    assert torch.equal(newest.tensors["b"], torch.full((40,), 2.0))
    assert torch.equal(newest.tensors["a"], torch.arange(3))
    assert (newest.record, newest.metrics) == ({"number": 2}, b"{}\n{}\n")
    assert newest.path == two / "checkpoints" / SECOND


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        (path,) = (p for p in tmp_path.rglob("*") if os.path.samestat(p.stat(), os.fstat(handle)))
        seen.append(f"synced {path.name.replace(f'.{os.getpid()}.tmp', '').lstrip('.')}")
        fsync(handle)

    def named(path: Path, to: Path) -> Path:
        seen.append(f"named {to.name}")
        return replace(path, to)

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    write_checkpoint(tmp_path, {"a": torch.zeros(2)}, {}, b"", keep=1)
    name = "000001.safetensors"
    assert seen[:3] == [f"synced {name}", f"named {name}", "synced checkpoints"]


def test_a_failure_says_how_to_resume(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, to: Path) -> Path:
        raise OSError(28, "no space", str(path), None, str(to))

    monkeypatch.setattr(Path, "replace", full)
    checkpoints = Checkpoints(two, CheckpointConfig(), "ours", resume_by="loda train --allow a.B")
    with pytest.raises(OSError, match=r"resume with: loda train --allow a\.B"):
        checkpoints.write({}, {}, b"")


def test_a_seventh_digit_is_newer_than_six(tmp_path: Path) -> None:
    for number in range(2):
        write_checkpoint(tmp_path, {}, {"number": number}, b"", keep=2)
    (tmp_path / "checkpoints" / FIRST).rename(tmp_path / "checkpoints" / "999999.safetensors")
    for number in range(2, 4):
        write_checkpoint(tmp_path, {}, {"number": number}, b"", keep=2)
        assert newest_checkpoint(tmp_path).record == {"number": number}
    assert names(tmp_path) == ["1000000.safetensors", "1000001.safetensors"]


def test_another_schema_is_not_read(two: Path) -> None:
    # Whoever writes another version seals it too.
    content = json.dumps({"sha256": "0" * 64, "schema": 1, "tensors": [], "record": {}})
    path = two / "checkpoints" / SECOND
    save_file({"metrics": torch.zeros(0, dtype=torch.uint8)}, path, {"loda": content})
    seal(path)
    assert has_checkpoint(two)
    with pytest.raises(ValueError, match="schema 1") as error:
        read_checkpoint(path)
    assert "damaged" not in str(error.value)
    with pytest.raises(ValueError, match="schema 1"):  # and no older one takes its place
        newest_checkpoint(two)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what is mapped")
def test_what_was_read_is_no_part_of_the_file(two: Path) -> None:
    newest = newest_checkpoint(two)
    assert str(newest.path) not in Path("/proc/self/maps").read_text()  # network disks keep it
    newest.path.unlink()
    assert torch.equal(newest.tensors["b"], torch.full((40,), 2.0))


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(place: int) -> Callable[[bytes], bytes]:
    def spoil(content: bytes) -> bytes:
        spoilt = bytearray(content)
        spoilt[place // 8] ^= 1 << place % 8
        return bytes(spoilt)

    return spoil


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped"])
def test_a_damaged_checkpoint_is_passed_over(two: Path, damage: str) -> None:
    path = two / "checkpoints" / SECOND
    content = path.read_bytes()
    # Many places of a bit are tried for one that reads like something else, not for a crash.
    places = range(0, 8 * len(content), 41) if damage == "flipped" else [0]
    for place in places:
        spoil = {"cut": cut, "empty": lambda _: b"", "flipped": flipped(place)}[damage]
        path.write_bytes(spoil(content))
        with pytest.warns(RuntimeWarning, match=rf"{SECOND} is damaged: .*{FIRST} is used"):
            newest = newest_checkpoint(two)
        assert (newest.record, newest.passed_over) == ({"number": 1}, (path,))
        assert has_checkpoint(two)


def test_when_none_is_sound_that_is_an_error(two: Path) -> None:
    for path in (two / "checkpoints").iterdir():
        path.write_bytes(b"")
    assert not has_checkpoint(two)
    with pytest.raises(ValueError, match=f"{SECOND}.*{FIRST}"):
        newest_checkpoint(two)
    remove_checkpoints(two)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        newest_checkpoint(two)


def test_one_that_cannot_be_read_is_not_taken_for_damaged(two: Path) -> None:
    for path in (two / "checkpoints").iterdir():
        path.unlink()
        path.mkdir()
    with pytest.raises(OSError, match=FIRST):
        has_checkpoint(two)


def test_one_of_another_run_is_passed_over(two: Path) -> None:
    write_checkpoint(two, {}, {"identity": "ours"}, b"", keep=3)
    write_checkpoint(two, {}, {"identity": "theirs"}, b"", keep=3)
    checkpoints = Checkpoints(two, CheckpointConfig(keep=2), "ours")
    with pytest.warns(RuntimeWarning, match="other settings"):
        assert checkpoints.newest().path.name == "000004.safetensors"
    # The next one takes its place, not that of one that can be used.
    checkpoints.write({}, {}, b"")
    assert names(two) == ["000004.safetensors", "000006.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoints.newest().record == {"identity": "ours"}


def test_what_a_killed_process_left_is_no_checkpoint(two: Path) -> None:
    (two / "checkpoints" / f".{SECOND}.77.tmp").write_bytes(b"half")
    assert newest_checkpoint(two).path.name == SECOND
    RunFolder(two, resume=True).close()
    assert names(two) == [FIRST, SECOND]
    remove_checkpoints(two)
    assert list(two.iterdir()) == []


def test_a_full_disk_harms_nothing(two: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*; .*unharmed.*--resume"):
            write_checkpoint(two, {"a": torch.zeros(2000)}, {}, b"", keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(two) == [FIRST, SECOND]
    assert newest_checkpoint(two).record == {"number": 2}


def test_the_file_is_one_that_others_can_read(two: Path) -> None:
    tensors = load_file(two / "checkpoints" / SECOND)
    assert set(tensors) == {"a", "b", "metrics"}


# When the next one is due


@pytest.mark.parametrize(("age", "minutes", "due"), [(70, 5, True), (50, 5, False), (70, None, 0)])
def test_a_task_is_saved_after_its_last_step_if_there_is_much_to_lose(
    age: float, minutes: float | None, due: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    checkpoints = Checkpoints(Path(), CheckpointConfig(minutes=minutes), "")
    now += age
    assert not checkpoints.count_step(last=False)
    assert checkpoints.count_step(last=True) == due
    now += 60 * 5
    assert checkpoints.count_step(last=False) == (minutes is not None)


def test_steps_are_counted_from_the_last_one() -> None:
    checkpoints = Checkpoints(Path(), CheckpointConfig(steps=2, minutes=None), "")
    due = []
    for _ in range(7):
        due.append(checkpoints.count_step(last=False))
        if due[-1]:
            checkpoints.restart_interval()
    assert due == [False, True, False, True, False, True, False]


# Signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_the_first_signal_is_noted_and_the_second_acts(
    number: signal.Signals, status: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    acted = []

    def act(number: int, frame: FrameType | None) -> None:
        acted.append(number)

    before = signal.signal(number, act)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert (stop.received, acted) == (number, [])
            os.kill(os.getpid(), number)
            assert acted == [number]
            with pytest.raises(status):
                stop.leave("saved")
        assert signal.getsignal(number) == act
    finally:
        signal.signal(number, before)
    assert number.name in capfd.readouterr().err


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.received is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
