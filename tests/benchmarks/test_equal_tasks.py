"""Twenty equal tasks through the whole training loop: the last cost what the first did.

Made-up images, equally many of every class, a small transformer, and the heads as the only
read-out, since heads and class statistics do grow. Times and memory are those that the run writes
into its ``metrics.jsonl``; its clock counts processor time here, which other work on the machine
changes little: ``make bench``.
"""

import ctypes
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from training.config import (
    BackboneConfig,
    DataConfig,
    Experiment,
    HeadConfig,
    MethodConfig,
    TrainConfig,
)
from training.logging import peak_memory, reset_peak
from training.train import train

TASKS, CLASSES, IMAGES, EPOCHS, BATCH = 20, 2, 24, 4, 16
STEPS = EPOCHS * CLASSES * IMAGES // BATCH
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 3}


def noise(root: Path) -> Path:
    """Noise of another mean colour for every class."""
    rng = np.random.default_rng(0)
    for number in range(TASKS * CLASSES):
        colour = rng.integers(40, 216, size=3)
        for split, count in (("train", IMAGES), ("test", 2)):
            folder = root / split / f"{number:02}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (colour + rng.integers(-40, 40, size=(32, 32, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def given_back() -> float:
    """MiB that the C library held on to after they were freed, where it is glibc."""
    before = resident()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return before - resident()


def resident() -> float:
    cpu = torch.device("cpu")
    reset_peak(cpu)
    return peak_memory(cpu)["process"] / 2**20


def test_the_last_of_twenty_equal_tasks_cost_what_the_first_did(
    benchmark: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr("time.perf_counter", time.process_time)
    experiment = Experiment(
        data=DataConfig(
            "folder",
            root=str(noise(tmp_path / "images")),
            init_cls=CLASSES,
            increment=CLASSES,
            resize=32,
            image_size=32,
            train_crop="pad",
            pad=4,
            flip=True,
        ),
        backbone=BackboneConfig("vit_tiny_patch16_224", options=VIT, pretrained=False),
        method=MethodConfig(rank=8, radius=0.1),
        train=TrainConfig(epochs=EPOCHS, batch_size=BATCH, lr=1e-3, eval_batch_size=64),
        head=HeadConfig(readout="heads", start="random"),
        device="cpu",
        threads=1,
        out=str(tmp_path / "run"),
    )
    run = benchmark.pedantic(train, (experiment,), {"quiet": True}, rounds=1)
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tasks = [event for event in events if event["event"] == "task"]
    assert len(tasks) == TASKS
    steps = [1e3 * task["seconds"]["train"] / STEPS for task in tasks]
    peaks = [task["memory"]["process"] / 2**20 for task in tasks]
    early, late = (statistics.median(part) for part in (steps[:5], steps[-5:]))
    held = given_back()
    low, high = (statistics.median(part) for part in (peaks[:5], peaks[-5:]))
    with capsys.disabled():
        print(
            f"\n  {TASKS} equal tasks of {STEPS} steps, the first five against the last five:\n"
            f"  a step {early:.1f} ms and {late:.1f} ms: {late / early:.3f} (goal 0.9 to 1.1)\n"
            f"  peak   {low:.1f} MiB and {high:.1f} MiB: {high / low:.4f} (goal at most 1.03)\n"
            f"  peaks of all tasks in MiB: {' '.join(f'{peak:.0f}' for peak in peaks)}\n"
            f"  freed by all of them, but held by the C library: {held:.0f} MiB"
        )
    assert 0.9 <= late / early <= 1.1
    assert high <= 1.03 * low
