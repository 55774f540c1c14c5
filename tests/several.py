"""One `loda` in several real processes, with what torchrun would put into their environment.

They are forked from a server that has imported torch for all; each writes a log of its own, which
also says what it changed in a folder that is watched.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from training.cli import main

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["training.loop", "training.inference"])

Command = Sequence[str]


def start(
    commands: Sequence[Command],
    logs: Path,
    *,
    count: int = 2,
    others: Sequence[Command] | None = None,
    watched: Path | None = None,
    timeout: int = 60,
) -> list[BaseProcess]:
    """Processes that run the commands one after another until one fails.

    All but the first run the ``others``, if there are some.
    """
    ports = _free_ports(len(commands))
    found = []
    for rank in range(count):
        given = [*((others or commands) if rank else commands)]
        log = logs / f"{rank}.log"
        process = _server.Process(
            target=_run, args=(rank, count, ports, given, log, watched, timeout)
        )
        process.start()
        found.append(process)
    return found


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _run(
    rank: int,
    count: int,
    ports: list[int],
    commands: list[Command],
    log: Path,
    watched: Path | None,
    timeout: int,
) -> None:
    # Loaders fork here as they do elsewhere, not from another server.
    multiprocessing.set_start_method("fork", force=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    settings = {**names, "OMP_NUM_THREADS": 1, "LODA_TIMEOUT": timeout, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in settings.items()})
    if watched is not None:
        _watch(watched)
    for port, command in zip(ports, commands, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = main(command)
        if status:
            sys.exit(status)


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
