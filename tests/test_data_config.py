"""The settings of the data: what is out of range, what does not go together, recorded paths."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from training.data import DATA_SETS, DataConfig

X = {"root": "x"}


@pytest.mark.parametrize(
    ("name", "options", "values", "named"),
    [
        ("digits", {}, {"init_cls": 0}, "init_cls"),
        ("digits", {}, {"increment": 0}, "increment"),
        ("digits", {}, {"classes": 0}, "classes"),
        ("digits", {}, {"task_sizes": []}, "task_sizes"),
        ("digits", {}, {"task_sizes": [3, 0]}, "task_sizes"),
        ("digits", {}, {"tasks": 0}, "tasks"),
        ("digits", {}, {"validation": 0.95}, "validation"),
        ("digits", {}, {"validation": -0.1}, "validation"),
        ("digits", {}, {"workers": -1}, "workers"),
        ("digits", {}, {"std": 0.0}, "std"),
        ("digits", {}, {"mean": float("inf")}, "mean"),
        ("digits", {}, {"order_seed": -1}, "order_seed"),
        ("digits", {}, {"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ("digits", {}, {"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ("digits", {}, {"image_size": 16}, "image_size"),  # digits are 8 wide
        ("digits", {}, {"train_crop": "pad", "pad": 8}, "pad"),  # no reflection is that long
        ("digits", {}, {"train_crop": "pad", "pad": 1, "image_size": 12}, "pad"),
        # Test images stay 8 wide.
        ("digits", {}, {"train_crop": "random_resized", "image_size": 32}, "image_size"),
        ("digits", {}, {"test_resize": 6}, "test_resize"),
        ("digits", {}, {"test_crop": "center", "test_resize": 6}, "test_crop"),
        ("digits", {}, {"verify": True}, "verify"),  # digits lie in no folder
        ("digits", {"dataset": "torch/cifar10"}, {}, "dataset"),
        ("digits", {"label_key": "fine_label"}, {}, "label_key"),
        ("digits", X, {}, "root"),
        ("folder", {}, {"resize": 8}, "root"),
        ("folder", X, {"cache": True}, "cache"),
        ("folder", X, {"train_crop": "pad"}, "train_crop"),
        ("folder", X, {"train_crop": "random_resized", "test_resize": 8}, "test_resize"),
        ("timm", X, {"resize": 8}, "dataset"),
        ("timm", {"dataset": "torch/cifar10"}, {"resize": 8}, "root"),
        ("timm", {"dataset": "folder", **X, "image_key": "img"}, {"resize": 8}, "image_key"),
        ("timm", {"dataset": "folder", **X}, {"resize": 8, "verify": True}, "verify"),
        ("nowhere", {}, {}, "nowhere"),
    ],
)
def test_values_that_cannot_be_are_refused(
    name: str, options: dict[str, Any], values: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        DataConfig(name, options, **values)


def test_the_image_settings_of_the_experiments_are_accepted() -> None:
    paper: Any = {"image_size": 224, "train_crop": "random_resized", "flip": True}
    for name in ("folder", "cifar100"):
        config = DataConfig(name, X, **paper, test_resize=256, test_crop="center")
        assert config.crop_scale == (0.05, 1.0)
    DataConfig("folder", X, image_size=32, resize=32, train_crop="pad", pad=4)
    DataConfig(image_size=16, resize=16)
    DataConfig("timm", {"dataset": "hfds/any", "label_key": "fine_label"}, resize=8)


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("folder", {}, "--data.resize 224 --data.image_size 224"),
        ("folder", {"resize": 32}, "--data.resize 32 --data.image_size 32"),
        ("folder", {"image_size": 96}, "--data.resize 96 --data.image_size 96"),
        ("folder", {"train_crop": "random_resized"}, "--data.resize 224 "),
        ("cifar100", {}, "--data.resize 32 --data.image_size 32"),
        ("digits", {"image_size": 16}, "--data.resize 16 --data.image_size 16"),
    ],
)
def test_sizes_that_do_not_meet_come_with_sizes_that_do(
    name: str, settings: dict[str, Any], advice: str
) -> None:
    options = {} if name == "digits" else X
    with pytest.raises(ValueError, match=advice) as caught:
        DataConfig(name, options, **settings)
    words = str(caught.value).replace(",", " ").split()
    sides = {key: int(words[words.index(f"--data.{key}") + 1]) for key in ("resize", "image_size")}
    DataConfig(name, options, **{**settings, **sides})


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert DataConfig().recorded() == DataConfig()
    config = DataConfig("folder", {"root": "images"}, resize=8)
    assert config.recorded().options == {"root": str(tmp_path / "images")}
    assert config.options == {"root": "images"}
    (tmp_path / "tree").mkdir()
    for dataset, expected in (
        ("hfds/tree", f"hfds/{tmp_path / 'tree'}"),
        ("hfds/some/name", "hfds/some/name"),  # on the hub
        ("hfds//no/such", "hfds//no/such"),
    ):
        config = DataConfig("timm", {"dataset": dataset}, resize=8)
        assert config.recorded().options["dataset"] == expected


def test_a_data_set_that_only_a_run_names_is_not_imported() -> None:
    config = DataConfig("no_such_module.Data", {"any": 3}, image_size=16, trusted=False)
    assert (config.side, config.mode, config.options) == (None, "RGB", {"any": 3})
    with pytest.raises(ValueError, match="no_such_module"):
        config.build()


def test_every_name_says_what_it_is_and_loads_no_torch() -> None:
    assert DATA_SETS.names()[:3] == ["glyphs", "digits", "folder"]
    code = (
        "import sys; from training.data import DATA_SETS, DataConfig; DataConfig()\n"
        "assert all(DATA_SETS.find(name).__doc__ for name in DATA_SETS.paths)\n"
        "print({'torch', 'torchvision', 'timm', 'sklearn', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
