"""The lock of a run folder, met by those who only ask."""

import fcntl
from pathlib import Path

import pytest

from training.run_dir import LOCK, FolderLock, held_by


def test_who_asks_for_the_owner_does_not_keep_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = (tmp_path / LOCK).open("w")
    fcntl.flock(asking, fcntl.LOCK_SH)  # as `held_by` does, for a moment
    monkeypatch.setattr("training.run_dir.time.sleep", lambda _: asking.close())
    held = FolderLock(tmp_path)
    assert held_by(tmp_path) is not None
    held.release()
    assert held_by(tmp_path) is None


def test_a_folder_that_stays_held_is_refused(tmp_path: Path) -> None:
    held = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError, match="in use by another run"):
        FolderLock(tmp_path)
    held.release()


def test_a_file_that_its_holder_removes_meanwhile_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock = fcntl.flock
    removed: list[int] = []

    def late(handle: int, how: int) -> None:
        flock(handle, how)
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(handle)

    monkeypatch.setattr("training.run_dir.fcntl.flock", late)
    held = FolderLock(tmp_path)
    assert (tmp_path / LOCK).is_file()
    held.release()
    assert removed
