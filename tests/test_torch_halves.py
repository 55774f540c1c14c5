"""Second moments of two halves of a task's images, against halves taken by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny_models import batches, inputs, mlp, vit
from torch import Tensor, nn

from backends.torch import collect_moments
from backends.torch.moments import HalvingCollector, collect_halves


def seen(model: nn.Module, name: str, images: Tensor) -> Tensor:
    """Inputs of a layer for each image."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0]))
    with torch.no_grad():
        model.eval()(images)
    handle.remove()
    return found[0]


@pytest.mark.parametrize(
    ("build", "target"), [(vit, "blocks.1.attn.qkv"), (mlp, "2")], ids=["vit", "mlp"]
)
@pytest.mark.parametrize("size", [24, 7, 1])
def test_halves_are_every_other_image_over_all_batches(
    build: Callable[[], nn.Module], target: str, size: int
) -> None:
    model = build().double()
    images = inputs(0, model)[0]
    found, halves = collect_halves(model, images.split(size), target)
    plain = collect_moments(model, images.split(size), target)
    # The moment over all images is the one that decides: it must not change.
    assert torch.equal(found[target].total, plain[target].total)
    assert found[target].count == plain[target].count
    for half, start in zip(halves[target], (0, 1), strict=True):
        tokens = seen(model, target, images[start::2]).reshape(-1, half.shape[-1])
        torch.testing.assert_close(half, tokens.mT @ tokens / len(tokens))


def test_halves_in_single_precision_are_as_exact_as_its_gram_matrices() -> None:
    model, target = vit(), "blocks.0.attn.qkv"
    images = inputs(0, model)[0]
    halves = collect_halves(model, [images], target)[1][target]
    for half, start in zip(halves, (0, 1), strict=True):
        tokens = seen(model, target, images[start::2]).reshape(-1, half.shape[-1]).double()
        truth = tokens.mT @ tokens / len(tokens)
        assert float((half - truth).norm() / truth.norm()) < 1e-6
        assert torch.equal(half, half.mT)


class Windows(nn.Module):
    """Cuts each image into four rows, each of which goes through the layer as if by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(-1, 5, 3))
        return out.reshape(len(x), -1)


def test_windows_of_an_image_stay_together() -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 4, 5, 3, dtype=torch.float64)
    halves = collect_halves(Windows().double(), [images[:3], images[3:]], "layer")[1]["layer"]
    for half, start in zip(halves, (0, 1), strict=True):
        tokens = images[start::2].reshape(-1, 3)
        torch.testing.assert_close(half, tokens.mT @ tokens / len(tokens))


def test_a_part_of_the_model_counts_images_by_its_own_input() -> None:
    model = mlp()
    images = inputs(0, model)[0]
    forward: Any = lambda model, batch: model[:3](batch)  # noqa: E731
    _, halves = collect_halves(model, images.split(6), "0", forward=forward)
    for half, start in zip(halves["0"], (0, 1), strict=True):
        torch.testing.assert_close(half, images[start::2].mT @ images[start::2] / 12)


class Transposed(nn.Module):
    """Puts tokens first and images second."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.transpose(0, 1))
        return out


def test_what_cannot_be_halved_is_left_out() -> None:
    model = vit()
    images = inputs(0, model)[0]
    moments, halves = collect_halves(model, [images[:1]], "*.attn.qkv")
    assert moments
    assert not halves
    moments, halves = collect_halves(Transposed(), [torch.randn(4, 5, 3)], "layer")
    assert moments["layer"].count == 20
    assert not halves
    with pytest.raises(ValueError, match="no tokens went through"):
        collect_halves(model, [], "*.attn.qkv")
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_used_twice_sees_the_same_images_in_the_same_half() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(2 * x) + self.layer(x)
            return out

    torch.manual_seed(0)
    images = torch.randn(9, 3, dtype=torch.float64)
    halves = collect_halves(Twice().double(), [images[:3], images[3:]], "layer")[1]["layer"]
    for half, start in zip(halves, (0, 1), strict=True):
        part = images[start::2]
        torch.testing.assert_close(half, 2.5 * part.mT @ part / len(part))


def test_the_collector_needs_no_loop_of_ours() -> None:
    model: VisionTransformer = vit().eval()
    with torch.no_grad(), HalvingCollector(model, "*.qkv") as collector:
        for batch in batches(0, model):
            model(batch)
    expected = collect_halves(model, batches(0, model), "*.qkv")[1]
    found = collector.halves()
    assert list(found) == list(expected)
    assert all(torch.equal(a, b) for n in found for a, b in zip(found[n], expected[n], strict=True))
