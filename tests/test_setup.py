"""What cannot work is found before anything is trained or written."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_runs import changed, squares, tiny

from training.train import prepare


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"rank": 17}}, r"rank 17 .*blocks\.0\.attn\.qkv"),
        ({"method": {"rank": 17, "name": "seq_lora"}}, r"rank 17 .*blocks\.0\.attn\.qkv"),
        ({"method": {"target": "*.nothing"}}, r"'\*\.nothing' matches no linear layer.*qkv"),
        ({"method": {"target": "*.nope", "name": "seq_lora"}}, "matches no linear layer.*qkv"),
        ({"data": {"image_size": 8, "resize": 8}}, r"8 by 8 pixels.*16 by 16.*data\.image_size"),
        ({"data": {"classes": 7}}, r"data\.classes is 7, but the data set has 6"),
        ({"data": {"init_cls": 7}}, r"data\.init_cls is 7"),
        ({"data": {"tasks": 4}}, r"data\.tasks is 4"),
        ({"device": "cuda"}, "device is cuda, but torch sees none"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_the_start(
    tmp_path: Path,
    root: Path,
    changes: dict[str, Any],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "device" in changes and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    experiment = tiny(root, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=said):
        prepare(experiment)
    assert not (tmp_path / "run").exists()


def test_weights_that_are_missing_or_do_not_fit_are_refused_at_the_start(
    tmp_path: Path, root: Path
) -> None:
    path = tmp_path / "w.safetensors"
    experiment = tiny(root, tmp_path / "run", backbone={"pretrained": True, "weights": str(path)})
    with pytest.raises(FileNotFoundError, match=r"w\.safetensors"):
        prepare(experiment)
    save_file({"cls_token": torch.zeros(1, 1, 16)}, path)
    with pytest.raises(ValueError, match=r"do not fit the model.*missing: "):
        prepare(experiment)
    assert not (tmp_path / "run").exists()


def test_data_that_cannot_be_used_are_refused_at_the_start(tmp_path: Path) -> None:
    data = squares(tmp_path / "data", train=2, test=1)
    experiment = tiny(data, tmp_path / "run")
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"red.0\.png"):
        prepare(experiment)
    (data / "train" / "red" / "0.png").unlink()
    (data / "test" / "grey" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"test: no images .*grey"):
        prepare(experiment)
    shutil.rmtree(data / "test")
    with pytest.raises(FileNotFoundError, match=r"expected ROOT/train/CLASS/IMAGE"):
        prepare(experiment)
    with pytest.raises(FileNotFoundError, match="no folder"):
        prepare(changed(experiment, data={"root": str(tmp_path / "none")}))
    assert not (tmp_path / "run").exists()
