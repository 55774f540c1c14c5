"""Faults at single file operations of a run, and processes that are killed: what is tried and held.

``make faults`` runs it in build/faults; ``python tests/faults.py OUT --help`` has the rest. A run
holds if it ends with its results or in one clear line, and the next process then ends with the same
files as a run that nothing happened to. What it prints is the table of docs/survival.md.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from forked import loda, members, saves_itself, status, together, wait_until
from interrupted import differences
from small_runs import flags, squares, tiny

from training.run_dir import checkpoint_files, is_finished

SHIM = Path(__file__).with_name("faults.c")
FAULTS = {"kill": "SIGKILL before it", "EIO": "it fails (EIO)", "ENOSPC": "no room from it on"}


class Trial:
    """A folder for runs of one kind, and a run that nothing happened to."""

    def __init__(self, out: Path, root: Path, *more: str) -> None:
        self.out, self.number = out, 0
        experiment = tiny(root, out / "RUN")
        self.settings = [x for x in flags(experiment) if not x.startswith("--out=")]
        self.settings += ["--checkpoint.steps=4", "--keep.branches=true", *more]
        self.whole, log = out / "whole", out / "whole.log"
        out.mkdir()
        require(status(loda(self.train(self.whole), log)) == 0, log)

    def train(self, run: Path) -> list[str]:
        """The command that begins a run."""
        return ["train", *self.settings, f"--out={run}"]

    def next(self) -> tuple[Path, Path]:
        """Another run folder, and its log."""
        self.number += 1
        return self.out / f"{self.number}", self.out / f"{self.number}.log"

    def goes_on(self, run: Path, log: Path) -> bool:
        """Whether the next process, which no fault meets, ends with the files of the whole run."""
        again = ["train", "--resume", str(run)]
        saved = bool(checkpoint_files(run)) or is_finished(run)
        command = again if saved else [*self.train(run), "--overwrite"]
        if status(loda(command, log)) != 0 or differences(run, self.whole):
            return False
        left = [path for path in run.rglob("*") if path.name.startswith(".")]
        return not left and not (run / "checkpoints").exists()


def require(fine: bool, log: Path) -> None:
    """Stop if what was to be compared with has failed."""
    if not fine:
        raise RuntimeError(log.read_text())


def is_clear(left: int, log: Path, *allowed: int) -> bool:
    """Whether a process ended as it may, and without a traceback."""
    return left in allowed and "Traceback" not in log.read_text(errors="replace")


def operations(trial: Trial) -> int:
    """Number of the file operations of a run."""
    run, log = trial.next()
    environment = {"FAULT_FOLDER": f"{run}/", "FAULT_KIND": "count", "FAULT_AT": "0"}
    require(status(loda(trial.train(run), log, environment=environment)) == 0, log)
    return log.read_text().count("operation ")


def meets_fault(trial: Trial, kind: str, at: int) -> bool:
    """Whether a run survives a fault at one of its file operations."""
    run, log = trial.next()
    environment = {"FAULT_FOLDER": f"{run}/", "FAULT_KIND": kind, "FAULT_AT": str(at)}
    left = status(loda(trial.train(run), log, environment=environment))
    # Some operations may fail: removing what is not needed any more, say.
    allowed = (-signal.SIGKILL,) if kind == "kill" else (0, 2)
    return is_clear(left, log, *allowed) and trial.goes_on(run, log)


def loses_loader(trial: Trial, draw: random.Random) -> bool:
    """Whether a run survives that one of its loading processes is killed."""
    run, log = trial.next()
    process = loda(trial.train(run), log)
    wait_until(process, lambda: saves_itself(process, run))
    workers: list[int] = []

    def there() -> bool:
        workers[:] = [number for number in members(process.pid or 0) if number != process.pid]
        return bool(workers)

    process.join(draw.uniform(0, 1))
    wait_until(process, there)
    if workers:
        kill(draw.choice(workers))
    left = status(process)
    wait_until(process, lambda: not members(process.pid or 0))
    return is_clear(left, log, 0, 2) and trial.goes_on(run, log)


def loses_rank(trial: Trial, draw: random.Random) -> bool:
    """Whether a run of two processes survives that one of them is killed."""
    run, log = trial.next()
    logs = run.with_name(f"{run.name}-logs")
    logs.mkdir()
    processes = together([trial.train(run)], logs, timeout=60)
    lost = draw.randrange(2)
    wait_until(processes[0], lambda: saves_itself(processes[0], run))
    processes[0].join(draw.uniform(0, 1))
    if processes[lost].is_alive():
        kill(processes[lost].pid or 0)
    ends = [status(process) for process in processes]
    clear = is_clear(ends[1 - lost], logs / f"{1 - lost}.log", 0, 2)
    if not is_finished(run):  # in one process, which rounds in another way
        again = ["train", "--resume", str(run)]
        begun = checkpoint_files(run)
        clear &= status(loda(again if begun else [*trial.train(run), "--overwrite"], log)) == 0
    return clear and is_finished(run)


def two_start(trial: Trial, draw: random.Random) -> bool:
    """Whether of two processes that start in one folder one is refused and the other unharmed."""
    run, log = trial.next()
    logs = [log, log.with_suffix(".second.log")]
    processes: list[BaseProcess] = []
    for own in logs:
        processes.append(loda(trial.train(run), own))
        processes[0].join(draw.uniform(0, 0.5))
    ends = [status(process) for process in processes]
    clear = all(is_clear(end, own, 0, 2) for end, own in zip(ends, logs, strict=True))
    return clear and sorted(ends) == [0, 2] and not differences(run, trial.whole)


def kill(process: int) -> None:
    """Kill a process that may just be leaving."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def tried(out: Path, each: int, seed: int) -> dict[str, tuple[int, list[str]]]:
    """By kind of fault: how often it was tried, and the cases that did not hold."""
    root, draw = squares(out / "images"), random.Random(seed)
    trial = Trial(out / "files", root)
    count = operations(trial)
    results = {}
    for kind, text in FAULTS.items():
        places = sorted(draw.sample(range(1, count + 1), min(each, count)))
        failed = [f"{kind} at {at}" for at in places if not meets_fault(trial, kind, at)]
        results[f"one of {count} file operations: {text}"] = len(places), failed
    cases: dict[str, tuple[Callable[[Trial, random.Random], bool], Trial]] = {
        "a loading process is killed": (
            loses_loader,
            Trial(out / "loaders", root, "--data.workers=2"),
        ),
        "one of two training processes is killed": (loses_rank, trial),
        "two processes start in one folder": (two_start, trial),
    }
    for text, (holds, own) in cases.items():
        failed = [f"{own.out / str(own.number)}" for _ in range(each) if not holds(own, draw)]
        results[text] = each, failed
    return results


def with_shim(out: Path) -> int:
    """Build the shim and run this file again with it."""
    shim = out / "faults.so"
    compiler = shutil.which("cc") or shutil.which("gcc") or "cc"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    again = [sys.executable, *sys.argv]
    return subprocess.run(again, env={**os.environ, "LD_PRELOAD": str(shim)}).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--each", type=int, default=40, help="cases of every kind (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        given.out.mkdir(parents=True)
        return with_shim(given.out.resolve())
    results = tried(given.out.resolve(), given.each, given.seed)
    print("| what happens | tried | held |\n|---|---:|---:|")
    for text, (number, failed) in results.items():
        print(f"| {text} | {number} | {number - len(failed)} |")
    for _, failed in results.values():
        print(*failed, sep="\n", end="\n" if failed else "")
    return int(any(failed for _, failed in results.values()))


if __name__ == "__main__":
    sys.exit(main())
