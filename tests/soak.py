"""A stream of fifty tasks, ended again and again at random moments, against one left alone.

``make soak`` runs it in build/soak; ``python tests/soak.py OUT --help`` has the rest. Further
arguments are settings of ``loda train``. What it prints is the table of docs/developers/soak.md.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from forked import holds, loda, saves_itself, status, wait_until
from interrupted import differences
from PIL import Image

from training.checkpoint import Checkpoint, read_checkpoint
from training.run_dir import checkpoint_files

SIDE, TRAIN, TEST = 16, 8, 4  # pixels, and images a class
EPOCHS, BATCH = 6, 4
VIT = {"img_size": SIDE, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
# Half of the ends give no warning; a fifth of all spoil the newest checkpoint as well.
KINDS = {"SIGKILL": 3, "SIGKILL, newest checkpoint cut": 2, "SIGTERM": 3, "SIGINT": 2}
STATUS = {"SIGTERM": 143, "SIGINT": 130}


class End(NamedTuple):
    """One end of a process, and where the next one went on."""

    kind: str
    where: str
    resumed: str
    lost: float


def images(root: Path, classes: int) -> Path:
    """Noisy patterns of four by four squares, a pattern a class."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        pattern = np.kron(rng.integers(60, 196, size=(4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
        for split, count in (("train", TRAIN), ("test", TEST)):
            folder = root / split / f"{number:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            for k in range(count):
                noisy = pattern + rng.normal(scale=40, size=pattern.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.png")
    return root


def settings(root: Path, tasks: int) -> list[str]:
    """Arguments of ``loda train`` for the stream."""
    return [
        *("--data.name=folder", f"--data.root={root}", f"--data.tasks={tasks}"),
        *(f"--data.image_size={SIDE}", f"--data.resize={SIDE}", "--data.flip=true"),
        *("--data.train_crop=pad", "--data.pad=2"),
        *("--backbone.name=vit_tiny_patch16_224", f"--backbone.options={VIT}"),
        *("--backbone.pretrained=false", "--method.rank=4", f"--train.epochs={EPOCHS}"),
        *(f"--train.batch_size={BATCH}", "--train.lr=0.02", "--train.eval_batch_size=64"),
        *("--head.readout=nearest_mean", '--head.also=["heads"]', "--device=cpu", "--threads=1"),
        *("--checkpoint.steps=5",),
    ]


def sound(run: Path) -> list[Checkpoint]:
    """The checkpoints of a run that can be used, the newest one last."""
    usable = []
    for path in checkpoint_files(run):
        with suppress(ValueError):
            usable.append(read_checkpoint(path))
    return usable


def events(run: Path) -> list[dict[str, Any]]:
    """What a run has logged so far; a process that was killed may leave half a line."""
    lines: list[dict[str, Any]] = []
    if not (run / "metrics.jsonl").is_file():
        return lines
    for line in (run / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def reached(run: Path) -> str:
    """Task and epoch that a run is in, as its log tells."""
    logged = events(run)
    task = sum(e["event"] == "task" for e in logged)
    epochs = sum(e["event"] == "epoch" and e["task"] == task + 1 for e in logged)
    return f"task {task + 1}, " + (f"epoch {epochs + 1}" if epochs < EPOCHS else "after training")


def stands(checkpoint: Checkpoint) -> str:
    """Where a checkpoint stands."""
    at, task = checkpoint.record["open"], checkpoint.record["tasks"] + 1
    if at is None:
        return f"start of task {task}"
    return f"task {task}, epoch {at['epoch'] + 1}, step {at['batch']}"


def end(process: BaseProcess, run: Path, kind: str, draw: random.Random) -> End | None:
    """End a process in a way; None if it was through before."""
    name, _, cut = kind.partition(",")
    moment, where = time.time(), reached(run)
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.Signals[name])
    left = status(process)
    if left == 0 or (run / "summary.json").is_file():  # or it was just leaving
        return None
    if left != STATUS.get(name, -signal.SIGKILL):
        msg = f"{kind} in {where}: the process ended with {left}"
        raise RuntimeError(msg)
    usable = sound(run)
    if cut and len(usable) > 1:  # one of two stays: more than that nobody promises
        newest = usable.pop().path
        os.truncate(newest, draw.randrange(newest.stat().st_size))
        name = kind
    saved = usable[-1].path.stat().st_mtime
    return End(name, where, stands(usable[-1]), max(moment - saved, 0.0))


def interrupted(
    out: Path, arguments: list[str], ends: int, whole: Path, seed: int
) -> tuple[list[End], float]:
    """Train with ends at random moments; what they were, and seconds of all processes.

    A process may log so many lines, however fast the machine is just then, and lives on for a
    random time after that.
    """
    lines = len(events(whole))
    pace = sum(event["seconds"]["train"] for event in tasks_of(whole)) / lines
    draw, run, log = random.Random(seed), out / "run", out / "run.log"
    past: list[End] = []
    begun, process = time.time(), loda(["train", *arguments, f"--out={run}"], log)
    while len(past) < ends:
        wait_until(process, lambda process=process: saves_itself(process, run) and bool(sound(run)))
        target = len(events(run)) + draw.uniform(0, 1.8 * lines / ends)
        wait_until(process, lambda target=target: len(events(run)) >= target)
        process.join(draw.uniform(0, pace))
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        last = end(process, run, kind, draw)
        if last is None:
            if process.exitcode != 0:
                process = loda(["train", "--resume", str(run)], log)
            break
        past.append(last)
        process = loda(["train", "--resume", str(run)], log)
    if status(process) != 0:
        msg = f"the last process ended with status {process.exitcode}: see {log}"
        raise RuntimeError(msg)
    if any("cut" in x.kind for x in past) and "is damaged" not in log.read_text():
        msg = f"checkpoints were damaged, but {log} warns of none"
        raise RuntimeError(msg)
    return past, time.time() - begun


def tasks_of(run: Path) -> list[dict[str, Any]]:
    """What a run has logged of its tasks."""
    return [event for event in events(run) if event["event"] == "task"]


def summary(run: Path) -> str:
    """Cost of the first and the last five tasks, and what lies on the disk."""
    tasks = tasks_of(run)
    steps = EPOCHS * 2 * TRAIN // BATCH
    lines = ["| | first five tasks | last five tasks |", "|---|---|---|"]
    for name, scale, of, values in (
        # The fastest is the one that other work on the machine has disturbed least.
        (
            "training, ms a step (fastest task)",
            1e3 / steps,
            min,
            [t["seconds"]["train"] for t in tasks],
        ),
        ("peak memory, MiB (largest)", 2**-20, max, [t["memory"]["process"] for t in tasks]),
    ):
        ends = (scale * of(part) for part in (values[:5], values[-5:]))
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in ends) + " |")
    files = [p for p in run.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files) / 2**20
    return "\n".join([*lines, "", f"On disk at the end: {len(files)} files, {size:.1f} MiB."])


