"""The pretrained network: what is built, which weights fit, and what a misfit says."""

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from training.backbone import Backbone, build_backbone, check_fits
from training.config import PACKAGED_WEIGHTS, BackboneConfig, DataConfig
from training.data import build_stream
from training.data import test_transform as evaluation_transform

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(weights: Path | None = None, **options: object) -> BackboneConfig:
    source = None if weights is None else str(weights)
    settings = {**TINY, **options}
    return BackboneConfig(NAME, weights=source, options=settings, pretrained=source is not None)


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    """Weights of a tiny model with a classifier, as its training would save them."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, **TINY)
    return {key: value.clone() for key, value in model.state_dict().items()}


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(weights, path)
    return path


def holds(backbone: Backbone, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, weights[k]) for k, v in backbone.module.state_dict().items())


def test_the_feature_is_the_class_token_after_the_last_norm(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    backbone = build_backbone(tiny(saved(tmp_path, trained)))
    images = torch.randn(2, 3, 8, 8)
    whole = timm.create_model(NAME, num_classes=3, **TINY)
    whole.load_state_dict(trained)
    features: Any = whole.eval().forward_features
    expected = features(images)[:, 0]
    torch.testing.assert_close(backbone.module.eval()(images), expected)
    assert (backbone.features, backbone.channels, backbone.image_size) == (16, 3, 8)
    assert (backbone.timm_name, backbone.timm_options) == (NAME, TINY)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "model", "parallel"])
def test_pth_files_are_unwrapped_and_their_classifier_is_dropped(
    tmp_path: Path, trained: dict[str, torch.Tensor], wrap: str
) -> None:
    content: dict[str, Any] = dict(trained)
    if wrap == "parallel":
        content = {"state_dict": {f"module.{key}": value for key, value in trained.items()}}
    elif wrap != "plain":
        content = {wrap: content, "epoch": 3}
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    backbone = build_backbone(tiny(path))
    assert holds(backbone, trained)
    assert backbone.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_convolutional_network_works_too(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=5)
    path = saved(tmp_path, {k: v.clone() for k, v in model.state_dict().items()})  # has fc.*
    backbone = build_backbone(BackboneConfig("resnet18", weights=str(path)))
    assert holds(backbone, dict(model.state_dict()))
    assert (backbone.features, backbone.channels, backbone.image_size) == (512, 3, None)
    check_fits(backbone, torch.zeros(3, 50, 50))


def test_misfits_are_listed_together(tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    del trained["norm.bias"]
    trained["extra.weight"] = torch.zeros(1)
    trained["cls_token"] = torch.zeros(1, 1, 12)
    with pytest.raises(ValueError, match="do not fit") as caught:
        build_backbone(tiny(saved(tmp_path, trained)))
    said = str(caught.value)
    assert "missing: norm.bias." in said
    assert "unexpected: extra.weight." in said
    assert "cls_token is 1x1x12, the model has 1x1x16" in said
    assert "backbone.options" in said


def test_a_head_that_the_model_keeps_is_not_dropped(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    # "head" is the classifier, "header" would be a layer: only whole names are left out.
    trained["header.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"unexpected: header\.weight"):
        build_backbone(tiny(saved(tmp_path, trained)))


def test_weights_that_are_not_finite_are_refused(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    trained["norm.bias"][3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values: norm\.bias"):
        build_backbone(tiny(saved(tmp_path, trained)))


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("no tensors at all")


def a_list(path: Path) -> None:
    torch.save([1, 2], path)


def a_number(path: Path) -> None:
    torch.save({"model": {"a": 3}}, path)


def an_object(path: Path) -> None:
    torch.save({"model": torch.nn.Linear(2, 2)}, path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("make", [nothing, text, a_list, a_number, an_object])
def test_files_without_weights_are_refused(tmp_path: Path, make: Any, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    make(path)
    with pytest.raises(ValueError, match=rf"cannot read .*w\{suffix}") as caught:
        build_backbone(tiny(path))
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("make", [nothing, text, an_object])
def test_a_pth_file_that_torch_will_not_read_is_not_to_be_trusted(
    tmp_path: Path, make: Any
) -> None:
    make(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w\.pth .*more than tensors, or is damaged") as caught:
        build_backbone(tiny(tmp_path / "w.pth"))
    assert "torch.load" not in str(caught.value)


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"backbone\.weights: no file .*none\.pth"):
        build_backbone(tiny(tmp_path / "none.pth"))


def test_unknown_models_and_options_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"no model 'vit_tiny_patch16_22'.*{NAME}"):
        build_backbone(BackboneConfig("vit_tiny_patch16_22"))
    with pytest.raises(ValueError, match=r"backbone\.options .*image_size"):
        build_backbone(tiny(image_size=8))


class ForeignError(Exception):
    """As httpx has them: neither an OSError nor a ValueError."""

    __module__ = "httpx"


def fail_to_download(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    create = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        if pretrained:
            raise error
        model: torch.nn.Module = create(name, pretrained=False, **options)
        return model

    monkeypatch.setattr(timm, "create_model", offline)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no route"),
        TimeoutError("no route"),
        LocalEntryNotFoundError("no route"),
        HFValidationError("no route"),
        ForeignError("no route"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_weights_that_cannot_be_downloaded_say_how_to_give_them(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_to_download(monkeypatch, error)
    with pytest.raises(ConnectionError, match=r"fetched \(no route.*backbone\.weights"):
        build_backbone(BackboneConfig(NAME))


@pytest.mark.parametrize(
    "error", [RuntimeError("size\n\tmismatch"), ValueError("size mismatch"), KeyError("size")]
)
def test_downloaded_weights_that_do_not_fit_are_no_matter_of_the_network(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fail_to_download(monkeypatch, error)
    with pytest.raises(ValueError, match=r"do not fit.*\{'img_size': 32\}.*size") as caught:
        build_backbone(BackboneConfig(NAME, options={"img_size": 32}))
    assert "\n" not in str(caught.value)


def test_pretrained_weights_that_timm_reads_but_cannot_use_do_not_fit(tmp_path: Path) -> None:
    path = saved(tmp_path, {"cls_token": torch.zeros(1, 1, 12)})
    config = BackboneConfig(NAME)
    # Refused in a configuration: stands in for the file that timm would download.
    config.options["pretrained_cfg_overlay"] = {"file": str(path)}
    with pytest.raises(ValueError, match=r"do not fit.*size mismatch for cls_token"):
        build_backbone(config)


def test_a_model_without_pretrained_weights_says_so() -> None:
    with pytest.raises(ValueError, match=r"no pretrained weights for resnetblur18: give a file"):
        build_backbone(BackboneConfig("resnetblur18"))


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


# --- published files: the original ViT's arrays, wrapped checkpoints, hashes


def as_arrays(weights: dict[str, torch.Tensor], heads: int) -> dict[str, Any]:
    """A ViT's weights under the names and in the layout of the original (augreg) .npz files."""
    w = {key: value.numpy() for key, value in weights.items()}
    width = w["cls_token"].shape[-1]
    arrays = {
        "cls": w["cls_token"],
        "embedding/kernel": w["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": w["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": w["pos_embed"],
        "Transformer/encoder_norm/scale": w["norm.weight"],
        "Transformer/encoder_norm/bias": w["norm.bias"],
    }
    for index in range(TINY["depth"]):
        own, theirs = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        for number, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}/LayerNorm_{number}/scale"] = w[f"{own}.{norm}.weight"]
            arrays[f"{theirs}/LayerNorm_{number}/bias"] = w[f"{own}.{norm}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            kernel = w[f"{own}.attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/kernel"] = kernel
            arrays[f"{attention}/{name}/bias"] = w[f"{own}.attn.qkv.bias"][rows].reshape(heads, -1)
        out = w[f"{own}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/kernel"] = out
        arrays[f"{attention}/out/bias"] = w[f"{own}.attn.proj.bias"]
        for number, layer in enumerate(("fc1", "fc2")):
            dense = f"{theirs}/MlpBlock_3/Dense_{number}"
            arrays[f"{dense}/kernel"] = w[f"{own}.mlp.{layer}.weight"].T
            arrays[f"{dense}/bias"] = w[f"{own}.mlp.{layer}.bias"]
    return arrays


def test_the_original_arrays_of_a_vit_are_read(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "augreg.npz"
    np.savez(path, **as_arrays(trained, TINY["num_heads"]))
    backbone = build_backbone(tiny(path))
    assert holds(backbone, trained)
    assert backbone.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda a: a.pop("cls"), "cls"),
        (lambda a: a.update({"Transformer/encoderblock_2/x": a["cls"]}), "3 blocks, the model 2"),
        (lambda a: a.update(cls=a["cls"][..., :9]), "size of tensor|shape"),
        (lambda a: a["cls"].fill(np.nan), "NaN or infinite values: cls_token"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path, trained: dict[str, torch.Tensor], spoil: Any, said: str
) -> None:
    arrays = as_arrays(trained, TINY["num_heads"])
    spoil(arrays)
    np.savez(tmp_path / "augreg.npz", **arrays)
    with pytest.raises(ValueError, match=rf"augreg\.npz .*({said})") as caught:
        build_backbone(tiny(tmp_path / "augreg.npz"))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.npz"):
        build_backbone(tiny(tmp_path / "none.npz"))
    (tmp_path / "w.npz").write_text("text")
    with pytest.raises(ValueError, match=r"w\.npz are not those of the original ViT"):
        build_backbone(tiny(tmp_path / "w.npz"))
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"timm reads no .npz file for this model"):
        build_backbone(BackboneConfig("resnet18", weights=str(tmp_path / "w.npz")))


def test_the_teacher_of_a_self_supervised_training_is_read(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    teacher = {f"module.backbone.{key}": value for key, value in trained.items()}
    student = {key: value + 1 for key, value in teacher.items()}
    path = tmp_path / "checkpoint.pth"
    torch.save({"student": student, "teacher": teacher, "epoch": 3}, path)
    assert holds(build_backbone(tiny(path)), trained)


def test_the_hash_of_the_weights_does_not_depend_on_their_file(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    np.savez(tmp_path / "a.npz", **as_arrays(trained, TINY["num_heads"]))
    torch.save({"model": trained}, tmp_path / "a.pth")
    paths = [saved(tmp_path, trained), tmp_path / "a.npz", tmp_path / "a.pth"]
    backbones = [build_backbone(tiny(path)) for path in paths]
    assert len({backbone.weights_sha256 for backbone in backbones}) == 3
    assert len({backbone.tensors_sha256 for backbone in backbones}) == 1
    trained["norm.bias"][3] += 1e-6
    assert build_backbone(tiny(saved(tmp_path, trained))).tensors_sha256 not in {
        backbones[0].tensors_sha256,
        None,
    }


def test_the_exact_tag_of_downloaded_weights_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = timm.create_model

    def downloaded(name: str, *, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        model: torch.nn.Module = create(name, pretrained=False, **options)
        return model

    monkeypatch.setattr(timm, "create_model", downloaded)
    backbone = build_backbone(BackboneConfig(NAME, options={"img_size": 16}))
    tag = "augreg_in21k_ft_in1k"
    assert backbone.tag == f"{NAME}.{tag} from timm/{NAME}.{tag}"
    assert backbone.weights_sha256 is None
    assert len(backbone.tensors_sha256 or "") == 64
    assert build_backbone(tiny()).tag is None
