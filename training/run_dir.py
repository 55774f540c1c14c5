"""The run folder: file names, crash-safe writing, the log and the lock.

Nothing here loads torch before tensors are written or read.
"""

import errno
import hashlib
import json
import os
import platform
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import copyfile
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from training.spelling import some

try:
    import fcntl
except ImportError:  # not on Windows: there the folder is not guarded
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, CLASSES, ENVIRONMENT = "config.yaml", "classes.json", "environment.json"
METRICS, SUMMARY, FIGURE = "metrics.jsonl", "summary.json", "accuracy.png"
MODEL, READOUTS_FILE, STATE = "model.safetensors", "readouts.safetensors", "state.safetensors"
TASKS, CHECKPOINTS = "tasks", "checkpoints"
MANIFEST, ANALYSIS, LOCK = "manifest.json", "analysis.json", ".lock"

KEPT = ("branches", "moments", "heads", "statistics")
"""What a run may keep of a task, each in a file of its folder."""

# The summary is removed first: without it a run that is half removed does not count as finished.
_RESULTS = (SUMMARY, METRICS, FIGURE, MODEL, READOUTS_FILE, STATE, ANALYSIS)
_FILES = (CONFIG, CLASSES, ENVIRONMENT, MANIFEST, *_RESULTS)
_KEPT_FILE = re.compile(rf"{TASKS}/[0-9]{{3,}}/({'|'.join(KEPT)})\.safetensors")
_OWN_TEMPORARY = ".tmp" + 6 * "[0-9A-Za-z]"  # while safetensors writes a file

Overwrite = bool | Literal["unfinished"]
"""Whether the run in a folder may be replaced: any, none, or only one without results."""
_PACKAGES = (
    *("loda", "torch", "torchvision", "timm", "transformers"),
    *("accelerate", "numpy", "safetensors"),
)


def task_folder(run: Path, task: int) -> Path:
    """Folder of the files that a run keeps of a task, counted from 1.

    Examples
    --------
    >>> task_folder(Path("run"), 1).as_posix()
    'run/tasks/001'
    """
    return run / TASKS / f"{task:03d}"


# --- writing and reading files --------------------------------------------------------------------


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file in the error of a failed write: the system does not when the disk is full."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        msg = f"cannot write {path}: {getattr(error, 'strerror', None) or error}"
        raise OSError(msg) from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Raises
    ------
    OSError
        If it cannot be written, for instance on a full disk; the message names the file. The old
        file stays, unless only syncing the folder failed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _writing(path):
            temporary.unlink(missing_ok=True)  # it might be a symbolic link
            # Some writers create files that only their owner may read; use those of a new file.
            temporary.touch()
            permissions = temporary.stat().st_mode
            write(temporary)
            temporary.chmod(permissions)
            sync(temporary)
            temporary.replace(path)  # os.replace: readers see the old file or the new one
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power cut.

    Folders that cannot be synced or read are skipped.
    """
    folder = path.is_dir()
    if folder and (os.name == "nt" or not os.access(path, os.R_OK)):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Create a folder if it is missing, and make it survive a power cut."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_bytes(path, _as_json(content))


def read_json(path: Path) -> Any:
    """Read a JSON file; the error names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        msg = f"cannot read {path} as JSON: {error}"
        raise ValueError(msg) from error


