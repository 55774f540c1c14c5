"""Checkpoints of a run, one file each, and the signals on which a run saves itself and stops.

A checkpoint is a safetensors file: the tensors of the state, the log of the run, and as metadata
its record. It is put in place by one ``os.replace`` (`training.run_dir.write_atomically`), so it is
complete or absent, and a checksum over the whole file reveals damage. Nothing here loads torch
before tensors are written or read.
"""

import hashlib
import json
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn, Self

import numpy as np
from safetensors import SafetensorError, safe_open

from training.config import CheckpointConfig
from training.run_dir import (
    CHECKPOINTS,
    MODEL,
    STATE,
    checkpoint_files,
    flattened,
    make_folder,
    read_tensors,
    require_intact,
    storable,
    sync,
    write_atomically,
)

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 4
_LOG = "metrics"
_BLANK = "0" * 64
# The checksum is in the only entry of the metadata, at the beginning of the file.
_CHECKSUM = re.compile(
    rb'^.{8}{"__metadata__":{"loda":"{\\"sha256\\": \\"([0-9a-f]{64})', re.DOTALL
)
_BLOCK = 2**20
# A task is also saved after its last step if the newest checkpoint is at least this old (seconds):
# merging and evaluation, which follow, are not checkpointed.
_WORTH_SAVING = 60.0


class Checkpoint(NamedTuple):
    """The content of a checkpoint.

    Attributes
    ----------
    tensors : dict of str to Tensor
        In the order in which they were written.
    record : dict
        The rest of the state, as JSON holds it.
    metrics : bytes
        The log of the run as it was.
    path : Path
        Its file.
    passed_over : tuple of Path
        Newer checkpoints that cannot be used.
    """

    tensors: "dict[str, Tensor]"
    record: dict[str, Any]
    metrics: bytes
    path: Path
    passed_over: tuple[Path, ...] = ()


def write_state(
    path: Path, tensors: "Mapping[str, Tensor]", record: Mapping[str, Any], metrics: bytes
) -> None:
    """Write one file for `read_checkpoint`, atomically.

    Raises
    ------
    OSError
        If it cannot be written; the message names it.
    """
    import torch
    from safetensors.torch import save_file

    log = torch.from_numpy(np.frombuffer(bytearray(metrics), dtype=np.uint8))
    copies = storable({**tensors, _LOG: log})
    # safetensors sorts its tensors, but branches are summed in the order given here.
    content = {"schema": SCHEMA, "tensors": list(tensors), "record": record}
    metadata = {"loda": json.dumps({"sha256": _BLANK, **content})}

    def write(temporary: Path) -> None:
        save_file(copies, temporary, metadata)
        seal(temporary)

    write_atomically(path, write)


def seal(path: Path) -> None:
    """Put the checksum of a file into it, computed with zeros in its place."""
    with path.open("r+b") as file:
        _, correct, place = _checksums(file)
        file.seek(place)
        file.write(correct.encode())


