"""Files are written whole or not at all, and damaged ones are named."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_contents import below

from training.run_dir import read_json, read_tensors, write_atomically, write_json, write_tensors


def half(path: Path) -> None:
    path.write_bytes(b"half of i")
    msg = "disk full"
    raise OSError(msg)


def test_a_failing_writer_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_json(path, {"a": 1})
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, half)
    assert read_json(path) == {"a": 1}
    assert below(tmp_path) == {"file"}


def test_tensors_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.ones(3)})

    def failing(tensors: object, target: Path) -> None:
        half(Path(target))

    monkeypatch.setattr("training.files.save_file", failing)
    with pytest.raises(OSError, match="disk full"):
        write_tensors(path, {"a": torch.zeros(3)})
    assert read_tensors(path)["a"].tolist() == [1, 1, 1]
    assert below(tmp_path) == {"t.safetensors"}


def test_json_that_cannot_be_written_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == [1]
    assert below(tmp_path) == {"a.json"}


def test_a_folder_that_cannot_be_synced_is_passed_over_but_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(number: int, folders: bool) -> Callable[[int], None]:
        def fsync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode) == folders:
                raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL, folders=True))
    write_json(tmp_path / "a.json", 1)  # as on some network disks
    for number, folders in ((errno.ENOSPC, True), (errno.EINVAL, False)):
        monkeypatch.setattr(os, "fsync", refuse(number, folders))
        with pytest.raises(OSError, match=os.strerror(number)):
            write_json(tmp_path / "a.json", 2)


def test_views_and_shared_tensors_can_be_written(tmp_path: Path) -> None:
    base = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "t", {"a": base.mT, "b": base[0], "c": base})
    back = read_tensors(tmp_path / "t")
    assert torch.equal(back["a"], base.mT)
    assert torch.equal(back["b"], base[0])
    assert torch.equal(back["c"], base)


@pytest.mark.parametrize(
    ("read", "content"),
    [(read_json, b"{"), (read_json, b"\xff\xfe"), (read_tensors, b""), (read_tensors, b"x" * 90)],
)
def test_damaged_files_are_named(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*damaged"):
        read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    for read in (read_json, read_tensors):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path / "none")
