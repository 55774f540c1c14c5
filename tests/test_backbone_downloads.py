"""Pretrained weights that timm fetches: which ones, and what is said where there are none."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError
from tiny_backbones import NAME, saved, tiny

from training.backbones import build_backbone
from training.config import BackboneConfig


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
    download(monkeypatch, error)
    with pytest.raises(ConnectionError, match=r"fetched \(no route.*backbone\.weights"):
        build_backbone(BackboneConfig(NAME))


@pytest.mark.parametrize(
    "error", [RuntimeError("size\n\tmismatch"), ValueError("size mismatch"), KeyError("size")]
)
def test_downloaded_weights_that_do_not_fit_are_no_matter_of_the_network(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    download(monkeypatch, error)
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


def test_the_exact_tag_of_downloaded_weights_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    download(monkeypatch)
    backbone = build_backbone(BackboneConfig(NAME, options={"img_size": 16}))
    tag = "augreg_in21k_ft_in1k"
    assert backbone.tag == f"{NAME}.{tag} from timm/{NAME}.{tag}"
    assert backbone.weights_sha256 is None
    assert len(backbone.tensors_sha256 or "") == 64
    assert build_backbone(tiny()).tag is None
