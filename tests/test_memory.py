"""Peak memory is that of the part that was measured."""

import sys

import numpy as np
import pytest
import torch

from training.logging import peak_memory, reset_peak

CPU = torch.device("cpu")
SIZE = 200 * 2**20


def test_the_peak_is_seen_after_it_is_gone() -> None:
    reset_peak(CPU)
    before = peak_memory(CPU)["process"]
    held = np.ones(SIZE, dtype=np.uint8)
    del held
    assert SIZE // 2 < peak_memory(CPU)["process"] - before < 4 * SIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can start anew")
def test_a_new_part_starts_anew() -> None:
    held = np.ones(SIZE, dtype=np.uint8)
    del held
    high = peak_memory(CPU)["process"]
    reset_peak(CPU)
    assert peak_memory(CPU)["process"] < high - SIZE // 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda")
    reset_peak(device)
    before = peak_memory(device)["device"]
    held = torch.ones(SIZE, dtype=torch.uint8, device=device)
    del held
    assert peak_memory(device)["device"] >= before + SIZE
    reset_peak(device)
    assert peak_memory(device)["device"] < before + SIZE
