"""The processes that train one model together, as torchrun and accelerate launch start them.

Accelerate joins them and carries their messages. Nothing here loads torch before it is used:
`Share` and `usable_cpus` are cheap to import.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor


TIMEOUT = 600.0
"""Seconds that a process waits for the others, unless LODA_TIMEOUT says otherwise."""


def usable_cpus() -> int:
    """Processors that the system lets this process run on, at least 1.

    A container or a batch system may leave it fewer than the machine has.

    Examples
    --------
    >>> 1 <= usable_cpus() <= (os.cpu_count() or 1)
    True
    """
    count = getattr(os, "process_cpu_count", None)  # from Python 3.13 on
    if count is not None:
        return count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Share:
    """Process number ``rank`` of ``count``, from 0 on, and its part of a sequence."""

    rank: int = 0
    count: int = 1

    def bounds(self, length: int) -> tuple[int, int]:
        """Start and end (exclusive) of the part of this process.

        Examples
        --------
        >>> [Share(rank, 2).bounds(5) for rank in range(2)]
        [(0, 2), (2, 5)]
        """
        return length * self.rank // self.count, length * (self.rank + 1) // self.count

    def even_bounds(self, length: int) -> tuple[int, int]:
        """As `bounds`, but every part starts at an even position.

        The two held-out halves of a task are its even and its odd images, so this leaves them as
        they are in one process.

        Examples
        --------
        >>> [Share(rank, 2).even_bounds(7) for rank in range(2)]
        [(0, 4), (4, 7)]
        """
        first, stop = self.bounds((length + 1) // 2)
        return min(2 * first, length), min(2 * stop, length)


class Processes(Share):
    """One process of a run, and its communication with the others.

    Each of these functions waits until all processes have called it, and does nothing if there is
    only one. A process that does not answer, because it has ended or hangs, is a ConnectionError.

    The first process, of rank 0, is the one that writes.
    """

    @property
    def writes(self) -> bool:
        """Whether this process writes the results."""
        return self.rank == 0

    def sum(self, tensors: "Sequence[Tensor]") -> None:
        """Replace tensors, in place, by their sums over the processes."""
        from backends.torch import sum_over_processes

        # One message for all tensors of a type, where Accelerate sends one for each.
        if self.count > 1:
            with self._together():
                sum_over_processes(tensors)

    def copy_from_first(self, tensors: "Sequence[Tensor]") -> None:
        """Overwrite tensors, in place, with those of the first process."""
        from accelerate.utils import broadcast

        if self.count > 1:
            with self._together():
                for tensor in tensors:
                    told = broadcast(tensor.detach().contiguous())
                    if self.rank:
                        tensor.detach().copy_(told)

    def gather_rows(self, part: "Tensor", total: int) -> "Tensor":
        """Gather all rows (total, D) of a matrix that the processes hold by `even_bounds`."""
        # Sum parts that are padded with zeros, which is exact. Parts differ in length, and
        # Accelerate's gather would need padding, the lengths and a cut as well.
        first, stop = self.even_bounds(total)
        whole = part.new_zeros(total, *part.shape[1:])
        whole[first:stop] = part
        self.sum([whole])
        return whole

    def maximum(self, number: int) -> int:
        """The maximum of a number over all processes."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        # Called after every step, so on the CPU: Accelerate would wait for the GPU.
        told = torch.tensor(number)
        with self._together():
            distributed.all_reduce(told, distributed.ReduceOp.MAX)
        return int(told)

    def wait(self) -> None:
        """Barrier: wait until all processes get here."""
        from accelerate.utils import wait_for_everyone

        if self.count > 1:
            with self._together():
                wait_for_everyone()

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call ``make`` in the first process only and return its result in all.

        Raises
        ------
        ConnectionError
            In the others, if it raises in the first.
        """
        if self.count == 1:
            return make()
        value = None
        if self.rank == 0:
            try:
                value = make()
            except BaseException as error:
                self._tell({"error": str(error)})
                raise
        said = self._tell({"value": value})
        if "error" in said:
            msg = f"process 0 has stopped: {said['error']}"
            raise ConnectionError(msg)
        return said["value"]

    def require_same(self, what: str, value: Any) -> None:
        """Raise unless ``value`` (ready for JSON) is the same in all processes.

        Raises
        ------
        ValueError
            In all processes.
        """
        if self.count == 1:
            return
        from accelerate.utils import gather_object

        with self._together():
            values = gather_object([json.dumps(value, sort_keys=True)])
        if len(set(values)) > 1:
            msg = (
                f"the {self.count} processes must have the same {what}, but they differ: start all "
                f"of them with one command line, on the same data and the same version"
            )
            raise ValueError(msg)

    @contextmanager
    def first_of_each_machine(self) -> Iterator[None]:
        """Let one process per machine go first, so that the others find what it downloads."""
        # As Accelerate's local_main_process_first, whose errors would not explain what happened.
        later = self.count > 1 and int(os.environ.get("LOCAL_RANK", "0")) > 0
        if later:
            self.wait()
        yield
        if not later:
            self.wait()

    def _tell(self, said: dict[str, Any]) -> dict[str, Any]:
        from accelerate.utils import broadcast_object_list

        with self._together():
            (told,) = broadcast_object_list([said])
        return dict(told)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Turn a failure of torch's communication into an error that explains it."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            msg = (
                f"process {self.rank} of {self.count} has lost the others: another process has "
                f"ended (see its message, unless it was killed) or does not answer ({reason}); "
                f"resume with: loda train --resume RUN, and --allow CLASS for classes of your own"
            )
            raise ConnectionError(msg) from error


def make_accelerator(device: str, precision: str, tracker: str | None = None) -> "Accelerator":
    """Device, precision and tracker of an experiment, and its processes if there are several.

    Raises
    ------
    ValueError
        If the environment is not that of torchrun or accelerate launch.
    ConnectionError
        If the other processes cannot be reached.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs

    here = launched_processes()
    gpus = device != "cpu" and torch.cuda.is_available()
    handlers = []
    if here.count > 1:
        # Gloo besides NCCL: data other than tensors of the model stay on the CPU.
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        timeout = timedelta(seconds=_timeout())
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
    # Accelerate keeps the settings of the first Accelerator of a process, which may run several
    # experiments.
    AcceleratorState._reset_state(reset_partial_state=True)
    with here._together():
        accelerator = Accelerator(
            # Without cpu=True, Accelerate treats several CPU processes as one.
            cpu=device == "cpu" or (here.count > 1 and not gpus),
            mixed_precision=precision,
            log_with=tracker,
            project_dir=".",  # of a tracker, until it is started
            kwargs_handlers=handlers,
        )
    if accelerator.device.type == "cuda" and precision == "no":
        # float32 is meant: by default convolutions on recent GPUs would use TF32.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    return accelerator


def launched_processes() -> Processes:
    """The processes that were started together, as the launcher's environment says.

    Raises
    ------
    ValueError
        If the environment is not that of torchrun or accelerate launch.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        msg = f"WORLD_SIZE must be a number of processes, got {text!r}"
        raise ValueError(msg)
    if int(text) == 1:
        return Processes()
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in wanted if name not in os.environ]
    if missing:
        msg = (
            f"WORLD_SIZE is {text}, but {', '.join(missing)} are not set: start several processes "
            f"with torchrun or accelerate launch"
        )
        raise ValueError(msg)
    return Processes(int(os.environ["RANK"]), int(text))


def _timeout() -> float:
    text = os.environ.get("LODA_TIMEOUT", str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        msg = f"LODA_TIMEOUT must be seconds above 0, got {text!r}"
        raise ValueError(msg)
    return seconds
