"""Training images that a stem of convolutions sees once a task, and a run takes as tokens."""

from pathlib import Path
from typing import Any

import pytest
from interrupted import cut_off, differences
from run_contents import same_model
from small_runs import changed, tiny, tree
from torch import Tensor

from training.backbones import conv_vit
from training.config import Experiment
from training.data import DataConfig
from training.data.images import fits_cache
from training.train import train

OPTIONS = {
    "img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "widths": [8, 8],
}  # fmt: skip
# 36 training images in tasks of 12, and 6, 12, 18 images to evaluate on. Mini-batches of 6: their
# halves have 3, and of a single image a convolution may round differently.
TRAINED, EVALUATED, EPOCHS = 36, 36, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory)


def experiment(root: Path, out: Path, method: str = "loda", **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "data": {"train_crop": "none", "pad": 0, "flip": False},
        "backbone": {"name": conv_vit.NAME, "options": OPTIONS, "pretrained": False},
        "method": {"name": method},
        "train": {"batch_size": 6},
    }
    return tiny(
        root, out, **{k: settings.get(k, {}) | v for k, v in {**settings, **changes}.items()}
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in each pass through the first convolution of a stem."""
    sizes: list[int] = []
    forward = conv_vit.Conv.forward

    def counted(self: conv_vit.Conv, x: Tensor) -> Tensor:
        if self.conv.in_channels == 3:
            sizes.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(conv_vit.Conv, "forward", counted)
    return sizes


@pytest.mark.parametrize("method", ["loda", "sd_lora", "joint"])
def test_tokens_change_no_bit_and_no_image_is_seen_twice(
    tmp_path: Path, root: Path, seen: list[int], method: str
) -> None:
    head = {"readout": "compensated"}
    once = train(experiment(root, tmp_path / "once", method, head=head), quiet=True)
    checks = sum(size for size in seen if size == 1)
    evaluated = EVALUATED if method != "joint" else 18
    assert sum(seen) - checks == TRAINED + evaluated
    seen.clear()
    data = {"cache": False}
    again = train(experiment(root, tmp_path / "again", method, head=head, data=data), quiet=True)
    assert sum(seen) > EPOCHS * TRAINED + TRAINED + evaluated
    assert same_model(once, again)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("loda", {"data": {"train_crop": "none", "pad": 0, "flip": True}}),
        ("loda", {"precision": "bf16"}),
        ("own_methods.Unsaved", {}),
    ],
)
def test_images_are_seen_in_every_epoch_where_tokens_may_change(
    tmp_path: Path, root: Path, seen: list[int], method: str, changes: dict[str, Any]
) -> None:
    train(changed(experiment(root, tmp_path / "run", method), **changes), quiet=True)
    assert sum(seen) > EPOCHS * TRAINED + EVALUATED


def test_a_run_on_tokens_can_be_cut_off(tmp_path: Path, root: Path) -> None:
    saved = {"checkpoint": {"steps": 1}}
    whole = train(experiment(root, tmp_path / "whole"), quiet=True)
    cut = cut_off(experiment(root, tmp_path / "cut", **saved), [2, 3, 4])
    assert differences(whole, cut) == []


def test_tokens_are_kept_if_they_are_small_or_the_settings_say_so() -> None:
    assert fits_cache(DataConfig(), 10**6)
    assert not fits_cache(DataConfig(), 10**9)
    assert fits_cache(DataConfig(cache=True, resize=32), 10**9)
    assert not fits_cache(DataConfig(cache=False), 1)
