"""Writing files so that a crash never leaves half of one, and reading them back."""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in place in one step.

    Raises
    ------
    OSError
        If it cannot be written, for instance on a full disk; the message names it. What was there
        before is as it was, unless all that failed is to sync the folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # it might be a link to somewhere else
        # Some writers make their files private; the rights are those of any new file instead.
        temporary.touch()
        rights = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(rights)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:  # of a full disk, the system does not name the file
        msg = f"cannot write {path}: {error.strerror or error}"
        raise OSError(msg) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are where a power cut leaves them.

    Folders of file systems that cannot do that, and those that nobody may list, are passed over.
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
    """Make a folder, unless it is there, so that a power cut leaves it."""
    if not path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda temporary: _write_bytes(temporary, content))


def append_line(path: Path, line: str) -> None:
    """Write one more line to a text file, not synced; the error of a full disk names it."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise OSError(msg) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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
def understanding(path: Path) -> Iterator[None]:
    """Name a file whose content turns out not to be what this package writes.

    For code that takes values from a file apart; whatever they provoke becomes one clear error.

    Raises
    ------
    ValueError
        Names the file and the reason.

    Examples
    --------
    >>> with understanding(Path("a.json")):
    ...     {"b": 1}["c"]
    Traceback (most recent call last):
    ...
    ValueError: a.json does not hold what a run writes there: KeyError('c')
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
    ) as error:
        reason = " ".join(str(error).split()) if isinstance(error, ValueError) else repr(error)
        msg = f"{path} does not hold what a run writes there: {reason}"
        raise ValueError(msg) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically; tensors are copied to the CPU.

    Raises
    ------
    OSError
        If it cannot be written, for instance on a full disk.
    """
    # Tensors that share memory (views, a weight tied to another) are not allowed in the file.
    flat = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    try:
        write_atomically(path, lambda temporary: save_file(flat, temporary))
    except SafetensorError as error:  # what the system says is in its text alone
        msg = f"cannot write {path}: {error}"
        raise OSError(msg) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; the error names it."""
    if not path.is_file():
        msg = f"no file {path}"
        raise FileNotFoundError(msg)
    try:
        return load_file(path)
    except Exception as error:
        msg = f"cannot read {path} as safetensors: {error}"
        raise ValueError(msg) from error


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite values.

    Examples
    --------
    >>> import torch
    >>> not_finite({"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan])})
    ['b']
    """
    return [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]


def nested(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix/``, without it."""
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}


def flattened(**groups: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Groups of tensors under one flat name each, ``group/name``.

    Examples
    --------
    >>> import torch
    >>> sorted(flattened(a={"x": torch.zeros(1)}, b={"x": torch.ones(1)}))
    ['a/x', 'b/x']
    """
    return {f"{group}/{k}": v for group, part in groups.items() for k, v in part.items()}


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
