"""Real processes of the command line, forked from a server that has imported torch for all.

A fresh interpreter would take seconds for every one of them. Each leads a process group of its
own, as one that a shell started.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from training.cli import main

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["training.loop", "training.inference"])
_CAPABILITIES_V3 = 0x20080522


def loda(
    arguments: Sequence[str], log: Path, *, file_size: int | None = None, ordinary: bool = False
) -> BaseProcess:
    """A running ``loda`` whose output goes to the end of a log.

    With ``file_size`` the system lets no file grow beyond so many bytes, as on a full disk; an
    ``ordinary`` process of root has no more rights than the file modes give.
    """
    process = _server.Process(target=_run, args=(list(arguments), log, file_size, ordinary))
    process.start()
    return process


def status(process: BaseProcess, timeout: float = 300) -> int:
    """Wait for a process; its exit status, negative for the signal that killed it."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        msg = f"a process did not end within {timeout} s"
        raise TimeoutError(msg)
    return process.exitcode


def wait_until(process: BaseProcess, ready: Callable[[], bool], timeout: float = 120) -> None:
    """Wait until something is so, or the process has ended."""
    end = time.monotonic() + timeout
    while process.is_alive() and not ready():
        if time.monotonic() > end:
            process.kill()
            msg = f"not ready within {timeout} s"
            raise TimeoutError(msg)
        time.sleep(0.01)


def holds(process: BaseProcess, run: Path) -> bool:
    """Whether a process has the lock of a run folder."""
    lock = run / ".lock"
    return lock.is_file() and lock.read_text() == f"{process.pid}\n"


def members(group: int) -> list[int]:
    """Living processes of a process group (Linux)."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, leader = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(leader) == group and state != "Z":
            found.append(int(folder.name))
    return found


def _run(arguments: list[str], log: Path, file_size: int | None, ordinary: bool) -> None:
    os.setpgid(0, 0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    # As in the foreground of a shell, however the tests were started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if ordinary and os.geteuid() == 0:
        _drop_capabilities()
    sys.exit(main(arguments))


def _drop_capabilities() -> None:
    # capset(2): two blocks of effective, permitted and inheritable rights, all empty.
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