@contextmanager
def readable(path: Path, where: str = "") -> Iterator[None]:
    """Turn the errors that malformed content provokes into one ValueError that names the file.

    For blocks that take the content of a file, or of the place ``where`` in it, apart. Files may
    come from anyone, and this saves such blocks from checking the content first.

    Examples
    --------
    >>> with readable(Path("a.json")):
    ...     {"b": 1}["c"]
    Traceback (most recent call last):
    ...
    ValueError: a.json is malformed: KeyError('c')
    """
    try:
        yield
    except OSError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
        SafetensorError,
    ) as error:
        plain = isinstance(error, ValueError | SafetensorError)
        reason = " ".join(str(error).split()) if plain else repr(error)
        place = f"{path}, {where}" if where else f"{path}"
        msg = f"{place} is malformed: {reason}"
        raise ValueError(msg) from error


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write a safetensors file atomically.

    Raises
    ------
    OSError
        If it cannot be written, for instance on a full disk.
    """
    from safetensors.torch import save_file

    copies = storable(tensors)
    write_atomically(path, lambda temporary: save_file(copies, temporary))


def storable(tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Copies on the CPU: a safetensors file cannot hold tensors that share memory (views, ties)."""
    return {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file; the error names it."""
    from safetensors.torch import load_file

    if not path.is_file():
        msg = f"no file {path}"
        raise FileNotFoundError(msg)
    try:
        return load_file(path)
    except Exception as error:
        msg = f"cannot read {path} as safetensors: {error}"
        raise ValueError(msg) from error


def not_finite(tensors: "Mapping[str, Tensor]") -> list[str]:
    """Names of the tensors that hold NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
    ['b']
    """
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def nested(tensors: "Mapping[str, Tensor]", prefix: str) -> "dict[str, Tensor]":
    """The tensors whose names begin with ``prefix/``, without it."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def flattened(**groups: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
    """Groups of tensors under one flat name each, ``group/name``.

    Examples
    --------
    >>> import torch
    >>> sorted(flattened(a={"x": torch.zeros(1)}, b={"x": torch.ones(1)}))
    ['a/x', 'b/x']
    """
    return {f"{group}/{k}": v for group, part in groups.items() for k, v in part.items()}


def file_sha256(path: Path) -> str:
    """Hash of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


# --- one process at a time ------------------------------------------------------------------------

_TRIES, _PAUSE = 20, 0.01  # seconds; a process that asks for the owner holds the file too
_locked: set[int] = set()


class FolderLock:
    """Holds a folder until it is released, collected or the process ends, however it ends.

    The library filelock does not do: a data-loading worker that outlives its parent would keep the
    lock, because a forked process shares it.

    Parameters
    ----------
    folder : Path
        A lock file with the process id is created in it. The system releases the lock of a dead
        process, so a leftover file does no harm.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        if fcntl is None:
            return
        path, tries = folder / LOCK, 0
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, path):
                    break
            except BlockingIOError as error:
                owner = _owner(handle)
                os.close(handle)
                tries += 1
                if tries < _TRIES:
                    time.sleep(_PAUSE)
                    continue
                msg = (
                    f"{folder} is in use by another run (process {owner}): wait until it ends, "
                    f"or choose another folder"
                )
                raise BlockingIOError(msg) from error
            except OSError:
                os.close(handle)
                raise
            os.close(handle)
        os.truncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        _locked.add(handle)
        self._end = weakref.finalize(self, _unlock, handle, path, os.getpid())

    def release(self) -> None:
        """Let others use the folder; does nothing the second time."""
        if fcntl is not None:
            self._end()


def held_by(folder: Path) -> str | None:
    """Id of the process that holds a folder, or None."""
    if fcntl is None:
        return None
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # A shared lock, so that processes that only ask do not see each other.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(handle)
    finally:
        os.close(handle)
    return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether a path still refers to an open file; its holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    return os.read(handle, 32).decode(errors="replace").strip() or "unknown"


def _unlock(handle: int, path: Path, owner: int) -> None:
    if os.getpid() != owner:  # a forked worker, which has closed its copy
        return
    _locked.discard(handle)
    path.unlink(missing_ok=True)
    os.close(handle)


def _close_in_child() -> None:
    # A data-loading worker may outlive a killed parent for a while: it must not keep the lock.
    for handle in _locked:
        os.close(handle)
    _locked.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_child)


# --- the folder of a run --------------------------------------------------------------------------


