"""Weights from local files, read without running code from them: .safetensors, .pth, .npz."""

import argparse
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.run_dir import file_sha256, require_plausible_archive

# Keys under which training checkpoints hold the network; iBOT's and DINO's is the teacher.
_WRAPPERS = ("state_dict", "model", "teacher")


def tensors_sha256(module: nn.Module) -> str:
    """Hash the weights of a model: name, dtype, shape and bytes of each, sorted by name.

    It identifies the weights independently of the file or download that they came from.

    Examples
    --------
    >>> layer = nn.Linear(1, 1)
    >>> before = tensors_sha256(layer)
    >>> _ = nn.init.constant_(layer.bias, 3.0)
    >>> len(before), before == tensors_sha256(layer)
    (64, False)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(module: nn.Module, path: Path) -> str:
    """Load a file that must fit the whole model, a classifier aside; returns the hash of the file.

    A .npz file must hold original ViT (augreg) weights, which timm's own loader reads; it resizes
    position embeddings to the model's image size.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be read, does not fit, or holds NaN or infinite values.
    """
    if not path.is_file():
        msg = f"backbone.weights: no file {path}."
        raise FileNotFoundError(msg)
    if path.suffix == ".npz":
        _load_npz(module, path)
    else:
        own = module.state_dict()
        weights = {_plain_name(key, own): value for key, value in _read(path).items()}
        weights = {k: v for k, v in weights.items() if k in own or not _is_classifier(module, k)}
        _require_fit(own, weights, path)
        module.load_state_dict(weights)  # converts a file's float16 to the model's float32
    infinite = [key for key, value in module.state_dict().items() if not value.isfinite().all()]
    if infinite:
        msg = f"the weights in {path} hold NaN or infinite values: {_some(infinite)}."
        raise ValueError(msg)
    return file_sha256(path)


def _require_fit(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise one ValueError for all missing, unknown and misshapen weights."""
    shapes = [
        f"{key} is {_shape(weights[key])}, the model has {_shape(value)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    misfits = {
        "missing": [key for key in own if key not in weights],
        "unexpected": [key for key in weights if key not in own],
        "of another shape": shapes,
    }
    if any(misfits.values()):
        lists = " ".join(f"{kind}: {_some(names)}." for kind, names in misfits.items() if names)
        msg = (
            f"the weights in {path} do not fit the model. {lists} Check backbone.name and "
            "backbone.options (img_size, patch_size, embed_dim, depth, in_chans) against what the "
            "file was trained with."
        )
        raise ValueError(msg)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            # DINO's and other files hold command-line settings beside the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file may raise anything
        reason = (str(error).splitlines() or [""])[0]
        # torch's message would advise running the code that the file contains.
        if path.suffix != ".safetensors" and not isinstance(error, OSError):
            reason = (
                "it holds more than tensors, or is damaged. Save only the model's state_dict(), "
                "best as .safetensors."
            )
        raise _unusable(path, reason) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise _unusable(path, "it holds no named tensors.")
    others = [str(key) for key, value in content.items() if not _is_plain(value)]
    if others:
        raise _unusable(path, f"entries that are no tensors of real numbers: {_some(others)}.")
    return {str(key): value for key, value in content.items()}


def _is_plain(value: object) -> bool:
    # torch would drop part of a complex number; no layer has sparse or quantised weights.
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and not (value.is_complex() or value.is_meta or value.is_quantized)
    )


def _load_npz(module: nn.Module, path: Path) -> None:
    loader: Any = getattr(module, "load_pretrained", None)
    if loader is None:
        msg = f"timm cannot read .npz weights for this model: give {path} as .safetensors or .pth."
        raise ValueError(msg)
    try:
        require_plausible_archive(path)
        # Opened here: NumPy would leave a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            blocks = {m[1] for key in arrays.files if (m := re.search(r"encoderblock_(\d+)/", key))}
        own: Any = getattr(module, "blocks", ())
        if blocks and len(blocks) != len(own):  # timm would ignore additional blocks
            msg = f"it has {len(blocks)} blocks, the model {len(own)}"
            raise ValueError(msg)
        with path.open("rb") as file:  # timm would leave the file open
            loader(file)
    except Exception as error:  # a foreign file may raise anything in timm's loader
        reason = " ".join(str(error).split())
        msg = f"the weights in {path} are not those of the original ViT for this model: {reason}"
        raise ValueError(msg) from error


def _plain_name(key: str, own: Mapping[str, Tensor]) -> str:
    # Wrappers for data-parallel or self-supervised training prefix every parameter name.
    return key if key in own else key.removeprefix("module.").removeprefix("backbone.")


def _is_classifier(module: nn.Module, key: str) -> bool:
    settings: Mapping[str, Any] = getattr(module, "default_cfg", None) or {}
    named = settings.get("classifier") or ()
    prefixes = {"head", "head_dist", "fc", *([named] if isinstance(named, str) else named)}
    return any(key.startswith(f"{prefix}.") for prefix in prefixes)


def _unusable(path: Path, reason: str) -> ValueError:
    kinds = ".safetensors, .pth or .npz"
    return ValueError(f"backbone.weights: cannot read {path} as {kinds}: {reason}")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a scalar"


def _some(names: list[str]) -> str:
    rest = len(names) - 8
    return ", ".join(names[:8]) + (f" and {rest} more" if rest > 0 else "")
