"""Real processes of the command line, forked from a server that has imported torch for all.

A fresh interpreter would take seconds for every one of them. `loda` is one that leads a process
group of its own, as one that a shell started; `together` are those of one run, as torchrun would
start them.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from training.cli import main

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["training.train", "training.analysis.evaluate"])
_CAPABILITIES_V3 = 0x20080522

Command = Sequence[str]


def loda(
    arguments: Sequence[str],
    log: Path,
    *,
    file_size: int | None = None,
    ordinary: bool = False,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    """A running ``loda`` whose output goes to the end of a log.

    With ``file_size`` the system lets no file grow beyond so many bytes, as on a full disk; an
    ``ordinary`` process of root has no more rights than the file modes give.
    """
    given = (list(arguments), log, file_size, ordinary, dict(environment or {}))
    process = _server.Process(target=_run, args=given)
    process.start()
    return process


def together(
    commands: Sequence[Command],
    logs: Path,
    *,
    count: int = 2,
    others: Sequence[Command] | None = None,
    environment: Mapping[str, str] | None = None,
    watched: Path | None = None,
    timeout: int = 240,
) -> list[BaseProcess]:
    """Processes of one run each time, which run the commands one after another until one fails.

    All but the first run the ``others``, if there are some, and have the ``environment``. Each
    writes a log of its own, which also says what it changed in a folder that is ``watched``.
    """
    pipes = [_server.Pipe(duplex=False) for _ in range(count - 1)]
    ends = [[send for _, send in pipes], *([receive] for receive, _ in pipes)]
    processes = []
    for rank in range(count):
        given = [*((others or commands) if rank else commands)]
        own = dict(environment or {}) if rank else {}
        arguments = (rank, count, ends[rank], given, own, logs / f"{rank}.log", watched, timeout)
        process = _server.Process(target=_run_together, args=arguments)
        process.start()
        processes.append(process)
    for end in (end for pair in pipes for end in pair):
        end.close()
    return processes


def status(process: BaseProcess) -> int:
    """Wait for a process; its exit status, negative for the signal that killed it."""
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def wait_until(process: BaseProcess, ready: Callable[[], bool]) -> None:
    """Wait until something is so, or the process has ended: on a busy machine that may be long."""
    while process.is_alive() and not ready():
        time.sleep(0.01)


def holds(process: BaseProcess, run: Path) -> bool:
    """Whether a process has the lock of a run folder."""
    try:
        # A killed one leaves the file, but not its number.
        return (run / ".lock").read_text() == f"{process.pid}\n"
    except FileNotFoundError:
        return False


def saves_itself(process: BaseProcess, run: Path) -> bool:
    """Whether a process holds a run folder, and has come to where signals make it save the run."""
    if sys.platform != "linux":
        return holds(process, run)
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return False
    (caught,) = (line.split()[1] for line in lines if line.startswith("SigCgt:"))
    return holds(process, run) and bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def members(group: int) -> list[int]:
    """Living processes of a process group (Linux)."""
    living = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, leader = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(leader) == group and state != "Z":
            living.append(int(folder.name))
    return living


def _run(
    arguments: list[str],
    log: Path,
    file_size: int | None,
    ordinary: bool,
    environment: dict[str, str],
) -> None:
    os.setpgid(0, 0)
    os.environ.update(environment)
    _fork_loaders()
    _write_to(log)
    # As in the foreground of a shell, however the tests were started.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    if ordinary and os.geteuid() == 0:
        _drop_capabilities()
    sys.exit(main(arguments))


def _run_together(
    rank: int,
    count: int,
    others: list[Connection],
    commands: list[Command],
    environment: dict[str, str],
    log: Path,
    watched: Path | None,
    timeout: int,
) -> None:
    _fork_loaders()
    _write_to(log)
    stores = [] if rank else _stores(len(commands))
    ports = others[0].recv() if rank else [store.port for store in stores]
    for other in [] if rank else others:
        other.send(ports)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    settings = {**names, "OMP_NUM_THREADS": 1, "LODA_TIMEOUT": timeout, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in settings.items()} | environment)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torchrun serves the stores itself
    if watched is not None:
        _watch(watched)
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        failed = main(command)
        if failed:
            sys.exit(failed)


def _fork_loaders() -> None:
    """Let loaders fork their workers as elsewhere, not from a server of the server."""
    multiprocessing.set_start_method("fork", force=True)


def _write_to(log: Path) -> None:
    """Send all output of this process to the end of a file, line by line."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))


def _stores(number: int) -> list[Any]:
    """Where the processes meet, one place a command; no port is chosen before it is in use."""
    from torch.distributed import TCPStore

    return [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(number)]


def _watch(folder: Path) -> None:
    """Say on the standard error what this process writes, makes, renames or removes there."""

    def audit(event: str, values: tuple[Any, ...]) -> None:
        changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        if event == "open":
            flags = values[2] if isinstance(values[2], int) else 0
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if changes and str(values[0]).startswith(str(folder)):
            os.write(2, f"changed {values[0]}\n".encode())

    sys.addaudithook(audit)


def _drop_capabilities() -> None:
    # capset(2): two blocks of effective, permitted and inheritable rights, all empty.
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