def choose_folder(out: str | None, name: str, *, overwrite: Overwrite = False) -> Path:
    """Folder of the run: ``out``, or a new one under ``runs``, of that name and the time.

    Raises
    ------
    FileExistsError
        As from :func:`require_free`.
    NotADirectoryError
        If the path is a file.
    """
    if out is None:
        return Path("runs", f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    folder = Path(out).expanduser()
    if folder.exists() and not folder.is_dir():
        msg = f"out must be a folder, got {folder}, which is a file"
        raise NotADirectoryError(msg)
    require_free(folder, overwrite=overwrite)
    return folder


def require_free(folder: Path, *, overwrite: Overwrite = False) -> None:
    """Refuse a folder whose content must stay; one that does not exist yet is free.

    Raises
    ------
    FileExistsError
        If it holds a run that ``overwrite`` does not cover, or has content but no manifest of a
        run.
    """
    ours = {folder / LOCK, *_half_written(folder)}
    names = sorted(p.name for p in folder.glob("*") if p not in ours)
    if not names:
        return
    if overwrite and MANIFEST not in names:
        msg = (
            f"{folder} holds no run (there is no {MANIFEST}), so nothing in it is replaced: move "
            f"{some(names)} away, or choose another --out"
        )
        raise FileExistsError(msg)
    if overwrite == "unfinished" and is_finished(folder):
        msg = f"{folder} holds a finished run by now, which is not replaced: choose another --out"
        raise FileExistsError(msg)
    if not overwrite:
        unfinished = (folder / CONFIG).is_file() and not is_finished(folder)
        note = " (it holds an unfinished run)" if unfinished else ""
        resume = f", resume it with --resume {folder}" if unfinished else ""
        msg = (
            f"{folder} is not empty{note}: choose another --out{resume}, or add --overwrite to "
            f"replace the run in it"
        )
        raise FileExistsError(msg)


def require_new(path: Path, *, overwrite: bool = False) -> None:
    """Refuse to replace a file that a command is told to write, unless that is asked for.

    Raises
    ------
    FileExistsError
        If there is one, and ``overwrite`` is off.
    """
    if path.exists() and not overwrite:
        msg = f"{path} already exists: add --overwrite to replace it"
        raise FileExistsError(msg)


def is_finished(path: Path) -> bool:
    """Whether a folder holds a run with its results; an empty summary holds none."""
    summary = path / SUMMARY
    return (path / CONFIG).is_file() and summary.is_file() and summary.stat().st_size > 0


def tidy(path: Path) -> None:
    """Remove the checkpoints of a finished run whose process was killed before it could."""
    if (path / CHECKPOINTS).is_dir():
        with suppress(OSError), closing(RunFolder(path, resume=True)):  # best effort
            remove_checkpoints(path)


def checkpoint_files(run: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    six_digits = (run / CHECKPOINTS).glob("[0-9]" * 6 + "*.safetensors")
    numbered = (path for path in six_digits if path.stem.isdecimal())
    return sorted(numbered, key=lambda path: int(path.stem))


def remove_checkpoints(run: Path) -> None:
    """Remove all checkpoints of a run, and their folder if nothing else is in it."""
    for path in checkpoint_files(run):
        path.unlink()
    folder = run / CHECKPOINTS
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def environment(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """Content of ``environment.json``: versions, machine and the description of the backbone."""
    import torch

    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backbone": dict(backbone),
    }


class RunFolder:
    """Writes the files of one run; no other process can do so until it is closed.

    Parameters
    ----------
    path : Path
        Created if it is missing. The files of an earlier run are removed first.
    fresh : bool
        Always create a new folder, numbered if the name is taken: runs started in the same second
        get different ones.
    resume : bool
        Resume the run in the folder: nothing is removed.
    overwrite : bool or "unfinished"
        Whether the folder may hold a run. This is judged again here, where no other process can
        change the folder any more.
    writes : bool
        False in all processes of a run but the first: they only know where the folder is.

    Raises
    ------
    OSError
        If the folder cannot be written to, holds what may not be replaced, or another process is
        writing to it.
    """

    def __init__(
        self,
        path: Path,
        *,
        fresh: bool = False,
        resume: bool = False,
        overwrite: Overwrite = False,
        writes: bool = True,
    ) -> None:
        self.path, self.writes = path, writes
        if not writes:
            return
        try:
            self.path = _new_folder(path) if fresh else path
            self.path.mkdir(parents=True, exist_ok=True)
            sync(self.path.parent)
            self._lock = FolderLock(self.path)
            _refuse_links(self.path)
        except BlockingIOError:
            raise
        except OSError as error:
            msg = f"cannot write to the run folder {path}: {error.strerror or error}"
            raise OSError(msg) from error
        try:
            if not resume:
                require_free(self.path, overwrite=overwrite)
            for temporary in _half_written(self.path):
                temporary.unlink()
            if not resume:
                _remove_results(self.path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self.writes:
            self._lock.release()

    def discard(self) -> None:
        """Remove a run that learned nothing, and its folder, so that it does not block the next."""
        if self.writes:
            _remove_results(self.path)
            for name in _FILES:
                (self.path / name).unlink(missing_ok=True)
            self.close()
            with suppress(OSError):  # files of others are in it
                self.path.rmdir()

    def begin(
        self, config: str, classes: Mapping[str, Any], environment: Mapping[str, Any]
    ) -> None:
        """Write the files that are known before training; the configuration is given as YAML."""
        if self.writes:
            files = {
                CONFIG: config.encode(),
                CLASSES: _as_json(classes),
                ENVIRONMENT: _as_json(environment),
            }
            # First: a folder without a manifest is never taken for that of a run.
            try:
                _write_manifest(self.path, {name: _sha256(text) for name, text in files.items()})
                for name, content in files.items():
                    write_bytes(self.path / name, content)
            except OSError:
                # A run that never began must not stand in the way of the next one.
                for name in (*files, MANIFEST):
                    (self.path / name).unlink(missing_ok=True)
                raise

    def check_classes(self, classes: Mapping[str, Any]) -> None:
        """Refuse to resume with other classes or images than the run began with."""
        require_intact(self.path, CLASSES, ENVIRONMENT)
        if read_json(self.path / CLASSES) != classes:
            msg = (
                f"the classes, tasks or images do not match {self.path / CLASSES}: the data have "
                f"changed since the run began, so it cannot be resumed"
            )
            raise ValueError(msg)

    def log(self, event: str, **values: Any) -> None:
        """Append a line to the log; only the copy in the checkpoints is safe from a power cut."""
        if self.writes:
            line = json.dumps({"event": event, **values}, ensure_ascii=False)
            path = self.path / METRICS
            with _writing(path), path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def read_log(self) -> bytes:
        """The log so far."""
        path = self.path / METRICS
        return path.read_bytes() if path.is_file() else b""

    def restore_log(self, content: bytes) -> None:
        """Put the log back to its content at a checkpoint."""
        if self.writes:
            write_bytes(self.path / METRICS, content)

    def keep(self, task: int, **groups: "Mapping[str, Tensor]") -> None:
        """Write the tensors kept of a task (counted from 1), one file per non-empty group."""
        if not self.writes:
            return
        folder = task_folder(self.path, task)
        for name, tensors in groups.items():
            if tensors:
                make_folder(folder.parent)
                make_folder(folder)
                write_tensors(folder / f"{name}.safetensors", tensors)
                update_manifest(self.path, f"{TASKS}/{folder.name}/{name}.safetensors")

    def copy_tasks(self, run: Path) -> None:
        """Copy what another run kept of its tasks, as long as it is what that run wrote.

        Raises
        ------
        ValueError
            If a file is not.
        """
        if not self.writes:
            return
        for path in _kept_files(run):
            name = path.relative_to(run).as_posix()
            require_intact(run, name)
            make_folder(self.path / TASKS)
            make_folder((self.path / name).parent)
            write_atomically(self.path / name, partial(copyfile, path))
            update_manifest(self.path, name)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the manifest and the summary, which makes the run a finished one."""
        if not self.writes:
            return
        sync(self.path / METRICS)
        # The summary is written last, so its hash for the manifest is taken from its content.
        content = _as_json(summary)
        hashes = _hashes(self.path, _written(self.path))
        _write_manifest(self.path, {**hashes, SUMMARY: _sha256(content)})
        write_bytes(self.path / SUMMARY, content)
        remove_checkpoints(self.path)


def update_manifest(run: Path, *names: str) -> None:
    """Record files that were written to a run after its manifest, such as ``analysis.json``."""
    _write_manifest(run, {**_manifest(run), **_hashes(run, [run / name for name in names])})


def changed_files(run: Path) -> list[str]:
    """Files of a run that are missing or not as they were written, by its manifest.

    Raises
    ------
    ValueError
        If there is no manifest, or it cannot be read.
    """
    hashes = {name: value for name, value in _manifest(run).items() if _is_own_name(name)}
    unlisted = {path.relative_to(run).as_posix() for path in _written(run)} - hashes.keys()
    return sorted(unlisted | {name for name in hashes if not _is_intact(run / name, hashes[name])})


def require_intact(run: Path, *names: str) -> None:
    """Refuse files of a run that are not as they were written.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    ValueError
        If the hash of one differs from that in the manifest, or is not in it; the message names
        the file.
    """
    recorded = _manifest(run)
    for name in names:
        path = run / name
        if not path.is_file():
            msg = f"no file {path}"
            raise FileNotFoundError(msg)
        if not _is_intact(path, recorded.get(name)):
            msg = (
                f"{path} is not the file that the run wrote, by its hash in {MANIFEST}: put the "
                "original back, or train again"
            )
            raise ValueError(msg)


def _manifest(run: Path) -> dict[str, str]:
    path = run / MANIFEST
    if not path.is_file():
        msg = f"{run} has no {MANIFEST}, so its files cannot be checked: restore it, or train again"
        raise ValueError(msg)
    with readable(path):
        return dict(read_json(path)["files"])


def _write_manifest(run: Path, hashes: Mapping[str, str]) -> None:
    write_json(run / MANIFEST, {"files": dict(sorted(hashes.items()))})


def _is_intact(path: Path, recorded: str | None) -> bool:
    return path.is_file() and file_sha256(path) == recorded


def _is_own_name(name: str) -> bool:
    """Whether a path below a run is that of a file that a run writes: manifests may be edited."""
    return name in _FILES or _KEPT_FILE.fullmatch(name) is not None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _hashes(run: Path, paths: list[Path]) -> dict[str, str]:
    return {path.relative_to(run).as_posix(): file_sha256(path) for path in paths}


def _written(run: Path) -> list[Path]:
    """Files of a run that this package wrote."""
    files = [run / name for name in _FILES if name not in (MANIFEST, SUMMARY)]
    return [*(p for p in files if p.is_file()), *_kept_files(run)]


def _kept_files(run: Path) -> list[Path]:
    kept = (run / TASKS).glob("*/*.safetensors")
    return [path for path in kept if _is_own_name(path.relative_to(run).as_posix())]


def _refuse_links(path: Path) -> None:
    """Refuse symbolic links to folders: nothing outside the run folder may be changed."""
    # A tracker has a folder of its own here; its name is not known.
    below = [p for p in path.iterdir() if p.is_dir()]
    below += [p for name in (TASKS, CHECKPOINTS) for p in (path / name).glob("*")]
    for link in (path / TASKS, path / CHECKPOINTS, *below):
        if link.is_symlink():
            msg = f"{link} is a symbolic link: replace it by a folder, or choose another run folder"
            raise OSError(msg)


def _new_folder(path: Path) -> Path:
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate


def _remove_results(path: Path) -> None:
    for name in _RESULTS:
        (path / name).unlink(missing_ok=True)
    kept = _kept_files(path)
    for stale in kept:
        stale.unlink()
    for folder in [*{stale.parent for stale in kept}, path / TASKS]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    remove_checkpoints(path)


def _half_written(path: Path) -> Iterator[Path]:
    """Files that a killed process left half-written."""
    names = [f".{name}.*.tmp" for name in _FILES]
    tensors = ".*.safetensors.*.tmp"
    for place, patterns in (
        ("", (*names, _OWN_TEMPORARY)),
        (f"{TASKS}/*/", (tensors, _OWN_TEMPORARY)),
        (f"{CHECKPOINTS}/", (tensors, _OWN_TEMPORARY)),
    ):
        for pattern in patterns:
            yield from path.glob(f"{place}{pattern}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
