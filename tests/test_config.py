"""Experiments from files and command lines: what is accepted, what is refused, and how."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training.config import (
    BackboneConfig,
    DataConfig,
    Experiment,
    HeadConfig,
    MethodConfig,
    TrainConfig,
    as_recorded,
    dump_experiment,
    load_experiment,
    packaged_configs,
    parser,
    read_experiment,
    resolve_config,
)


def write(folder: Path, text: str) -> str:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        load_experiment(argv)
    assert leaving.value.code == 2
    return capsys.readouterr().err


def test_no_argument_gives_the_defaults() -> None:
    assert load_experiment([]) == Experiment()


def test_command_line_overrides_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 0.3, epochs: 2}\nseed: 5\n")
    lr = ["--train.lr", "1e-2"]
    for argv in (["--config", path, *lr], [f"--config={path}", *lr], [*lr, "--config", path]):
        experiment = load_experiment(argv)
        assert (experiment.train.lr, experiment.train.epochs, experiment.seed) == (0.01, 2, 5)
        assert experiment.train.momentum == TrainConfig().momentum


def test_structured_values_on_the_command_line() -> None:
    experiment = load_experiment(
        [
            "--backbone.name=vit_tiny_patch16_224",
            "--backbone.options={img_size: 32}",
            "--backbone.options.depth=6",
            "--backbone.weights=w.pth",
            "--data.crop_scale=[0.2,0.9]",
            "--head.also=[ridge,heads]",
            "--data.cache=false",
        ]
    )
    assert experiment.backbone.options == {"img_size": 32, "depth": 6}
    assert experiment.data.crop_scale == (0.2, 0.9)
    assert experiment.head.also == ["ridge", "heads"]
    assert experiment.data.cache is False


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--train.learning_rate=1", "train.learning_rate"),
        ("--train.l=1", "train.l"),  # no abbreviations: they would hide misspellings
        ("--train.lr=fast", "train.lr"),
        ("--train.epochs=1.5", "train.epochs"),
        ("--train.epochs=true", "train.epochs"),
        ("--method.name=ewc", "method.name"),
        ("--head.also=[magic]", "head.also"),
        ("--train.lr=-1", "train.lr"),
        ("--train.lr=.nan", "train.lr"),
        ("--config=nowhere", "nowhere"),
        ("--config", "no configuration ''"),
    ],
)
def test_bad_arguments_leave_with_status_2_and_are_named(
    capsys: pytest.CaptureFixture[str], argument: str, named: str
) -> None:
    assert named in refused(capsys, argument)


@pytest.mark.parametrize(
    "text",
    [
        "train: {lx: 1}",
        "extra: 1",
        "config: 3",
        "train: 3",
        "[1, 2]",
        "{:",
        "train: {lr: x}",
        "3",
        "",
    ],
)
def test_bad_files_are_refused_by_both_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = write(tmp_path, text)
    assert "error" in refused(capsys, "--config", path)
    with pytest.raises(ValueError, match=r"some\.yaml is not a configuration"):
        read_experiment(path)


def test_a_missing_run_configuration_is_no_default(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_experiment(tmp_path / "config.yaml")


def test_print_config_is_a_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as leaving:
        load_experiment(["--seed=3", "--train.lr=0.5", "--print_config"])
    assert leaving.value.code == 0
    path = write(tmp_path, capsys.readouterr().out)
    assert read_experiment(path) == replace(Experiment(seed=3), train=TrainConfig(lr=0.5))


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_experiment(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    experiment = Experiment()
    for section in fields(experiment):
        value = getattr(experiment, section.name)
        names = (
            [f"{section.name}.{key}" for key in asdict(value)] if "Config" in repr(value) else []
        )
        for name in names or [section.name]:
            assert f"--{name} " in shown
    assert "Factor c of the down-projections A = c U'." in shown


@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-12, 1e6),
    gamma=st.floats(1e-12, 1e6),
    root=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    options=st.dictionaries(
        st.sampled_from(["img_size", "depth", "mlp_ratio", "norm"]),
        st.integers() | st.booleans() | st.floats(allow_nan=False) | st.text("abc"),
    ),
    flip=st.booleans(),
)
def test_dump_and_read_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    lr: float,
    gamma: float,
    root: str | None,
    options: dict[str, object],
    flip: bool,
) -> None:
    experiment = Experiment(
        data=DataConfig(root=root, flip=flip, crop_scale=(0.25, 0.5)),
        backbone=BackboneConfig(name="any", options=options, pretrained=False),
        method=MethodConfig(gamma=gamma),
        train=TrainConfig(lr=lr),
        head=HeadConfig(also=["heads", "ridge"]),
        seed=seed,
    )
    path = write(tmp_path_factory.mktemp("round"), dump_experiment(experiment))
    assert read_experiment(path) == experiment


def test_dump_holds_every_setting() -> None:
    values = yaml.safe_load(dump_experiment(Experiment()))
    expected = asdict(Experiment())
    assert values.keys() == expected.keys()
    for key, section in expected.items():
        if isinstance(section, dict):
            assert values[key].keys() == section.keys()


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given_ = Experiment(
        data=DataConfig(name="folder", root="images", resize=8),
        backbone=BackboneConfig(name="any", weights="w.pth"),
    )
    recorded = as_recorded(given_)
    assert given_.data.root == "images"
    assert recorded.data.root == str(tmp_path / "images")
    assert recorded.backbone.weights == str(tmp_path / "w.pth")
    assert as_recorded(Experiment()) == Experiment()


def test_resolve_config_prefers_files_and_lists_packaged_names(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1")
    assert resolve_config(path) == Path(path)
    for name in packaged_configs():
        assert resolve_config(name).is_file()
        argv = ["--config", name, "--data.root=x"]
        if name != "digits" and not name.startswith("native/"):
            argv.append("--backbone.weights=w.pth")
        assert isinstance(load_experiment(argv), Experiment)
    with pytest.raises(ValueError, match="no configuration 'nope'") as caught:
        resolve_config("nope")
    assert all(name in str(caught.value) for name in packaged_configs())


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


def test_the_weight_of_the_history_is_a_number_or_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, expected in (("mean", "mean"), ("0.25", 0.25), ("2", 2.0)):
        method = load_experiment([f"--method.history_weight={word}"]).method
        assert method.history_weight == expected
    assert "history_weight" in refused(capsys, "--method.history_weight=sum")


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


def test_the_packaged_caltech101_asks_for_weights(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "--config=caltech101", "--data.root=x")
    assert "--backbone.weights FILE" in " ".join(said.split())


def test_the_parser_can_raise_instead_of_leaving() -> None:
    with pytest.raises(Exception, match="seed"):
        parser(exit_on_error=False).parse_args(["--seed=x"])


@pytest.mark.parametrize("text", ["tran: {}\n", "tran:\n", "tran: {lr: 1}\n"])
def test_an_unknown_section_is_refused_even_if_empty(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="tran"):
        read_experiment(write(tmp_path, text))
