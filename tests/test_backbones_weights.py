"""Files of weights: what is read from each kind, and what a misfit says."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_backbones import TINY, holds, saved, tiny, trained_weights
from torch import nn

from training.backbones import BackboneConfig, build_backbone
from training.backbones.weights import load_weights


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_layers_with_the_name_of_a_wrapper_keep_it(tmp_path: Path, suffix: str) -> None:
    layers, other = (nn.ModuleDict({"backbone": nn.Linear(2, 2)}) for _ in range(2))
    path = tmp_path / f"w{suffix}"
    (torch.save if suffix == ".pth" else save_file)(layers.state_dict(), path)
    load_weights(other, path)
    assert torch.equal(other["backbone"].weight, layers["backbone"].weight)
