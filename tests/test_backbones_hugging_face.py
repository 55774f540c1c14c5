"""Models with separate query, key and value layers: Hugging Face's ViTModel, and timm's."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import changed_json
from small_runs import tiny, tree
from torch import Tensor
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)
from transformers.utils import logging

from backends.torch import adapt, restore
from training import load
from training.backbones import BackboneConfig, build_backbone, check_features, check_fits
from training.cli import main
from training.run_dir import read_json
from training.train import train


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A random ViTModel of two small blocks, as ``save_pretrained`` writes it."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_the_feature_is_the_class_token_of_the_last_hidden_state(saved: Path) -> None:
    backbone = build_backbone(BackboneConfig(f"hf:{saved}"))
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = ViTModel.from_pretrained(saved).eval()(images).last_hidden_state[:, 0]
        torch.testing.assert_close(backbone.module.eval()(images), expected)
    assert (backbone.features, backbone.channels, backbone.image_size) == (16, 3, 16)
    assert not any("pooler" in name for name, _ in backbone.module.named_parameters())
    check_fits(backbone, images[0])
    again = build_backbone(BackboneConfig(f"hf:{saved}"))
    assert backbone.tensors_sha256 == again.tensors_sha256
    random = build_backbone(BackboneConfig(f"hf:{saved}", {"pretrained": False}))
    assert backbone.tensors_sha256 != random.tensors_sha256


def test_a_run_on_a_hugging_face_model_from_training_to_prediction(
    saved: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """LoDA on separate q, k and v layers: trained, merged, saved, loaded, evaluated again.

    Nothing says which layers: the target of timm's models means the same layers here.
    """
    root = tree(tmp_path_factory)
    experiment = tiny(root, tmp_path / "run")
    experiment.backbone = BackboneConfig(f"hf:{saved}")
    before = build_backbone(experiment.backbone).module.state_dict()
    run = train(experiment, quiet=True)
    classifier = load(run)
    after = classifier.model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{block}.attention.{part}_proj.weight" for block in (0, 1) for part in "qkv"
    }
    assert len(classifier.predict([root / "test" / "red" / "0.png"])[0]) == 1
    assert main(["eval", str(run)]) == 0
    recorded = read_json(run / "environment.json")["backbone"]
    assert recorded["timm_name"] == f"hf:{saved}"
    assert len(recorded["tensors_sha256"]) == 64
    summary = read_json(run / "summary.json")
    assert summary["readouts"]["nearest_mean"]["last"] > 1 / 6  # six classes


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("model_type", ["vit", "of_its_own"])
def test_code_beside_a_model_never_runs(
    saved: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, pretrained: bool
) -> None:
    ran = saved / "ran"
    for name, base in (("C", "ViTConfig as B"), ("M", "ViTModel as B")):
        code = f"open({str(ran)!r}, 'w')\nfrom transformers import {base}\nclass {name}(B): pass\n"
        (saved / f"own_{name}.py").write_text(code)
    auto_map = {"AutoConfig": "own_C.C", "AutoModel": "own_M.M"}
    changed_json(saved / "config.json", auto_map=auto_map, model_type=model_type)
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))  # to whatever the library asks
    with suppress(ValueError):
        build_backbone(BackboneConfig(f"hf:{saved}", {"pretrained": pretrained}))
    assert not ran.exists()


def test_separate_layers_of_timm_are_named_by_a_pattern_too() -> None:
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    name = "eva02_base_patch14_224"
    module = build_backbone(
        BackboneConfig(name, {"options": options, "pretrained": False})
    ).module.eval()
    images = torch.randn(2, 3, 16, 16)
    expected = module(images)
    layers = adapt(module, "*.attn.[qkv]_proj")
    assert sorted(name.rpartition(".")[2] for name in layers) == [
        *["k_proj"] * 2,
        *["q_proj"] * 2,
        *["v_proj"] * 2,
    ]
    for layer in layers.values():
        layer.add_branch("test", torch.ones(1, 16), up=torch.zeros(16, 1))
    assert torch.equal(module(images), expected)
    next(iter(layers.values())).drop_branch("test")
    next(iter(layers.values())).add_branch("test", torch.ones(1, 16), up=torch.ones(16, 1))
    assert not torch.equal(module(images), expected)
    restore(module, layers)
    assert torch.equal(module(images), expected)


def test_models_that_cannot_be_used_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match="hf:some/where"):
        build_backbone(BackboneConfig("hf:some/where"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        build_backbone(BackboneConfig(f"hf:{tmp_path / 'empty'}"))
    (saved / "model.safetensors").rename(saved / "moved")
    with pytest.raises(ConnectionError, match="weights"):
        build_backbone(BackboneConfig(f"hf:{saved}"))
    (saved / "moved").rename(saved / "model.safetensors")
    config = read_json(saved / "config.json")
    (saved / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"layers\.2\."):
        build_backbone(BackboneConfig(f"hf:{saved}"))
    text = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 9}
    (saved / "config.json").write_text(json.dumps({**text, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="bert"):
        build_backbone(BackboneConfig(f"hf:{saved}", {"pretrained": False}))
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"loda\[hf\]"):
        build_backbone(BackboneConfig(f"hf:{saved}"))


# Models of other kinds, by the pooling that they were trained with

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
}


def class_token(model: Any, images: Tensor) -> Tensor:
    tokens: Tensor = model(images).last_hidden_state
    return tokens[:, 0]


def own_pooling(model: Any, images: Tensor) -> Tensor:
    pooled: Tensor = model(images).pooler_output
    return pooled.flatten(1)


def mean_of_tokens(model: Any, images: Tensor) -> Tensor:
    tokens: Tensor = model(images).last_hidden_state
    return tokens.mean(dim=1)


def image_part(model: Any, images: Tensor) -> Tensor:
    pooled: Tensor = model.vision_model(images).pooler_output
    return pooled


def all_patches(model: Any, images: Tensor) -> Tensor:
    """The class token of a ViT-MAE that masks nothing and shuffles nothing."""
    model.config.mask_ratio = 0.0
    noise = torch.arange(4.0).expand(len(images), -1)
    tokens: Tensor = model.vit(images, noise=noise).last_hidden_state
    return tokens[:, 0]


MAE = ViTMAEConfig(
    **SIZES,
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=32,
)
OTHERS: list[tuple[Callable[[], PreTrainedModel], Any, int | None]] = [
    (lambda: DeiTModel(DeiTConfig(**SIZES)), class_token, 16),
    (lambda: ViTMSNModel(ViTMSNConfig(**SIZES)), class_token, 16),
    (lambda: Dinov2Model(Dinov2Config(**SIZES)), class_token, None),
    (lambda: BeitModel(BeitConfig(**SIZES, use_mean_pooling=True)), own_pooling, None),
    (lambda: BeitModel(BeitConfig(**SIZES, use_mean_pooling=False)), own_pooling, None),
    (lambda: IJepaModel(IJepaConfig(**SIZES)), mean_of_tokens, 16),
    (lambda: CLIPModel(CLIPConfig(vision_config=SIZES, text_config=TEXT)), image_part, 16),
    (lambda: SiglipModel(SiglipConfig(vision_config=SIZES, text_config=TEXT)), image_part, 16),
    (lambda: ViTMAEForPreTraining(MAE), all_patches, 16),
    (
        lambda: SwinModel(
            SwinConfig(
                image_size=32,
                patch_size=2,
                embed_dim=8,
                depths=[1, 1],
                num_heads=[1, 2],
                window_size=4,
            )
        ),
        own_pooling,
        None,
    ),
    (
        lambda: ConvNextModel(ConvNextConfig(hidden_sizes=[4, 4, 8, 16], depths=[1, 1, 1, 1])),
        own_pooling,
        None,
    ),
    (
        lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        own_pooling,
        None,
    ),
]


@pytest.mark.parametrize(("make", "pooled", "side"), OTHERS)
def test_a_model_is_pooled_as_it_was_trained_to(
    make: Callable[[], PreTrainedModel], pooled: Any, side: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "saved")
    backbone = build_backbone(BackboneConfig(f"hf:{tmp_path / 'saved'}"))
    images = torch.randn(2, 3, side or 32, side or 32)
    with torch.no_grad():
        expected = pooled(model, images)
        torch.testing.assert_close(backbone.module.eval()(images), expected)
    assert (backbone.features, backbone.channels) == (16, 3)
    assert backbone.image_size == side
    check_fits(backbone, images[0])
    check_features(backbone, images[0])


def test_vit_mae_gives_one_answer_and_says_what_is_left_out(tmp_path: Path) -> None:
    """A real ViT-MAE, with random weights: it masks three patches of four at random."""
    torch.manual_seed(0)
    model = ViTMAEForPreTraining(MAE).eval()
    model.config.mask_ratio = 0.75
    model.save_pretrained(tmp_path / "mae")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        first, second = (model.vit(images).last_hidden_state[:, 0] for _ in range(2))
        assert not torch.allclose(first, second, atol=1e-4)  # as transformers runs it
        backbone = build_backbone(BackboneConfig(f"hf:{tmp_path / 'mae'}"))
        first, second = (backbone.module.eval()(images) for _ in range(2))
    assert torch.equal(first, second)
    assert "decoder" in " ".join(backbone.notes)


def test_images_of_another_size_need_a_setting(saved: Path) -> None:
    image = torch.zeros(3, 24, 24)
    with pytest.raises(ValueError, match=r"backbone\.image_size"):
        check_fits(build_backbone(BackboneConfig(f"hf:{saved}")), image)
    backbone = build_backbone(BackboneConfig(f"hf:{saved}", {"image_size": 24}))
    check_fits(backbone, image)
    check_features(backbone, image)
    own = build_backbone(BackboneConfig(f"hf:{saved}"))
    assert backbone.tensors_sha256 == own.tensors_sha256
    with pytest.raises(ValueError, match="image_size"):
        BackboneConfig(f"hf:{saved}", {"image_size": 0})


def test_a_size_that_a_model_cannot_take_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="4 by 4"):  # smaller than a patch
        build_backbone(BackboneConfig(f"hf:{saved}", {"image_size": 4}))


def test_weights_in_half_precision_are_read_as_float32(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SIZES)).half().save_pretrained(tmp_path)
    config = BackboneConfig(f"hf:{tmp_path}")
    for initialise in (True, False):  # False as for a trained model, whose weights are loaded later
        backbone = build_backbone(config, initialise=initialise)
        assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}


def test_a_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    ViTForImageClassification(ViTConfig(**SIZES)).save_pretrained(tmp_path)
    assert "classifier" in " ".join(build_backbone(BackboneConfig(f"hf:{tmp_path}")).notes)
