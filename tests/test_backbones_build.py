"""The pretrained network: what is built, what timm fetches, and which images fit it."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from tiny_backbones import NAME, TINY, holds, saved, tiny, trained_weights

from backends.torch import adapt
from training.backbones import BackboneConfig, build_backbone, check_fits, preprocessing_of
from training.backbones.build import build_timm
from training.backbones.config import PACKAGED_WEIGHTS
from training.config import DataConfig
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
    backbone = build_backbone(BackboneConfig("resnet18", {"weights": str(path)}))
    assert holds(backbone, dict(model.state_dict()))
    assert (backbone.features, backbone.channels, backbone.image_size) == (512, 3, None)
    check_fits(backbone, torch.zeros(3, 50, 50))


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=f"{NAME}"):  # a near miss names what was meant
        build_backbone(BackboneConfig("vit_tiny_patch16_22"))
    with pytest.raises(ValueError, match=f"{NAME}"):  # before anything needs its image size
        preprocessing_of(BackboneConfig("vit_tiny_patch16_22"))
    with pytest.raises(ValueError, match="image_size"):
        build_backbone(tiny(image_size=8))


def test_no_weights_are_needed_before_a_saved_model_is_loaded(tmp_path: Path) -> None:
    backbone = build_backbone(tiny(tmp_path / "none.pth"), initialise=False)
    assert backbone.weights_sha256 is None
    config = BackboneConfig(NAME, {"options": {"img_size": 32}})
    build_backbone(config, initialise=False)  # nor a download


def test_images_must_fit_the_backbone() -> None:
    backbone = build_backbone(tiny())
    check_fits(backbone, torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="in_chans"):
        check_fits(backbone, torch.zeros(1, 8, 8))
    with pytest.raises(ValueError, match=r"data\.image_size"):
        check_fits(backbone, torch.zeros(3, 16, 16))
    check_fits(build_backbone(tiny(in_chans=1)), torch.zeros(1, 8, 8))
    check_fits(build_backbone(tiny(dynamic_img_size=True)), torch.zeros(3, 16, 16))


@pytest.mark.parametrize(("name", "shape"), [("glyphs", (3, 8, 8)), ("cifar_vit", (3, 8, 8))])
def test_images_that_do_not_fit_get_no_cure_that_the_backbone_lacks(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        check_fits(build_backbone(BackboneConfig(name)), torch.zeros(shape))
    assert "backbone.options" not in str(caught.value)


def test_the_recorded_backbone_loads(shared: Path) -> None:
    path = shared / "data" / "vit_cifar10.safetensors"
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
    config = BackboneConfig(NAME, {"weights": str(path), "options": options})
    backbone = build_backbone(config)
    assert holds(backbone, load_file(path))
    assert (backbone.features, backbone.channels, backbone.image_size) == (128, 3, 32)


def test_the_packaged_backbone_takes_the_digits() -> None:
    path = Path(str(files("training").joinpath("weights", PACKAGED_WEIGHTS["glyphs"])))
    backbone = build_backbone(BackboneConfig())
    assert holds(backbone, load_file(path))
    assert backbone.channels == 1
    config = DataConfig()
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


# Pretrained weights that timm fetches


class ForeignError(Exception):
    """As httpx has them: neither an OSError nor a ValueError."""

    __module__ = "httpx"


def download(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> None:
    """Stand in for a download: random weights, or the error that it ends with."""
    create = timm.create_model

    def downloaded(name: str, *, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained and error is not None:
            raise error
        model: torch.nn.Module = create(name, pretrained=False, **options)
        return model

    monkeypatch.setattr(timm, "create_model", downloaded)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError("no route"), ConnectionError, r"no route.*backbone\.weights"),
        (TimeoutError("no route"), ConnectionError, r"no route.*backbone\.weights"),
        (LocalEntryNotFoundError("no route"), ConnectionError, r"no route.*backbone\.weights"),
        (HFValidationError("no route"), ConnectionError, r"no route.*backbone\.weights"),
        (ForeignError("no route"), ConnectionError, r"no route.*backbone\.weights"),
        # Weights that do not fit are no matter of the network.
        (RuntimeError("size\n\tmismatch"), ValueError, "'img_size': 32.*size"),
        (ValueError("size mismatch"), ValueError, "'img_size': 32.*size"),
        (KeyError("size"), ValueError, "'img_size': 32.*size"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_download_that_fails_says_why_and_how_to_give_weights(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], said: str
) -> None:
    download(monkeypatch, error)
    with pytest.raises(kind, match=said) as caught:
        build_backbone(BackboneConfig(NAME, {"options": {"img_size": 32}}))
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_timm_reads_but_cannot_use_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, {"cls_token": torch.zeros(1, 1, 12)})
    # Refused in a configuration: stands in for the file that timm would download.
    options = {"pretrained_cfg_overlay": {"file": str(path)}}
    with pytest.raises(ValueError, match="cls_token"):
        build_timm(NAME, options, pretrained=True)


def test_a_model_without_pretrained_weights_says_so() -> None:
    with pytest.raises(ValueError, match=r"backbone\.weights"):
        build_backbone(BackboneConfig("resnetblur18"))


def test_the_exact_tag_of_downloaded_weights_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    download(monkeypatch)
    backbone = build_backbone(BackboneConfig(NAME, {"options": {"img_size": 16}}))
    tag = "augreg_in21k_ft_in1k"
    assert backbone.tag == f"{NAME}.{tag} from timm/{NAME}.{tag}"
    assert backbone.weights_sha256 is None
    assert len(backbone.tensors_sha256 or "") == 64
    assert build_backbone(tiny()).tag is None


# What a configuration may say


# Of a classifier, or of files and addresses to read weights from.
RESERVED = (
    "cache_dir",
    "checkpoint_path",
    "num_classes",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        *((NAME, {"options": {key: "x"}}, f"'{key}'") for key in RESERVED),
        (NAME, {"weights": "w.pth", "pretrained": False}, "pretrained"),
        (NAME, {"options": {"depth": 3}}, "depth"),
        ("glyphs", {"weights": "w.pth"}, "weights"),
        ("cifar_vit", {"options": {}}, "options"),
        ("hf:some/model", {"weights": "w.pth"}, "weights"),
        ("hf:some/model", {"options": {"img_size": 8}, "pretrained": False}, "options"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    name: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        BackboneConfig(name, options)


def test_options_that_change_the_architecture_need_weights_or_none() -> None:
    deeper = {"options": {"depth": 3, "drop_path_rate": 0.1, "img_size": 32}}
    for more in ({"weights": "w.pth"}, {"pretrained": False}):
        assert BackboneConfig(NAME, {**deeper, **more}).options["options"] == deeper["options"]
    BackboneConfig(NAME, {"options": {"img_size": 32, "drop_rate": 0.1}})


def test_a_configuration_is_recorded_with_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit").mkdir()
    for name, options, recorded in [
        (NAME, {"weights": "w.pth"}, (NAME, str(tmp_path / "w.pth"))),
        (NAME, {}, (NAME, None)),
        ("hf:vit", {}, (f"hf:{tmp_path / 'vit'}", None)),
        ("hf:some/model", {}, ("hf:some/model", None)),
    ]:
        config = BackboneConfig(name, options).recorded()
        assert (config.name, config.options.get("weights")) == recorded


# A network of one's own


def test_a_class_of_ones_own_is_chosen_by_its_path() -> None:
    backbone = build_backbone(BackboneConfig("own_components.Net", {"width": 5}))
    assert backbone.module(torch.zeros(3, 2, 9, 9)).shape == (3, 5)
    assert (backbone.features, backbone.channels, backbone.image_size) == (5, 2, None)
    assert (backbone.timm_name, backbone.timm_options) == ("own_components.Net", {"width": 5})
    assert len(backbone.tensors_sha256 or "") == 64
    with pytest.raises(ValueError, match="depth"):
        BackboneConfig("own_components.Net", {"depth": 5})
    with pytest.raises(ValueError, match="num_features"):
        build_backbone(BackboneConfig("own_components.Nameless"))
    with pytest.raises(ValueError, match="NoNet"):
        build_backbone(BackboneConfig("own_components.NoNet"))
    with pytest.raises(ValueError, match="no module nothere"):
        build_backbone(BackboneConfig("nothere.Net"))
