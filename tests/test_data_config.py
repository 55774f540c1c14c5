"""The settings of the data: what is out of range, what does not go together, recorded paths."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.backbones import Preprocessing
from training.config import load_experiment
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
        ("digits", {}, {"std": [1.0, 0.0, 1.0]}, "std"),
        ("digits", {}, {"mean": float("inf")}, "mean"),
        ("digits", {}, {"mean": [0.1, 0.2]}, "mean"),
        ("digits", {}, {"mean": [0.1, 0.2, 0.3], "channels": 1}, "mean"),
        ("digits", {}, {"order_seed": -1}, "order_seed"),
        ("digits", {}, {"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ("digits", {}, {"crop_scale": (0.5, 0.2)}, "crop_scale"),
        ("digits", {}, {"image_size": 16, "resize": None}, "image_size"),  # digits are 8 wide
        # No reflection is that long.
        ("digits", {}, {"image_size": 8, "train_crop": "pad", "pad": 8}, "pad"),
        (
            "digits",
            {},
            {"train_crop": "pad", "pad": 1, "image_size": 12, "resize": 8, "test_resize": 12},
            "pad",
        ),
        ("digits", {}, {"image_size": 8, "test_resize": 6}, "test_resize"),
        ("digits", {}, {"image_size": 8, "test_crop": "none", "test_resize": 9}, "test_crop"),
        ("digits", {}, {"verify": True}, "verify"),  # digits lie in no folder
        ("digits", {"dataset": "torch/cifar10"}, {}, "dataset"),
        ("digits", {"label_key": "fine_label"}, {}, "label_key"),
        ("digits", X, {}, "root"),
        ("folder", {}, {"resize": 8}, "root"),
        ("folder", X, {"cache": True, "resize": None, "image_size": 8}, "cache"),
        ("folder", X, {"train_crop": "pad", "resize": None, "image_size": 8}, "train_crop"),
        ("folder", X, {"resize": None, "test_resize": 8, "image_size": 9}, "test_resize"),
        ("folder", X, {"resize": None, "image_size": 8}, "image_size"),
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
        assert config.images.resize is None
    DataConfig("folder", X, image_size=32, resize=32, train_crop="pad", pad=4)
    DataConfig(image_size=16, resize=16)
    DataConfig("timm", {"dataset": "hfds/any", "label_key": "fine_label"}, resize=8)


# What is left to the backbone

VIT = Preprocessing(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "lanczos", 0.9, "center", 3)
GREY = Preprocessing(8, (0.1,), (0.2,), "bicubic", 1.0, "center", 1)


def test_photos_are_prepared_as_the_backbone_wants_them() -> None:
    config = DataConfig("folder", X, validation=0.0)
    images = config.resolved(VIT).images
    assert (images.image_size, images.resize, images.test_crop) == (224, 248, "center")
    assert (images.mean, images.std) == (VIT.mean, VIT.std)
    assert (images.channels, images.interpolation, images.crop_mode) == (3, "lanczos", "center")
    assert (images.train_crop, images.flip) == ("random_resized", True)
    squashed = config.resolved(replace(VIT, crop_mode="squash", crop_pct=1.0)).images
    assert (squashed.resize, squashed.crop_mode, squashed.test_crop) == (224, "squash", "none")
    grey = config.resolved(GREY)
    assert (grey.mode, grey.mean, grey.std) == ("L", 0.1, 0.2)


def test_small_images_are_enlarged_whole_and_neither_cropped_nor_mirrored() -> None:
    images = DataConfig("cifar100", X).resolved(VIT).images
    assert (images.image_size, images.resize, images.test_crop) == (224, 224, "none")
    assert (images.train_crop, images.flip, images.channels) == ("none", False, 3)
    digits = DataConfig().resolved(VIT).images
    assert (digits.channels, digits.resize) == (3, 224)
    assert DataConfig().resolved(GREY).images.resize is None


@given(st.sampled_from([VIT, GREY, None]), st.sampled_from(["digits", "folder"]))
def test_what_is_resolved_stays_so_and_is_no_deviation(
    backbone: Preprocessing | None, name: str
) -> None:
    options = {} if name == "digits" else X
    settings: Any = {} if name == "digits" else {"image_size": 16, "validation": 0.0}
    done = DataConfig(name, options, **settings).resolved(backbone)
    assert "auto" not in vars(done).values()
    for other in (backbone, VIT, GREY, None):
        assert done.resolved(other) == done
    assert all("image_size" in line for line in done.unlike(backbone))


def test_settings_go_before_the_backbone_and_deviations_are_named() -> None:
    config = DataConfig("folder", X, mean=0.5, std=[0.5, 0.5, 0.5], image_size=112, validation=0.0)
    images = config.resolved(VIT).images
    assert (images.mean, images.std, images.resize) == (0.5, 0.5, 124)
    lines = config.unlike(VIT)
    assert [line.split()[0] for line in lines] == ["data.image_size", "data.mean", "data.std"]
    assert "[0.485, 0.456, 0.406]" in lines[1]
    assert DataConfig().unlike(VIT) == config.unlike(None) == []


def test_somebody_must_say_how_large_photos_are() -> None:
    with pytest.raises(ValueError, match="image_size must be given"):
        DataConfig("folder", X, validation=0.0).resolved(None)
    assert DataConfig("folder", X, resize=32).images.image_size == 32


@pytest.mark.parametrize(
    ("argv", "mean"),
    [
        (["--data.mean", "0.4"], 0.4),
        (["--data.mean", "0.4", "0.5", "0.6"], [0.4, 0.5, 0.6]),
        (["--data.mean=[0.4, 0.5, 0.6]"], [0.4, 0.5, 0.6]),
        (["--data.mean", "-0.4", "-.5", "1e-3"], [-0.4, -0.5, 1e-3]),
        (["--data.mean", "auto"], "auto"),
    ],
)
def test_one_or_three_numbers_are_given_on_the_command_line(argv: list[str], mean: Any) -> None:
    assert load_experiment(["--data", "digits", *argv]).data.mean == mean
    both = [*argv, "--data", "digits", "--data.task_sizes", "4", "3", "--seed", "3"]
    experiment = load_experiment(both)
    assert (experiment.data.mean, experiment.data.task_sizes) == (mean, [4, 3])


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
