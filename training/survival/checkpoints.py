"""Checkpoints of a run: a folder each, whole or not there, with checksums of all that it holds."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from training.files import make_folder, read_tensors, sync, write_bytes, write_tensors

SCHEMA = 2
STATE, METRICS, RECORD = "state.safetensors", "metrics.jsonl", "checkpoint.json"
_BEGUN, _DROPPED = ".new-", ".old-"


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes
    ----------
    tensors : dict of str to Tensor
        In the order in which they were written.
    record : dict
        The rest, as JSON holds it.
    metrics : bytes
        The log of the run as it was.
    path : Path
        Its folder.
    passed_over : tuple of Path
        Newer ones that cannot be used.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    metrics: bytes
    path: Path
    passed_over: tuple[Path, ...] = ()


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    record: Mapping[str, Any],
    metrics: bytes,
    *,
    keep: int,
    useless: Sequence[Path] = (),
) -> Path:
    """Write the next checkpoint of a folder and drop all but the last ``keep``.

    ``useless`` ones are dropped first: they must not take the place of those that can be used.

    Raises
    ------
    OSError
        If it cannot be written; the checkpoints before it are then as they were.
    """
    number = max((int(path.name) for path in _numbered(folder)), default=0) + 1
    begun, path = folder / f"{_BEGUN}{number:06d}", folder / f"{number:06d}"
    try:
        make_folder(folder)
        remove_leftovers(folder)
        begun.mkdir()
        write_tensors(begun / STATE, tensors)
        write_bytes(begun / METRICS, metrics)
        content = {
            "schema": SCHEMA,
            "files": {name: _digest(begun / name) for name in (STATE, METRICS)},
            "tensors": list(tensors),  # a safetensors file has an order of its own
            "record": record,
        }
        sealed = {"sha256": _seal(content), **content}
        write_bytes(begun / RECORD, json.dumps(sealed, indent=1).encode())
        begun.rename(path)
        sync(folder)
    except OSError as error:
        shutil.rmtree(begun, ignore_errors=True)
        rest = (
            f"the checkpoints before it are unharmed, and once this is mended loda train --resume "
            f"{folder.parent} goes on"
            if number > 1
            else "there is none before it"
        )
        msg = f"cannot write a checkpoint to {folder}: {error.strerror or error}; {rest}"
        raise OSError(msg) from error
    for old in [old for old in useless if old.is_dir()]:
        _drop(old)
    for old in _numbered(folder)[:-keep]:
        _drop(old)
    return path


def newest_checkpoint(folder: Path, of: str | None = None) -> Checkpoint:
    """The newest checkpoint that is sound; others are passed over with a warning.

    Parameters
    ----------
    folder : Path
        Holds the checkpoints.
    of : str, optional
        Those whose record says that they are ``of`` another run are no sound ones.

    Raises
    ------
    FileNotFoundError
        If there is none at all.
    ValueError
        If every one is damaged, of another run, or written by another version of this format.
    """
    found = _numbered(folder)[::-1]
    if not found:
        msg = f"{folder.parent} holds no checkpoint to go on from"
        raise FileNotFoundError(msg)
    reasons: list[str] = []
    for number, path in enumerate(found):
        try:
            sound = read_checkpoint(path)
            _require_own(sound, of)
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"{reason}; {path} is used", RuntimeWarning, stacklevel=2)
        return sound._replace(passed_over=tuple(found[:number]))
    msg = f"no checkpoint in {folder} can be used: {'; '.join(reasons)}"
    raise ValueError(msg)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, and all its checksums.

    Raises
    ------
    ValueError
        If it is damaged, or of another schema.
    """
    try:
        content = json.loads((path / RECORD).read_bytes())
        seal = content.pop("sha256")
        if seal != _seal(content):
            msg = f"{RECORD} does not have its checksum"
            raise ValueError(msg)
        if content["schema"] != SCHEMA:
            msg = f"schema {content['schema']}, and this version reads {SCHEMA}"
            raise ValueError(msg)
        for name in (STATE, METRICS):
            if _digest(path / name) != content["files"][name]:
                msg = f"{name} does not have its checksum"
                raise ValueError(msg)
        tensors = read_tensors(path / STATE)
        # Copies: these are parts of the file itself, which is removed while they are in use.
        ordered = {name: tensors[name].clone() for name in content["tensors"]}
        return Checkpoint(ordered, content["record"], (path / METRICS).read_bytes(), path)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, RecursionError) as error:
        msg = f"checkpoint {path} is damaged: {error}"
        raise ValueError(msg) from error


def _require_own(found: Checkpoint, of: str | None) -> None:
    if of is not None and (not isinstance(found.record, dict) or found.record.get("of") != of):
        msg = f"checkpoint {found.path} is of a run with other settings, classes or backbone"
        raise ValueError(msg)


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can go on from one of its checkpoints."""
    for path in _numbered(folder):
        try:
            read_checkpoint(path)
        except ValueError:
            continue
        return True
    return False


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints of a run, and the folder with them if nothing else is in it."""
    for path in _numbered(folder):
        _drop(path)
    remove_leftovers(folder)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that was killed had half written or half removed."""
    for prefix in (_BEGUN, _DROPPED):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path)


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    found = (path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))


def _drop(path: Path) -> None:
    # Under another name first: a checkpoint that is half removed must not look like a damaged one.
    dropped = path.with_name(f"{_DROPPED}{path.name}")
    path.rename(dropped)
    shutil.rmtree(dropped)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
