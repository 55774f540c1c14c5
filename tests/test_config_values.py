"""Values of settings: what is out of range, and what does not go together."""

import pytest

from training.config import (
    BackboneConfig,
    DataConfig,
    Experiment,
    HeadConfig,
    MethodConfig,
    TrainConfig,
)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (DataConfig, {"init_cls": 0}),
        (DataConfig, {"increment": 0}),
        (DataConfig, {"classes": 0}),
        (DataConfig, {"task_sizes": []}),
        (DataConfig, {"task_sizes": [3, 0]}),
        (DataConfig, {"dataset": "torch/cifar10"}),  # for data.name timm alone
        (DataConfig, {"name": "timm", "root": "x", "resize": 8}),
        (DataConfig, {"name": "timm", "dataset": "torch/cifar10", "resize": 8}),  # no root
        (DataConfig, {"label_key": "fine_label"}),  # digits have no columns
        (DataConfig, {"verify": True}),  # digits lie in no folder
        (DataConfig, {"tasks": 0}),
        (DataConfig, {"validation": 0.95}),
        (DataConfig, {"validation": -0.1}),
        (DataConfig, {"workers": -1}),
        (DataConfig, {"std": 0.0}),
        (DataConfig, {"mean": float("inf")}),
        (DataConfig, {"order_seed": -1}),
        (DataConfig, {"crop_scale": (0.0, 1.0)}),
        (DataConfig, {"crop_scale": (0.5, 0.2)}),
        (DataConfig, {"name": "folder", "resize": 8}),  # no root
        (DataConfig, {"name": "folder", "resize": None, "cache": True, "root": "x"}),
        (DataConfig, {"image_size": 16}),  # digits are 8 wide
        (DataConfig, {"train_crop": "pad", "pad": 8}),  # no reflection is that long
        (DataConfig, {"train_crop": "pad", "pad": 1, "image_size": 12}),
        (DataConfig, {"train_crop": "random_resized", "image_size": 32}),  # test images stay 8
        (DataConfig, {"test_resize": 6}),
        (DataConfig, {"test_crop": "center", "test_resize": 6}),
        (DataConfig, {"name": "folder", "root": "x", "train_crop": "pad"}),
        (
            DataConfig,
            {"name": "folder", "root": "x", "train_crop": "random_resized", "test_resize": 8},
        ),
        (BackboneConfig, {"options": {"num_classes": 3}}),
        (BackboneConfig, {"name": "any", "weights": "a.pth", "pretrained": False}),
        (BackboneConfig, {"weights": "a.pth"}),  # glyphs has its own
        (MethodConfig, {"rank": 0}),
        (MethodConfig, {"radius": -0.1}),
        (MethodConfig, {"gamma": -3.0}),
        (MethodConfig, {"ridge": -0.1}),
        (MethodConfig, {"general_weight": -0.1}),
        (MethodConfig, {"isolated_weight": float("inf")}),
        (MethodConfig, {"down_scale": 0.0}),
        (MethodConfig, {"target": " "}),
        (MethodConfig, {"isolated": "trace_ratio", "energy_floor": 1.1}),
        (MethodConfig, {"energy_floor": 0.5}),  # the rule of the theorem has no floor
        (MethodConfig, {"joint": True, "recalibration": "none"}),
        (MethodConfig, {"history_decay": 1.01}),
        (MethodConfig, {"history_decay": float("nan")}),
        (MethodConfig, {"history_weight": -1.0}),
        (TrainConfig, {"epochs": -1}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"lr": 0.0}),
        (TrainConfig, {"momentum": 1.0}),
        (TrainConfig, {"weight_decay": -1.0}),
        (HeadConfig, {"scale": 0.0}),
        (HeadConfig, {"margin": -0.1}),
        (HeadConfig, {"also": ["ridge", "ridge"]}),
        (HeadConfig, {"ridge_features": 0}),
        (Experiment, {"seed": -1}),
        (Experiment, {"seed": 2**32}),
        (Experiment, {"threads": 0}),
    ],
)
def test_values_out_of_range_are_refused(section: type, values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        section(**values)
    assert any(key in str(caught.value) for key in (*values, "root"))


def test_the_image_settings_of_the_experiments_are_accepted() -> None:
    paper = {"image_size": 224, "train_crop": "random_resized", "flip": True, "root": "x"}
    test = {"test_resize": 256, "test_crop": "center"}
    for name in ("folder", "cifar100"):
        assert DataConfig(name=name, **paper, **test).crop_scale == (0.05, 1.0)  # type: ignore[arg-type]
    DataConfig(name="folder", root="x", image_size=32, resize=32, train_crop="pad", pad=4)
    DataConfig(image_size=16, resize=16)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"name": "folder", "root": "x"}, "--data.resize 224 --data.image_size 224"),
        ({"name": "folder", "root": "x", "resize": 32}, "--data.resize 32 --data.image_size 32"),
        ({"name": "folder", "root": "x", "image_size": 96}, "--data.resize 96 --data.image_size 9"),
        ({"name": "folder", "root": "x", "train_crop": "random_resized"}, "--data.resize 224 "),
        ({"name": "cifar100", "root": "x"}, "--data.resize 32 --data.image_size 32"),
        ({"image_size": 16}, "--data.resize 16 --data.image_size 16"),
    ],
)
def test_sizes_that_do_not_meet_come_with_sizes_that_do(
    settings: dict[str, object], advice: str
) -> None:
    with pytest.raises(ValueError, match="backbone reads") as caught:
        DataConfig(**settings)  # type: ignore[arg-type]
    said = str(caught.value)
    assert advice in said
    words = said.replace(",", " ").split()
    sides = {key: int(words[words.index(f"--data.{key}") + 1]) for key in ("resize", "image_size")}
    DataConfig(**{**settings, **sides})  # type: ignore[arg-type]


def test_zeros_that_switch_something_off_are_settings() -> None:
    assert TrainConfig(epochs=0).epochs == 0
    zeros = dict.fromkeys(("radius", "gamma", "ridge", "general_weight", "isolated_weight"), 0.0)
    method = MethodConfig(**zeros)  # type: ignore[arg-type]
    assert {key: getattr(method, key) for key in zeros} == zeros


@pytest.mark.parametrize("option", ["depth", "embed_dim", "num_heads", "patch_size", "qkv_bias"])
def test_another_architecture_needs_weights_of_its_own(option: str) -> None:
    options = {option: 1, "img_size": 32}
    with pytest.raises(ValueError, match=rf"\['{option}'\].*weights FILE.*pretrained false"):
        BackboneConfig("any", options=options)
    BackboneConfig("any", options=options, weights="w.pth")
    BackboneConfig("any", options=options, pretrained=False)


def test_options_that_pretrained_weights_are_adapted_to_need_none() -> None:
    BackboneConfig("any", options={"img_size": 32, "in_chans": 1, "proj_drop_rate": 0.1})
