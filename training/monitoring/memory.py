"""Peak memory of a part of a run, as far as the system tells."""

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Begin to measure; what was in use before counts from what is left of it now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # Only Linux can start anew (proc(5), clear_refs); a container may forbid it.
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5\n", encoding="ascii")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes at most in use since `reset_peak`.

    Returns
    -------
    dict of str to int
        ``process``: resident memory of this process, without its loaders' workers; where the
        system cannot start anew, the most since the process began, and absent where it does not
        tell at all. ``device``: memory that torch had allocated on a CUDA device.

    Examples
    --------
    >>> "device" in peak_memory(torch.device("cpu"))
    False
    """
    found = {}
    resident = _resident()
    if resident is not None:
        found["process"] = resident
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def _resident() -> int | None:
    with suppress(OSError):
        status = (_PROCESS / "status").read_text(encoding="utf-8")
        if line := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return 1024 * int(line[1])
    with suppress(ImportError):
        import resource  # not on Windows

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest
    return None
