"""How fast a GPU trains a ViT-B/16 at 224 px with a batch of 48: ``make bench`` where there is one.

Solves and evaluation are timed too, and whether the pipeline keeps up. Nothing is compared with a
goal but the share of the matmul peak in bfloat16; the numbers are for the page of benchmarks.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from throughput import PRECISIONS, Setting, evaluation, peak, solves, training, waiting

from training.config import DataConfig
from training.data import build_stream, loader, train_transform

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
SETTING, ROUNDS = Setting(), 20


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_training_and_evaluation(
    name: str, compiled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    best = peak(name, SETTING.device, size=8192, rounds=ROUNDS)
    found = training(SETTING, name, compiled=compiled, rounds=ROUNDS)
    evaluated = evaluation(SETTING, name, compiled=compiled, rounds=ROUNDS)
    share = found["operations a second"] / best
    with capsys.disabled():
        print(
            f"\n  {torch.cuda.get_device_name()}, {name}, {'compiled' if compiled else 'eager'}: "
            f"{found['images a second']:.0f} images/s trained, {100 * share:.0f} % of the "
            f"{best / 1e12:.0f} TFLOP/s of a product of 8192; {evaluated:.0f} images/s evaluated; "
            f"peak {found['peak bytes'] / 2**30:.2f} GiB"
        )
    if name == "bf16" and compiled:
        assert share >= 0.4


def test_solves_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    took = solves(SETTING, rounds=3)
    with capsys.disabled():
        print(f"\n  all solves of a task, on the device: {took:.2f} s")
    assert took > 0


@pytest.mark.parametrize("workers", [0, 4, 8])
def test_the_device_does_not_wait_for_images(
    workers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    for number in range(20 * SETTING.batch):
        folder = tmp_path / "train" / str(number % SETTING.classes)
        folder.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, size=(32, 40, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((500, 400)).save(folder / f"{number}.jpg", quality=90)
    (tmp_path / "test").symlink_to(tmp_path / "train")
    data = DataConfig(
        "folder",
        root=str(tmp_path),
        init_cls=SETTING.classes,
        image_size=224,
        train_crop="random_resized",
        flip=True,
        workers=workers,
    )
    images = build_stream(data, 0).train.with_transform(train_transform(data))
    batches = loader(
        images, SETTING.batch, shuffle=True, seed=0, workers=workers, device=SETTING.device
    )
    share = waiting(SETTING, "bf16", batches)
    with capsys.disabled():
        print(f"\n  {workers} workers: training waits {100 * share:.0f} % of the time for images")
    assert share <= (0.1 if workers == 8 else 1.0)  # eight decode as fast as it trains
