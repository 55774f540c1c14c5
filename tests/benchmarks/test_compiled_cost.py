"""What `torch.compile` saves of a gradient-aligned step on the processor: ``make bench``.

No goal: it is for whoever weighs ``train.compile``. Halves of a mini-batch have any size, as in
training, and one compiled graph serves them all.
"""

import shutil
import statistics
import time
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from turns import in_turn, ratio

from backends.torch import LoDA, LoDASettings

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here"),
    # What torch's own compiler warns of is not ours.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]
MODELS: dict[str, dict[str, Any]] = {
    "ViT-S at 224 px, batch 8": {"img_size": 224},
    "6 blocks of 128 at 32 px, batch 48": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
    },
}
CLASSES = 4


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_step(benchmark: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options, batch = MODELS[name], int(name.rsplit(" ", 1)[1])
    model = timm.create_model("vit_small_patch16_224", num_classes=CLASSES, **options)
    images = torch.randn(batch, 3, options["img_size"], options["img_size"])
    loda = LoDA(model, LoDASettings(rank=16, heldout=False), trainable=["head.*"])
    for _ in range(2):
        loda.begin_task([images])
        if loda.tasks == 0:
            loda.end_task([images])
    model.train()
    optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=1e-4, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    # As a run does it: one graph for halves of any size.
    forward = {"as it is": model, "compiled": torch.compile(model, dynamic=True)}

    def step(kind: str) -> None:
        labels = torch.randint(CLASSES, (batch,), generator=generator)

        def loss(rows: Tensor) -> Tensor:
            return F.cross_entropy(forward[kind](images[rows]), labels[rows])

        loda.step(loss, labels, optimizer, radius=0.1, draw=0.5, generator=generator)

    start = time.process_time()
    for _ in range(4):
        step("compiled")
    compiling = time.process_time() - start
    times = in_turn({kind: lambda kind=kind: step(kind) for kind in forward}, rounds=15)  # type: ignore[misc]
    benchmark.pedantic(step, args=("compiled",), rounds=1)
    found = ratio(times, "compiled", "as it is")
    with capsys.disabled():
        print(
            f"\n  {name}: a compiled step to one as it is {found:.3f} "
            f"({1e3 * statistics.median(times['as it is']):.0f} ms); compiling, with four steps, "
            f"{compiling:.0f} s"
        )
    assert found < 1.2
