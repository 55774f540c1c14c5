"""The pretrained network: what is built, and which images fit it."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_backbones import NAME, TINY, holds, saved, tiny, trained_weights

from backends.torch import adapt
from training.backbones import build_backbone, check_fits
from training.config import PACKAGED_WEIGHTS, BackboneConfig, DataConfig
from training.data import build_stream
from training.data import test_transform as evaluation_transform


def test_the_feature_is_the_class_token_after_the_last_norm(tmp_path: Path) -> None:
    trained = trained_weights()
    backbone = build_backbone(tiny(saved(tmp_path, trained)))
    images = torch.randn(2, 3, 8, 8)
    whole = timm.create_model(NAME, num_classes=3, **TINY)
    whole.load_state_dict(trained)
    features: Any = whole.eval().forward_features
    expected = features(images)[:, 0]
    torch.testing.assert_close(backbone.module.eval()(images), expected)
    assert (backbone.features, backbone.channels, backbone.image_size) == (16, 3, 8)
    assert (backbone.timm_name, backbone.timm_options) == (NAME, TINY)


def test_a_convolutional_network_works_too(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=5)
    path = saved(tmp_path, {k: v.clone() for k, v in model.state_dict().items()})  # has fc.*
    backbone = build_backbone(BackboneConfig("resnet18", weights=str(path)))
    assert holds(backbone, dict(model.state_dict()))
    assert (backbone.features, backbone.channels, backbone.image_size) == (512, 3, None)
    check_fits(backbone, torch.zeros(3, 50, 50))


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"no model 'vit_tiny_patch16_22'.*{NAME}"):
        build_backbone(BackboneConfig("vit_tiny_patch16_22"))
    with pytest.raises(ValueError, match=r"backbone\.options .*image_size"):
        build_backbone(tiny(image_size=8))


def test_no_weights_are_needed_before_a_saved_model_is_loaded(tmp_path: Path) -> None:
    backbone = build_backbone(tiny(tmp_path / "none.pth"), initialise=False)
    assert backbone.weights_sha256 is None
    options = {"img_size": 32}
    build_backbone(BackboneConfig(NAME, options=options), initialise=False)  # nor a download


def test_images_must_fit_the_backbone() -> None:
    backbone = build_backbone(tiny())
    check_fits(backbone, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"1 channels.*takes 3.*in_chans"):
        check_fits(backbone, torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"16 by 16 pixels.*takes 8 by 8.*data\.image_size"):
        check_fits(backbone, torch.zeros(3, 16, 16))
    check_fits(build_backbone(tiny(in_chans=1)), torch.zeros(1, 8, 8))
    check_fits(build_backbone(tiny(dynamic_img_size=True)), torch.zeros(3, 16, 16))


def test_the_recorded_backbone_loads(shared: Path) -> None:
    path = shared / "data" / "vit_cifar10.safetensors"
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    backbone = build_backbone(BackboneConfig(NAME, weights=str(path), options=options))
    assert holds(backbone, load_file(path))
    assert (backbone.features, backbone.channels, backbone.image_size) == (128, 3, 32)


def test_the_packaged_backbone_takes_the_digits() -> None:
    path = Path(str(files("training").joinpath("weights", PACKAGED_WEIGHTS["glyphs"])))
    backbone = build_backbone(BackboneConfig())
    assert holds(backbone, load_file(path))
    assert backbone.channels == 1
    size = backbone.image_size
    config = DataConfig() if size in (8, None) else DataConfig(image_size=size, resize=size)
    test = build_stream(config, 0).test.with_transform(evaluation_transform(config))
    check_fits(backbone, test[0][0])
    features = backbone.module.eval()(torch.stack([test[0][0], test[1][0]]))
    assert features.shape == (2, backbone.features)


def test_the_packaged_backbone_is_a_transformer_that_loda_adapts() -> None:
    backbone = build_backbone(BackboneConfig("cifar_vit"))
    assert (backbone.features, backbone.channels, backbone.image_size) == (192, 3, 32)
    assert sum(p.numel() for p in backbone.module.parameters()) <= 6_000_000
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}
    layers = adapt(backbone.module, "*.attn.qkv")
    assert list(layers) == [f"blocks.{i}.attn.qkv" for i in range(6)]
    assert all(isinstance(b.norm1, torch.nn.LayerNorm) for b in backbone.module.blocks)
    assert backbone.module(torch.zeros(2, 3, 32, 32)).shape == (2, 192)


def test_the_packaged_backbone_takes_no_other_weights() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name cifar_vit comes with its own weights"):
        BackboneConfig("cifar_vit", weights="a.pth")