class _OtherSchemaError(ValueError):
    """A checkpoint that is whole, but was written in another form."""

    def __init__(self, path: Path, schema: object) -> None:
        super().__init__(
            f"checkpoint {path} was written by another version of loda, in schema {schema}, and "
            f"this version reads schema {SCHEMA}; use the version that wrote it"
        )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, and its checksum.

    Raises
    ------
    ValueError
        If it is damaged, or of another schema.
    """
    try:
        _check_whole(path)
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()["loda"])
            if content["schema"] != SCHEMA:
                raise _OtherSchemaError(path, content["schema"])
            # Copies: the tensors are views of the file, which may be removed while they are in use.
            tensors = {name: file.get_tensor(name).clone() for name in content["tensors"]}
            metrics = file.get_tensor(_LOG).numpy().tobytes()
        return Checkpoint(tensors, dict(content["record"]), metrics, path)
    except _OtherSchemaError:
        raise
    except (
        ValueError,
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
    ) as error:
        msg = f"checkpoint {path} is damaged: {error}"
        raise ValueError(msg) from error


_WEIGHTS = "model/"


def write_final_state(
    run: Path, tensors: "Mapping[str, Tensor]", record: Mapping[str, Any], metrics: bytes
) -> int:
    """Write the state of a finished run, from which it can be extended; returns its bytes.

    The weights of the model are left out: they are in a file of their own.
    """
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(_WEIGHTS)}
    write_state(run / STATE, rest, record, metrics)
    return sum(tensor.numel() * tensor.element_size() for tensor in rest.values())


def read_final_state(run: Path) -> Checkpoint:
    """The state of a finished run, with the weights of its model.

    Raises
    ------
    FileNotFoundError
        If the run did not keep it.
    ValueError
        If it is damaged, or not as the run wrote it.
    """
    if not (run / STATE).is_file():
        msg = (
            f"{run} has no {STATE}, which a later task starts from: only a run that was trained "
            f"with keep.state true can be extended; train it again that way"
        )
        raise FileNotFoundError(msg)
    require_intact(run, STATE, MODEL)
    state = read_checkpoint(run / STATE)
    model = flattened(**{_WEIGHTS[:-1]: read_tensors(run / MODEL)})
    return state._replace(tensors={**model, **state.tensors})


def write_checkpoint(
    run: Path,
    tensors: "Mapping[str, Tensor]",
    record: Mapping[str, Any],
    metrics: bytes,
    *,
    keep: int,
    unusable: Sequence[Path] = (),
    resume_by: str | None = None,
) -> Path:
    """Write the next checkpoint of a run and remove all but the last ``keep``.

    ``unusable`` ones are removed first: they must not take the place of those that can be used.

    Raises
    ------
    OSError
        If it cannot be written; the checkpoints before it are then as they were.
    """
    before = checkpoint_files(run)
    number = int(before[-1].stem) + 1 if before else 1
    path = run / CHECKPOINTS / f"{number:06d}.safetensors"
    try:
        make_folder(path.parent)
        write_state(path, tensors, record, metrics)
    except OSError as error:
        rest = (
            f"earlier checkpoints are unharmed; once this is fixed, resume with: "
            f"{resume_by or f'loda train --resume {run}'}"
            if before
            else "there is no earlier checkpoint"
        )
        msg = f"the run could not be saved: {error}; {rest}"
        raise OSError(msg) from error
    for old in unusable:
        old.unlink(missing_ok=True)
    for old in checkpoint_files(run)[:-keep]:
        old.unlink()
    sync(path.parent)
    return path


def newest_checkpoint(run: Path, identity: str | None = None) -> Checkpoint:
    """The newest undamaged checkpoint of a run; damaged ones are skipped with a warning.

    If ``identity`` is given, those whose record has another one are of another run, and not used.

    Raises
    ------
    FileNotFoundError
        If there is none at all.
    ValueError
        If the newest one that is not damaged is of another schema, or none can be used.
    """
    newest_first = checkpoint_files(run)[::-1]
    if not newest_first:
        msg = (
            f"{run} holds no checkpoint to resume from; train again with --overwrite, or with "
            "another --out"
        )
        raise FileNotFoundError(msg)
    reasons: list[str] = []
    for number, path in enumerate(newest_first):
        try:
            checkpoint = read_checkpoint(path)
            if identity is not None and checkpoint.record.get("identity") != identity:
                msg = f"checkpoint {path} is of a run with other settings, classes or backbone"
                raise ValueError(msg)
        except _OtherSchemaError:  # it is sound: nothing older must take its place
            raise
        except ValueError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            warnings.warn(f"{reason}; {path} is used", RuntimeWarning, stacklevel=2)
        return checkpoint._replace(passed_over=tuple(newest_first[:number]))
    msg = (
        f"no checkpoint in {run} can be used: {'; '.join(reasons)}; train again with --overwrite, "
        "or with another --out"
    )
    raise ValueError(msg)


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint that is not damaged; its content is not taken apart.

    Raises
    ------
    OSError
        If one cannot be read: it may be sound, so the run must not be replaced.
    """
    for path in checkpoint_files(run):
        with suppress(ValueError):
            _check_whole(path)
            return True
    return False


def _check_whole(path: Path) -> None:
    with path.open("rb") as file:
        recorded, correct, _ = _checksums(file)
    if recorded != correct:
        msg = "checksum mismatch"
        raise ValueError(msg)


