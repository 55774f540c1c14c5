"""The small vision transformer behind a convolutional stem."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from training.backbones import conv_vit

TINY: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "widths": [8, 8],
    "num_classes": 0,
}


def test_tokens_are_in_rows_and_see_what_is_near_them() -> None:
    torch.manual_seed(0)
    stem = timm.create_model(conv_vit.NAME, **TINY).patch_embed
    image = torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., 31, 0] += 5  # the corner at the bottom left
    moved = (stem(image) - stem(other)).abs().amax(dim=2)[0]
    assert moved.shape == (16,)
    assert moved[12] > 0
    assert (moved[:4] == 0).all()
    assert (moved[[3, 7, 11, 15]] == 0).all()


def test_folding_changes_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model(conv_vit.NAME, folded=False, **TINY).double()
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for _ in range(3):
        model(images)  # gives the normalisation statistics of its own
    model.eval()
    folded = copy.deepcopy(model)
    conv_vit.fold(folded)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"patch_size": 4}, {"img_size": 30}, {"widths": [8, 8, 8]}, {"widths": [8]}]
)
def test_sizes_that_the_stem_does_not_make_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="one token of 8 x 8 pixels by two widths"):
        timm.create_model(conv_vit.NAME, **{**TINY, **options})


def test_there_is_nothing_to_download() -> None:
    with pytest.raises(ValueError, match="no weights to download"):
        conv_vit.loda_conv_vit(pretrained=True)


def test_a_folder_in_the_form_of_timm_is_loaded(tmp_path: Path) -> None:
    model = timm.create_model(conv_vit.NAME, **TINY).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    built = {name: value for name, value in TINY.items() if name != "num_classes"}
    written = {
        "architecture": conv_vit.NAME,
        "num_classes": 0,
        "model_args": built,
        "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 0},
    }
    (tmp_path / "config.json").write_text(json.dumps(written))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