def soak(out: Path, tasks: int, ends: int, seed: int, rest: list[str]) -> bool:
    """Run both and print the tables; whether the outcome is the same."""
    out.mkdir(parents=True)
    arguments = [*settings(images(out / "images", 2 * tasks), tasks), *rest]
    whole = out / "whole"
    process = loda(["train", *arguments, f"--out={whole}"], out / "whole.log")
    wait_until(process, lambda: holds(process, whole))
    begun = time.time()
    if status(process) != 0:
        msg = f"the run that was left alone failed: see {out / 'whole.log'}"
        raise RuntimeError(msg)
    alone = time.time() - begun
    past, seconds = interrupted(out, arguments, ends, whole, seed)
    differing = differences(out / "run", whole)
    rows = [
        f"| {number} | {x.kind} | {x.where} | {x.resumed} | {x.lost:.2f} |"
        for number, x in enumerate(past, 1)
    ]
    counts = {kind: sum(x.kind == kind for x in past) for kind in KINDS}
    print("| end | by | in | resumed from | seconds lost |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{len(past)} ends: {', '.join(f'{n} {kind}' for kind, n in counts.items())}.")
    print(f"Alone {alone:.0f} s, with ends {seconds:.0f} s in {len(past) + 1} processes.")
    lost = [x.lost for x in past] or [0.0]
    print(f"Lost {statistics.mean(lost):.2f} s an end, at most {max(lost):.2f} s.\n")
    for name, run in (("Left alone", whole), ("With ends", out / "run")):
        print(f"{name}:\n\n{summary(run)}\n")
    print(f"Differences in bits: {', '.join(differing) or 'none'}.")
    return not differing


def main() -> int:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__, allow_abbrev=False)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--ends", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    known, rest = parser.parse_known_args()
    return 0 if soak(known.out, known.tasks, known.ends, known.seed, rest) else 1


if __name__ == "__main__":
    sys.exit(main())