def _checksums(file: BinaryIO) -> tuple[str, str, int]:
    """The recorded checksum of a file, the correct one, and the position of the recorded one."""
    start = file.read(_BLOCK)
    match = _CHECKSUM.match(start)
    if match is None:
        msg = "it holds no checksum"
        raise ValueError(msg)
    total = hashlib.sha256(start[: match.start(1)] + _BLANK.encode() + start[match.end(1) :])
    while block := file.read(_BLOCK):
        total.update(block)
    return match[1].decode(), total.hexdigest(), match.start(1)


class Checkpoints:
    """Writes the checkpoints of a run, and tells when the next one is due.

    ``identity`` distinguishes them from those of other runs; ``resume_by`` is the command that
    resumes the run, for messages.
    """

    def __init__(
        self, run: Path, config: CheckpointConfig, identity: str, *, resume_by: str | None = None
    ) -> None:
        self.run, self.config, self.identity = run, config, identity
        self.resume_by = resume_by
        self._unusable: tuple[Path, ...] = ()
        self._steps, self._written = 0, time.monotonic()

    def newest(self) -> Checkpoint:
        """The newest checkpoint of this run; see `newest_checkpoint`."""
        checkpoint = newest_checkpoint(self.run, self.identity)
        self._unusable = checkpoint.passed_over
        return checkpoint

    def write(
        self, tensors: "Mapping[str, Tensor]", record: Mapping[str, Any], metrics: bytes
    ) -> None:
        """Write the next checkpoint."""
        write_checkpoint(
            self.run,
            tensors,
            {"identity": self.identity, **record},
            metrics,
            keep=self.config.keep,
            unusable=self._unusable,
            resume_by=self.resume_by,
        )
        self._unusable = ()

    def restart_interval(self) -> None:
        """Restart the interval until the next checkpoint."""
        self._steps, self._written = 0, time.monotonic()

    def count_step(self, *, last: bool) -> bool:
        """Count one more step; returns whether a checkpoint is due now.

        After the ``last`` step of a task one is due earlier, because none is written while the
        task is merged, read out and evaluated.
        """
        self._steps += 1
        steps, minutes = self.config.steps, self.config.minutes
        since = time.monotonic() - self._written
        worth = last and since >= _WORTH_SAVING and (steps, minutes) != (None, None)
        return (
            worth
            or (steps is not None and self._steps >= steps)
            or (minutes is not None and since >= 60 * minutes)
        )


# --- signals --------------------------------------------------------------------------------------


def handle_signals(
    names: Iterable[str], handler: Callable[[int, FrameType | None], None]
) -> dict[signal.Signals, Any]:
    """Install a handler for those signals that this system has; returns the handlers before it.

    Nothing is done outside the main thread, where Python allows no handlers.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        return before
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        handled = signal.getsignal(number)
        # Leave ignored signals ignored (nohup, background jobs).
        if handled is not None and handled != signal.SIG_IGN:
            before[number] = handled
            signal.signal(number, handler)
    return before


def restore_signals(before: dict[signal.Signals, Any]) -> None:
    """Put back the handlers that `handle_signals` returned, and empty the mapping."""
    while before:
        signal.signal(*before.popitem())


class StopSignals:
    """Within a ``with`` block, notes the first signal to stop; the second acts at once.

    Signals are SIGINT, SIGTERM, and SIGUSR1, which SLURM can be told to send before the time of a
    job is over.

    Attributes
    ----------
    received : signal.Signals or None
        The signal that has arrived.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = handle_signals(("SIGINT", "SIGTERM", "SIGUSR1"), self._note)
        return self

    def __exit__(self, *_: object) -> None:
        restore_signals(self._before)

    def leave(self, message: str) -> NoReturn:
        """End as the signal asks: KeyboardInterrupt, SystemExit with status 143, or 0 for SIGUSR1.

        A job that ends with status 0 can be put into the queue again.
        """
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt(message)
        os.write(2, f"{message}\n".encode())
        raise SystemExit(128 + signal.SIGTERM if self.received == signal.SIGTERM else 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.received = signal.Signals(number)
        restore_signals(self._before)
        # Not print(): the signal may have interrupted one.
        os.write(2, f"{self.received.name}: stopping as soon as the run is saved\n".encode())
