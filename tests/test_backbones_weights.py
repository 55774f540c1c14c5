"""Files of weights: what is read from each kind, and what a misfit says."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_backbones import TINY, holds, saved, tiny, trained_weights
from torch import nn

from training.backbones import BackboneConfig, build_backbone, preprocessing_of
from training.backbones.weights import load_weights
from training.run_dir import file_sha256


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    return trained_weights()


def under(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in weights.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: w,
        lambda w: {"state_dict": w, "epoch": 3},
        lambda w: {"model": w, "epoch": 3},
        lambda w: {"state_dict": under("module", w)},
        lambda w: {  # of a self-supervised training
            "student": under("module.backbone", {key: value + 1 for key, value in w.items()}),
            "teacher": under("module.backbone", w),
        },
        # Settings beside the weights are read without running code.
        lambda w: {"teacher": w, "args": argparse.Namespace(arch="vit_base", lr=0.1), "epoch": 3},
    ],
    ids=["plain", "state_dict", "model", "parallel", "teacher", "settings"],
)
def test_pth_files_are_unwrapped_and_their_classifier_is_dropped(
    tmp_path: Path, trained: dict[str, torch.Tensor], wrap: Any
) -> None:
    path = tmp_path / "weights.pth"
    torch.save(wrap(trained), path)
    backbone = build_backbone(tiny(path))
    assert holds(backbone, trained)
    assert backbone.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"norm.bias": None, "extra.weight": torch.zeros(1), "cls_token": torch.zeros(1, 1, 12)},
            r"do not fit.* missing: norm\.bias\. unexpected: extra\.weight\. "
            "of another shape: cls_token is 1x1x12, the model has 1x1x16.*backbone.options",
        ),
        # "head" is the classifier, "header" would be a layer: only whole names are left out.
        ({"header.weight": torch.zeros(1)}, r"unexpected: header\.weight"),
        ({"norm.bias": torch.full((16,), torch.nan)}, r"NaN.*norm\.bias"),
    ],
)
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(
    tmp_path: Path, trained: dict[str, torch.Tensor], changes: dict[str, Any], said: str
) -> None:
    weights = {key: value for key, value in {**trained, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=said):
        build_backbone(tiny(saved(tmp_path, weights)))


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no tensors at all"),
    "an object": lambda path: torch.save({"model": nn.Linear(2, 2)}, path),
}
WITHOUT_WEIGHTS: dict[str, Callable[[Path], object]] = {
    **UNREADABLE,
    "a list": lambda path: torch.save([1, 2], path),
    "a number": lambda path: torch.save({"model": {"a": 3}}, path),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", WITHOUT_WEIGHTS)
def test_files_without_weights_are_refused(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    WITHOUT_WEIGHTS[kind](path)
    with pytest.raises(ValueError, match=rf"cannot read .*w\{suffix}") as caught:
        build_backbone(tiny(path))
    said = str(caught.value)
    assert "weights_only" not in said
    assert "torch.load" not in said  # such a file is not to be trusted
    if suffix == ".pth" and kind in UNREADABLE:
        assert "state_dict" in said


@pytest.mark.parametrize("name", ["none.pth", "none.npz"])
def test_a_missing_weights_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=name):
        build_backbone(tiny(tmp_path / name))


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
    (tmp_path / "w.npz").write_text("text")
    with pytest.raises(ValueError, match=r"w\.npz"):
        build_backbone(tiny(tmp_path / "w.npz"))
    np.savez(tmp_path / "w.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match=r"\.npz"):
        build_backbone(BackboneConfig("resnet18", {"weights": str(tmp_path / "w.npz")}))


@pytest.mark.filterwarnings(
    "ignore:.*(Sparse|sparse|TypedStorage|quantize)"
)  # torch's, of such tensors
@pytest.mark.parametrize("kind", ["quantized", "sparse", "compressed"])
def test_tensors_that_are_no_plain_arrays_are_refused(
    tmp_path: Path, trained: dict[str, torch.Tensor], kind: str
) -> None:
    weight = trained["blocks.0.attn.qkv.weight"]
    odd = {
        "quantized": lambda: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
        "sparse": weight.to_sparse,
        "compressed": weight.to_sparse_csr,
    }
    torch.save({**trained, "blocks.0.attn.qkv.weight": odd[kind]()}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight"):
        build_backbone(tiny(tmp_path / "odd.pth"))


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


def test_files_that_pretend_to_be_larger_than_they_are_are_refused(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "w.pth"
    torch.save({**trained, "norm.bias": torch.zeros(1).expand(1 << 40)}, path)
    with pytest.raises(ValueError, match=r"norm\.bias"):
        build_backbone(tiny(path))
    endless: dict[str, Any] = dict(trained)
    endless["model"] = endless
    torch.save(endless, path)
    with pytest.raises(ValueError, match="model"):
        build_backbone(tiny(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_layers_with_the_name_of_a_wrapper_keep_it(tmp_path: Path, suffix: str) -> None:
    layers, other = (nn.ModuleDict({"backbone": nn.Linear(2, 2)}) for _ in range(2))
    path = tmp_path / f"w{suffix}"
    (torch.save if suffix == ".pth" else save_file)(layers.state_dict(), path)
    load_weights(other, path)
    assert torch.equal(other["backbone"].weight, layers["backbone"].weight)


# Files of other trainings


@pytest.mark.parametrize(
    "wrap",
    [
        lambda w: under("encoder", w),
        lambda w: under("module.encoder", w) | {"module.queue": torch.zeros(3)},
        lambda w: under("visual.trunk", w) | under("text.blocks.0", {"x": torch.zeros(2)}),
        lambda w: under("model.backbone", w) | {"model.head.weight": torch.zeros(7, 16)},
        lambda w: under("student", {k: v + 1 for k, v in w.items()}) | under("teacher", w),
        lambda w: {"model": {"state_dict": under("_orig_mod", w)}, "state_dict_ema": {}},
        lambda w: {"model": {k: v + 1 for k, v in w.items()}, "model_ema": w},
    ],
    ids=["encoder", "queue", "clip", "head", "copies", "nested", "average"],
)
def test_the_network_is_recognised_by_the_names_of_its_weights(
    tmp_path: Path, trained: dict[str, torch.Tensor], wrap: Any
) -> None:
    torch.save(wrap(trained), tmp_path / "weights.bin")
    assert holds(build_backbone(tiny(tmp_path / "weights.bin")), trained)


def test_two_equal_copies_in_one_file_are_refused_by_their_names(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    torch.save(under("first", trained) | under("second", trained), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"first\., second\."):
        build_backbone(tiny(tmp_path / "w.pth"))


def test_what_is_left_out_and_resized_is_listed(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    extra = {
        "mask_token": torch.zeros(1, 1, 16),
        "decoder_embed.weight": torch.zeros(4, 16),
        "decoder_blocks.0.norm1.weight": torch.zeros(4),
        "decoder_blocks.0.norm1.bias": torch.zeros(4),
        "dino_head.mlp.0.weight": torch.zeros(4, 16),
    }
    path = saved(tmp_path, trained | extra)
    listed = " ".join(build_backbone(tiny(path)).notes)
    names = ["mask_token", "decoder_embed.weight", "decoder_blocks (2", "dino_head", "head (2"]
    assert all(name in listed for name in names)
    bigger = build_backbone(tiny(path, img_size=16))
    assert "pos_embed" in bigger.notes[1]
    assert (bigger.image_size, bigger.module.pos_embed.shape) == (16, (1, 17, 16))
    del trained["head.weight"], trained["head.bias"]
    assert build_backbone(tiny(saved(tmp_path, trained))).notes == ()


def test_position_embeddings_are_resampled_as_timm_does(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    trained["pos_embed"][:, 1:] = 3.0  # a constant grid stays constant
    larger = build_backbone(tiny(saved(tmp_path, trained), img_size=20)).module
    positions = larger.state_dict()["pos_embed"]
    torch.testing.assert_close(positions[:, 1:], torch.full((1, 25, 16), 3.0))
    assert torch.equal(positions[:, 0], trained["pos_embed"][:, 0])
    half = {key: value.half() for key, value in trained.items()}
    again = build_backbone(tiny(saved(tmp_path, half), img_size=20)).module
    assert again.state_dict()["pos_embed"].dtype == torch.float32


def test_the_first_layer_is_adapted_to_the_channels(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path, trained)
    colour, grey = build_backbone(tiny(path)), build_backbone(tiny(path, in_chans=1))
    image = torch.rand(2, 1, 8, 8)
    with torch.no_grad():  # one channel counts as three equal ones
        torch.testing.assert_close(
            grey.module.eval()(image), colour.module.eval()(image.expand(-1, 3, -1, -1))
        )
    assert (grey.channels, "patch_embed" in grey.notes[1]) == (1, True)
    # The other way round: weights of grey images for a model of colour images.
    path = saved(tmp_path, {k: v.clone() for k, v in grey.module.state_dict().items()})
    assert build_backbone(tiny(path)).channels == 3


def test_another_architecture_is_refused_by_name(
    tmp_path: Path, trained: dict[str, torch.Tensor]
) -> None:
    path = saved(tmp_path, under("encoder", trained))
    for options, said in [
        ({"depth": 3}, r"missing: blocks\.2"),
        ({"depth": 12}, r"missing: blocks\.2"),  # of which the file has a fourth
        ({"depth": 1}, r"unexpected: blocks\.1"),
        ({"patch_size": 2}, r"shape: .*patch_embed"),
        ({"embed_dim": 32}, "shape: cls_token"),
        ({"class_token": False, "global_pool": "avg"}, "unexpected: cls_token|missing: fc_norm"),
    ]:
        with pytest.raises(ValueError, match=said):
            build_backbone(tiny(path, **options))


def test_dinov2_files_are_converted_by_timm(tmp_path: Path) -> None:
    options = {"img_size": 28, "embed_dim": 16, "depth": 2, "num_heads": 2}
    name = "vit_small_patch14_reg4_dinov2"
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options)
    ours = {key: value.clone() for key, value in model.state_dict().items()}
    # The original has the position of the class token in the table, and a mask token.
    theirs = ours | {"mask_token": torch.zeros(1, 16)}
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["pos_embed"] = torch.cat([torch.ones(1, 1, 16), ours["pos_embed"]], dim=1)
    torch.save(theirs, tmp_path / "dinov2.pth")
    settings = {"weights": str(tmp_path / "dinov2.pth"), "options": options}
    backbone = build_backbone(BackboneConfig(name, settings))
    assert holds(backbone, ours | {"cls_token": ours["cls_token"] + 1})
    assert "mask_token" in backbone.notes[0]


def test_weights_of_transformers_are_recognised(tmp_path: Path) -> None:
    weights = {"encoder.layer.0.attention.attention.query.weight": torch.zeros(16, 16)}
    with pytest.raises(ValueError, match="hf:"):
        build_backbone(tiny(saved(tmp_path, weights)))


def test_older_files_without_counters_of_batch_norms_load(tmp_path: Path) -> None:
    model = timm.create_model("resnet18", num_classes=0)
    kept = {k: v.clone() for k, v in model.state_dict().items() if "num_batches" not in k}
    path = saved(tmp_path, kept)
    backbone = build_backbone(BackboneConfig("resnet18", {"weights": str(path)}))
    assert all(torch.equal(backbone.module.state_dict()[k], v) for k, v in kept.items())


# Models that timm saved with their configuration


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **TINY)
    timm.models.save_for_hf(model, tmp_path / "mine", model_args=TINY, safe_serialization=True)
    return tmp_path / "mine"


def test_a_folder_that_timm_saved_is_loaded_with_its_options(folder: Path) -> None:
    config = BackboneConfig(f"local-dir:{folder}")
    backbone = build_backbone(config)
    assert holds(backbone, load_file(folder / "model.safetensors"))
    assert (backbone.features, backbone.channels, backbone.image_size) == (16, 3, 8)
    assert backbone.weights_sha256 == file_sha256(folder / "model.safetensors")
    wanted = preprocessing_of(config)
    assert wanted is not None
    assert (wanted.image_size, wanted.mean) == (8, (0.5, 0.5, 0.5))
    larger = build_backbone(BackboneConfig(config.name, {"options": {"img_size": 16}}))
    assert larger.image_size == 16
    assert build_backbone(config, initialise=False).tensors_sha256 is None


def test_the_path_of_such_a_folder_is_recorded_absolute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    assert BackboneConfig("local-dir:mine").recorded().name == f"local-dir:{folder}"
    assert BackboneConfig("hf-hub:mine").recorded().name == "hf-hub:mine"


def test_a_folder_without_a_configuration_or_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights"):
        build_backbone(BackboneConfig(f"local-dir:{folder}"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        build_backbone(BackboneConfig(f"local-dir:{folder}"))
    with pytest.raises(ConnectionError, match=r"config\.json"):
        build_backbone(BackboneConfig(f"local-dir:{folder / 'none'}"))


def test_a_model_in_the_cache_of_the_hub_is_loaded_without_a_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    snapshot = cache / "models--me--mine" / "snapshots" / "abc123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cache / "models--me--mine" / "refs").mkdir()
    (cache / "models--me--mine" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = BackboneConfig("hf-hub:me/mine")
    backbone = build_backbone(config)
    assert holds(backbone, load_file(snapshot / "model.safetensors"))
    assert backbone.tag == "me/mine at abc123"
    with pytest.raises(ConnectionError, match="hf-hub:me/other"):
        build_backbone(BackboneConfig("hf-hub:me/other"))
    with pytest.raises(ValueError, match="hf-hub:me/mine"):
        build_backbone(BackboneConfig("me/mine"))
