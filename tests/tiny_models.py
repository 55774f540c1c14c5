"""Models of a few weights for LoDA over whole models, their tasks, and what is read off them.

A task's images and draws depend on its number alone, so two runs of one task can be compared.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backends.torch import LoDA, LoDASettings, TaskRecord, collect_moments


def mlp(seed: int = 0) -> nn.Sequential:
    """Two target widths (6 and 10), in float64 so that oracles are tight."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 6), nn.Linear(6, 4)
    ).double()


MLP = {"target": ("0", "2", "4"), "rank": 3}
WIDTHS = {"0": 6, "2": 10, "4": 10}


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return VisionTransformer(**{**small, "num_classes": 4, **options})


def padded_bert() -> tuple[nn.Module, list[dict[str, Tensor]], list[Tensor]]:
    """A small BERT, batches of which 76 % is padding, and the real sequences one by one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=25,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    lengths = [[3, 9, 4, 8], [2, 25, 1, 6], [4, 5, 3, 2]]
    batches, sequences = [], []
    for sizes in lengths:
        tokens = torch.randint(1, 50, (len(sizes), 25))
        real = torch.arange(25) < torch.tensor(sizes)[:, None]
        batches.append({"input_ids": tokens * real, "attention_mask": real.long()})
        sequences += [row[None, :size] for row, size in zip(tokens, sizes, strict=True)]
    share = sum(map(sum, lengths)) / sum(25 * len(sizes) for sizes in lengths)
    assert share == pytest.approx(0.24)
    return model, batches, sequences


def small(build: Callable[[], nn.Module] = mlp, **settings: Any) -> LoDA:
    """LoDA over a new model, three directions a branch unless the settings say otherwise."""
    model = build()
    options = MLP if isinstance(model, nn.Sequential) else {"rank": 3}
    return LoDA(model, LoDASettings(**{**options, **settings}), record_moments=True)


def inputs(task: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + task)
    size = (24, 3, 8, 8) if isinstance(model, VisionTransformer) else (24, 6)
    dtype = next(model.parameters()).dtype
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    # Every task lives in directions of its own scale, as real tasks do.
    scale = torch.rand(size[1:], generator=generator, dtype=torch.float64) ** 3 * 3
    return (x * scale).to(dtype), torch.arange(24) % 4


def batches(task: int, model: nn.Module) -> list[Tensor]:
    return list(inputs(task, model)[0].split(10))


def fit(
    loda: LoDA, task: int, optimizer: torch.optim.Optimizer | None = None, *, steps: int = 3
) -> torch.optim.Optimizer:
    """A few gradient-aligned steps in an open task; draws depend on the task alone."""
    x, y = inputs(task, loda.model)
    optimizer = optimizer or torch.optim.SGD(loda.trainable_parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(task)
    for _ in range(steps):
        loda.step(
            lambda rows: F.cross_entropy(loda.model(x[rows]), y[rows]),
            y, optimizer, radius=0.3, generator=generator,
        )  # fmt: skip
    return optimizer


def begin(loda: LoDA, task: int) -> None:
    loda.begin_task(batches(task, loda.model))


def end(loda: LoDA, task: int) -> TaskRecord:
    return loda.end_task(batches(task, loda.model))


def learn(loda: LoDA, task: int) -> TaskRecord:
    begin(loda, task)
    fit(loda, task)
    return end(loda, task)


def learn_and_look(loda: LoDA, task: int) -> tuple[dict[str, Tensor], TaskRecord]:
    """Moments through the trained model, before the merge, and the record of the task."""
    begin(loda, task)
    fit(loda, task)
    return means(loda.model, task, loda.settings.target), end(loda, task)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def totals(loda: LoDA) -> dict[str, Tensor]:
    """The history by layer, as it enters the solvers."""
    return {name: past.total for name, past in loda.history.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def means(model: nn.Module, task: int, target: Any) -> dict[str, Tensor]:
    moments = collect_moments(copy.deepcopy(model), batches(task, model), target)
    return {name: m.mean for name, m in moments.items()}


def never() -> Iterator[Tensor]:
    """Batches that must not be asked for."""
    pytest.fail("a batch was asked for")
    yield torch.ones(1)


class HostReads(TorchDispatchMode):
    """Counts what would make an accelerator wait: reads of values, or sizes that hang on them."""

    NAMES = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        moves = name in ("_to_copy", "copy_") and kwargs.get("device") is not None
        if name in self.NAMES or moves:
            self.seen.append(name)
        return func(*args, **kwargs)


def breaking(good: list[Tensor], failure: BaseException, on_walk: int = 1) -> Any:
    class Breaking:
        walks = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.walks += 1
            yield good[0]
            if self.walks >= on_walk:
                raise failure
            yield from good[1:]

    return Breaking()
