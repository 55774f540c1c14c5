"""What measures a GPU runs, on the CPU and on a tiny model: its numbers are numbers."""

import pytest
import torch
from throughput import PRECISIONS, Setting, evaluation, peak, precision, solves, training, waiting

TINY = Setting(
    "cpu", "vit_tiny_patch16_224", image_size=16, batch=4, classes=2, rank=2,
    options=(("patch_size", 8), ("embed_dim", 8), ("depth", 2), ("num_heads", 2)),
)  # fmt: skip


@pytest.mark.parametrize("name", PRECISIONS)
def test_training_is_measured(name: str) -> None:
    found = training(TINY, name, compiled=False, rounds=1)
    assert found["images a second"] > 0
    # Two blocks of 5 tokens an image, each image twice, forward and back; and the rest.
    block = 2 * 12 * 8**2 * 5 * TINY.batch
    step = found["operations a second"] * TINY.batch / found["images a second"]
    assert 7 * block < step < 16 * block
    assert evaluation(TINY, name, compiled=False, rounds=1) > 0


def test_peak_solves_and_waiting_are_measured() -> None:
    assert peak("fp32", "cpu", size=64, rounds=2) > 0
    assert solves(TINY, rounds=1) > 0
    whole, rest = (torch.randn(n, 3, 16, 16) for n in (TINY.batch, 1))
    labels = torch.zeros(TINY.batch, dtype=torch.int64)
    assert 0 <= waiting(TINY, "fp32", [(whole, labels), (whole, labels), (rest, labels[:1])]) < 1


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with precision("tf32", "cpu"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
