"""What is found wrong with a backbone before training, and that good ones pass."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from small_runs import tiny as small_run
from small_runs import tree
from tiny_backbones import tiny
from torch import Tensor, nn

from training.backbones import (
    Backbone,
    BackboneConfig,
    build_backbone,
    check_features,
    check_fits,
    check_target,
)
from training.backbones.build import described
from training.methods.base import MethodConfig
from training.train import train

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depth": 2, "num_heads": 2}
STAGES: dict[str, Any] = {"img_size": 32, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
# One of every kind of pooling, normalisation and position embedding, with the side that it takes.
MODELS = [
    ("vit_tiny_patch16_224", SMALL, 32),
    ("vit_small_patch14_dinov2", {**SMALL, "img_size": 28}, 28),
    ("vit_small_patch14_reg4_dinov2", {**SMALL, "img_size": 28}, 28),
    ("vit_small_patch16_dinov3", SMALL, None),
    ("vit_base_patch16_siglip_224", SMALL, 32),
    ("vit_base_patch16_clip_224", SMALL, 32),
    ("beit_base_patch16_224", SMALL, 32),
    ("eva02_tiny_patch14_224", {**SMALL, "img_size": 28}, 28),
    ("swin_tiny_patch4_window7_224", {**STAGES, "window_size": 2}, 32),
    ("swinv2_tiny_window8_256", {**STAGES, "window_size": 4}, 32),
    ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 16]}, None),
    ("mobilenetv3_small_050", {}, None),
    ("resnet18", {}, None),
]


class Noisy(nn.Module):
    """Masks a random half of its inputs, also in evaluation mode."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        masked = images * (torch.rand(images.shape) > 0.5)
        features: Tensor = self.layer(masked).mean(dim=(2, 3))
        return features


class Reads(nn.Module):
    """Multiplies by weights of its layers in three ways, and never uses the last layer."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.in_chans = 3
        self.called, self.read, self.matmul, self.unused = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.called(images.mean(dim=(2, 3)))
        return F.linear(x, self.read.weight) @ self.matmul.weight.T


def of(module: nn.Module) -> Backbone:
    return described(module, "mine", {})._replace(name="mine")


@pytest.mark.parametrize(("name", "options", "side"), MODELS, ids=[name for name, *_ in MODELS])
def test_a_model_of_timm_pools_as_it_was_trained_to(
    name: str, options: dict[str, Any], side: int | None
) -> None:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name, {"options": options, "pretrained": False}))
    assert backbone.image_size == side
    image = torch.randn(3, side or 64, side or 64)
    check_fits(backbone, image)
    check_features(backbone, image)
    model: Any = backbone.module.eval()
    with torch.no_grad():
        pooled = model.forward_head(model.forward_features(image[None]), pre_logits=True)
        assert torch.equal(model(image[None]), pooled)
    # The same weights in timm's whole model: the features are what its classifier gets.
    whole = timm.create_model(name, num_classes=5, **options).eval()
    whole.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(whole(image[None]), whole.get_classifier()(pooled))


def test_a_model_with_two_answers_to_one_image_is_refused() -> None:
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="two"):
        check_features(of(Noisy()), torch.rand(3, 8, 8))
    layer = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5))
    layer.num_features, layer.in_chans = 4, 3  # type: ignore[assignment]
    torch.set_rng_state(state)
    check_features(of(layer.train()), torch.rand(3, 2, 2))  # dropout is off in evaluation
    assert layer.training
    assert layer[2].training


def test_checking_a_backbone_draws_no_random_numbers() -> None:
    backbone = build_backbone(tiny(drop_rate=0.5))
    state = torch.get_rng_state()
    check_features(backbone, torch.zeros(3, 8, 8))
    check_target(backbone, torch.zeros(3, 8, 8), MethodConfig("loda", {"rank": 2}))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda x: x.mean(dim=1), "shape"),
        (lambda x: (x.flatten(1)[:, :4], None), "tuple"),
        (lambda x: x.flatten(1)[:, :4] * torch.nan, "finite"),
        (lambda x: x.reshape(7, 7), "image_size"),
    ],
)
def test_what_is_no_feature_vector_is_refused(output: Any, said: str) -> None:
    class Odd(nn.Module):
        num_features, in_chans = 4, 3

        def forward(self, images: Tensor) -> Any:
            return output(images)

    with pytest.raises(ValueError, match=said):
        check_features(of(Odd()), torch.rand(3, 8, 8))


def test_a_layer_that_is_never_called_is_refused_with_layers_that_are() -> None:
    backbone, image = of(Reads()), torch.rand(3, 8, 8)
    check_target(backbone, image, MethodConfig("loda", {"target": ["called", "read"], "rank": 1}))
    for layer in ("matmul", "unused"):
        method = MethodConfig("seq_lora", {"target": ["called", layer], "rank": 1})
        with pytest.raises(ValueError, match=f"got {layer}.*layers that do: called, read"):
            check_target(backbone, image, method)
    check_target(backbone, image, MethodConfig("frozen"))


def test_a_pattern_for_another_library_is_answered_with_the_one_that_fits() -> None:
    backbone, image = build_backbone(tiny()), torch.zeros(3, 8, 8)
    method = MethodConfig("loda", {"target": "transformers-vit", "rank": 1})
    with pytest.raises(ValueError, match="timm"):
        check_target(backbone, image, method)


def test_a_refused_target_leaves_no_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tree(tmp_path_factory)
    experiment = small_run(root, tmp_path / "run", method={"target": "*.attn.q"})
    with pytest.raises(ValueError, match="target"):
        train(experiment, quiet=True)
    assert not (tmp_path / "run").exists()
