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
    differing_settings,
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
    (tmp_path / "tree").mkdir()
    for dataset, expected in (
        ("hfds/tree", f"hfds/{tmp_path / 'tree'}"),
        ("hfds/some/name", "hfds/some/name"),  # on the hub
        ("hfds//no/such", "hfds//no/such"),
    ):
        data = DataConfig(name="timm", dataset=dataset, resize=8)
        given_ = Experiment(data=data)
        assert as_recorded(given_).data.dataset == expected
        assert differing_settings(given_, as_recorded(given_)) == []  # as earlier versions had it


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


def test_the_weight_of_the_history_is_a_number_or_a_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for word, expected in (("mean", "mean"), ("0.25", 0.25), ("2", 2.0)):
        method = load_experiment([f"--method.history_weight={word}"]).method
        assert method.history_weight == expected
    assert "history_weight" in refused(capsys, "--method.history_weight=sum")


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
