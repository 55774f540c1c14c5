"""The processes that train one model together, as torchrun and accelerate launch start them."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from backends.torch import sum_over_processes
from training.data import Share

TIMEOUT = 600.0
"""Seconds that a process waits for the others, unless LODA_TIMEOUT says otherwise."""


@dataclass(frozen=True)
class Processes:
    """One process of a run, and what it does together with the others.

    Whoever calls one of these functions waits until all have called it. With one process each does
    nothing. A process that does not answer, because it has ended or hangs, is a ConnectionError.

    Parameters
    ----------
    rank : int
        Number of this process; number 0 is the one that writes.
    count : int
        Number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def share(self) -> Share:
        """What the loaders have to know."""
        return Share(self.rank, self.count)

    @property
    def writes(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by their sums over the processes."""
        if self.count > 1:
            with self._together():
                sum_over_processes(tensors)

    @torch.no_grad()
    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, in place, by those of the first process."""
        if self.count > 1:
            with self._together():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    distributed.broadcast(whole, src=0)
                    if self.rank:
                        tensor.copy_(whole)

    def rows(self, part: Tensor, total: int) -> Tensor:
        """All rows (total, D) of a matrix whose `Share.even_bounds` the processes hold."""
        first, stop = self.share.even_bounds(total)
        whole = part.new_zeros(total, *part.shape[1:])
        whole[first:stop] = part
        self.sum([whole])
        return whole

    def largest(self, number: int) -> int:
        """The largest of the numbers of all processes."""
        if self.count == 1:
            return number
        found = torch.tensor(number)
        with self._together():
            distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def wait(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives in the first process, which alone calls it; ready for JSON.

        Raises
        ------
        ConnectionError
            In the others, if it raises in the first.
        """
        if self.count == 1:
            return make()
        said: dict[str, Any] = {}
        if self.rank == 0:
            try:
                said["value"] = make()
            except BaseException as error:
                self._tell({"error": str(error)})
                raise
        said = self._tell(said)
        if "error" in said:
            msg = f"process 0 has stopped: {said['error']}"
            raise ConnectionError(msg)
        return said["value"]

    def require_same(self, what: str, value: Any) -> None:
        """Refuse to go on if ``value``, ready for JSON, is another one in some process.

        Raises
        ------
        ValueError
            In all processes.
        """
        if self.count == 1:
            return
        mine = json.dumps(value, sort_keys=True)
        if self.largest(int(self.from_first(lambda: mine) != mine)):
            msg = (
                f"the {self.count} processes have not the same {what}: start all of them with one "
                f"command line, on the same data and the same version"
            )
            raise ValueError(msg)

    @contextmanager
    def first_of_each_machine(self) -> Iterator[None]:
        """Let one process a machine go ahead: what it downloads, the others find."""
        later = self.count > 1 and int(os.environ.get("LOCAL_RANK", "0")) > 0
        if later:
            self.wait()
        yield
        if not later:
            self.wait()

    def _tell(self, said: dict[str, Any]) -> dict[str, Any]:
        content = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        length = torch.tensor(len(content))
        with self._together():
            distributed.broadcast(length, src=0)
            if self.rank:
                content = torch.empty(int(length), dtype=torch.uint8)
            distributed.broadcast(content, src=0)
        told: dict[str, Any] = json.loads(bytes(content.tolist()))
        return told

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            msg = (
                f"process {self.rank} of {self.count} has lost the others: one has ended, and says "
                f"why unless it was killed, or does not answer ({reason}); loda train --resume "
                f"RUN goes on from the newest checkpoint"
            )
            raise ConnectionError(msg) from error


def join_processes(device: str) -> Processes:
    """Meet the other processes of this run, if it was started with several.

    Parameters
    ----------
    device : str
        The setting of the experiment.

    Raises
    ------
    ValueError
        If the environment is not that of torchrun or accelerate launch.
    ConnectionError
        If the others cannot be reached.
    """
    count = started_with()
    if count == 1:
        return Processes()
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        msg = (
            f"WORLD_SIZE is {count}, but {', '.join(missing)} are not set: start several processes "
            f"with torchrun or accelerate launch"
        )
        raise ValueError(msg)
    here = Processes(int(os.environ["RANK"]), count)
    if not distributed.is_initialized():
        gpus = device != "cpu" and torch.cuda.is_available()
        with here._together():
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(seconds=_timeout())
            )
    return here


def started_with() -> int:
    """Number of processes that this one was started with."""
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        msg = f"WORLD_SIZE is {text!r}; allowed: a number of processes"
        raise ValueError(msg)
    return int(text)


def _timeout() -> float:
    text = os.environ.get("LODA_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        msg = f"LODA_TIMEOUT is {text!r}; allowed: seconds above 0"
        raise ValueError(msg)
    return seconds
