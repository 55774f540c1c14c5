"""What a task costs does not grow with the tasks before it, and nothing is computed in vain.

Operators are counted rather than timed, so a busy machine changes nothing; ``make bench`` times.
"""

from collections import Counter
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from live_memory import LiveBytes
from timm.models.vision_transformer import VisionTransformer
from tiny_models import batches, inputs, vit
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backends.torch import LoDA, LoDASettings

SETTINGS = LoDASettings(rank=3, heldout=False)


class Operators(TorchDispatchMode):
    """Counts operators by name and the shapes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, Tensor))
        self.found[str(func), *shapes] += 1
        return result


def cost(loda: LoDA, task: int) -> Counter[tuple[Any, ...]]:
    """Everything that torch does in a task of two steps."""
    images, labels = inputs(task, loda.model)
    with Operators() as operators:
        loda.begin_task(batches(task, loda.model))
        optimizer = torch.optim.SGD(loda.trainable_parameters(), lr=0.01, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            loda.step(
                lambda rows: F.cross_entropy(loda.model(images[rows]), labels[rows]),
                labels,
                optimizer,
                radius=0.3,
                generator=generator,
            )
        loda.end_task(batches(task, loda.model))
    return operators.found


def test_the_fourth_task_does_what_the_second_did() -> None:
    loda = LoDA(vit(), SETTINGS)
    costs = [cost(loda, task) for task in range(4)]
    assert costs[0] != costs[1]  # the first has one branch, and no past
    assert sum(costs[1].values()) > 1000
    assert costs[1] == costs[3]


def open_second_task(model: VisionTransformer) -> LoDA:
    loda = LoDA(model, LoDASettings(rank=3, target="blocks.1.attn.qkv"))
    for task in range(2):
        loda.begin_task(batches(task, model))
        if task == 0:
            loda.end_task(batches(task, model))
    return loda


def test_gradients_stop_at_the_first_adapted_layer() -> None:
    model = vit().requires_grad_(requires_grad=False)
    loda = open_second_task(model)
    images, labels = inputs(1, model)
    reached: list[str] = []
    for name, module in model.named_modules():
        module.register_full_backward_pre_hook(lambda *_, name=name: reached.append(name))
    outside = model.blocks[0](model.patch_embed(images[:2]))
    assert not outside.requires_grad  # below it nothing is recorded,
    with Operators() as operators:
        F.cross_entropy(model(images), labels).backward()
    below = [name for name in reached if name.startswith(("patch_embed", "blocks.0", "pos_drop"))]
    assert reached
    assert not below  # nothing goes back,
    trained = {id(p) for p in loda.trainable_parameters()}
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained)
    # and no product makes the gradient of a frozen weight.
    frozen = {tuple(p.shape) for p in model.parameters() if id(p) not in trained and p.ndim == 2}
    width, rank = 12, 3
    assert (3 * width, width) in frozen
    products = [shapes for name, *shapes in operators.found if name == "aten.mm.default"]
    made = {(a[0], b[1]) for a, b in products}
    assert (3 * width, 2 * rank) in made or (2 * rank, 3 * width) in made
    assert not made & (frozen | {shape[::-1] for shape in frozen})


class Fused(nn.Module):
    """A layer three times as high as it is wide, such as that of queries, keys and values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        return sum(torch.tanh(self.qkv(x)).chunk(3, dim=-1), x)


def peaks(
    *,
    record_moments: bool = False,
    moment_dtype: Literal["float64", "float32"] = "float64",
    fused: bool = False,
) -> list[float]:
    """Most memory at the beginning and at the end of a third task, in histories of float64.

    Counted are the history, the moments and all that is computed on the way, copies of weights
    too, but not the model itself.
    """
    layers, width = 12, 256
    torch.manual_seed(0)
    block = Fused if fused else lambda width: nn.Sequential(nn.Linear(width, width), nn.Tanh())
    blocks = [block(width) for _ in range(layers)]
    model, batches = nn.Sequential(*blocks), [torch.randn(160, width) for _ in range(2)]
    loda = LoDA(model, target="*", rank=4, moment_dtype=moment_dtype, record_moments=record_moments)
    apart = [*model.parameters(), *batches]
    for _ in range(3):
        history = [past.total for past in loda.history.values()]
        with LiveBytes(history, apart) as live:
            loda.begin_task(batches)
            begun, live.peak = live.peak, live.now
            loda.end_task(batches)
    return [peak / (layers * width**2 * 8) for peak in (begun, live.peak)]


def test_the_memory_of_a_task_is_at_most_three_histories() -> None:
    begun, ended = peaks()
    assert 2 <= begun <= 2.7  # the history, and the sums of the new task
    assert 2 <= ended <= 2.7  # the same: no weight is saved
    single = peaks(moment_dtype="float32")
    assert single[0] < begun - 0.4
    assert single[1] < ended - 0.4
    assert peaks(record_moments=True)[1] > 4.5
    assert peaks(fused=True)[1] <= 3  # whatever the shape of the weights


@pytest.mark.parametrize("when", ["in a pass", "before a weight is written", "after one"])
def test_ctrl_c_at_the_end_leaves_a_model_that_is_merged_whole_or_not_at_all(when: str) -> None:
    loda, other = LoDA(vit(), SETTINGS), LoDA(vit(), SETTINGS)
    for one in (loda, other):
        cost(one, 0)
        one.begin_task(batches(1, one.model))
        for parameter in one.lora_parameters():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in loda.model.parameters()]
    with Interrupting(loda, when), pytest.raises(KeyboardInterrupt):
        loda.end_task(batches(1, loda.model))
    assert loda.is_open == (when == "in a pass")
    if loda.is_open:
        pairs = zip(loda.model.parameters(), before, strict=True)
        assert all(torch.equal(p, b) for p, b in pairs)
        loda.end_task(batches(1, loda.model))
    other.end_task(batches(1, other.model))
    assert loda.tasks == other.tasks == 2
    for states in ((loda.model, other.model), (loda, other)):
        mine, theirs = (one.state_dict() for one in states)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class Interrupting(TorchDispatchMode):
    """Raises KeyboardInterrupt once, beside a write to the weight of a layer or in a pass."""

    def __init__(self, loda: LoDA, when: str) -> None:
        super().__init__()
        layer = loda.layers["blocks.1.attn.qkv"]
        self.weight, self.when, self.done = layer.frozen.data_ptr(), when, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        writes = func is torch.ops.aten.copy_.default and args[0].data_ptr() == self.weight
        normalises = func is torch.ops.aten.native_layer_norm.default
        now = not self.done and (normalises if self.when == "in a pass" else writes)
        if now and self.when != "after one":
            self.done = True
            raise KeyboardInterrupt
        result = func(*args, **(kwargs or {}))
        if now:
            self.done = True
            raise KeyboardInterrupt
        return result
