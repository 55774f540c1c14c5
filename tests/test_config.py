"""Experiments from files and command lines: what is accepted, what is refused, and how."""

import importlib
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from training.config import (
    FREE,
    NEUTRAL,
    BackboneConfig,
    CheckpointConfig,
    DataConfig,
    Experiment,
    HeadConfig,
    KeepConfig,
    MethodConfig,
    TrainConfig,
    as_recorded,
    differing_settings,
    dump_experiment,
    effective,
    experiment_from,
    experiment_of,
    experiment_values,
    flat_settings,
    foreign_classes,
    keeps_nothing,
    load_experiment,
    read_experiment,
    requested_help,
    resolved,
    resume_command,
    run_options,
)
from training.yaml_files import packaged_configs, read_yaml, resolve_config

MINE = '''
from backends.torch.readouts import NearestMean
from training.methods import Method

class Mine(Method):
    """A method of mine.

    Parameters
    ----------
    strength
        How strong it is.
    """

    def __init__(self, *, strength: float = 0.5) -> None:
        self.strength = strength

class KNN(NearestMean):
    """Neighbours.

    Parameters
    ----------
    k
        Number of neighbours.
    """

    name = "knn"

    def __init__(self, k: int = 5) -> None:
        self.k = k
'''


def write(folder: Path, text: str, name: str = "some") -> str:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file with a method and a read-out in the working directory."""
    (tmp_path / "mine_of_tests.py").write_text(MINE, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    sys.modules.pop("mine_of_tests", None)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        load_experiment(argv)
    assert leaving.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        load_experiment(argv)
    assert leaving.value.code == 0
    return capsys.readouterr().out


# Values


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (TrainConfig, {"epochs": -1}),
        (TrainConfig, {"batch_size": 0}),
        (TrainConfig, {"eval_batch_size": 0}),
        (TrainConfig, {"lr": 0.0}),
        (TrainConfig, {"momentum": 1.0}),
        (TrainConfig, {"weight_decay": -1.0}),
        (HeadConfig, {"scale": 0.0}),
        (HeadConfig, {"margin": -0.1}),
        (HeadConfig, {"also": ["ridge", "ridge"]}),
        (HeadConfig, {"readout": "ridge", "options": {"ridge": {"features": 0}}}),
        (HeadConfig, {"options": {"ridge": {"features": 5}}}),  # it is not fitted
        (HeadConfig, {"options": {"alignment": {"lr": -1.0}}}),
        (HeadConfig, {"readout": "magic"}),
        (CheckpointConfig, {"steps": 0}),
        (CheckpointConfig, {"minutes": 0.0}),
        (CheckpointConfig, {"keep": -1}),
        (Experiment, {"seed": -1}),
        (Experiment, {"seed": 2**32}),
        (Experiment, {"threads": 0}),
    ],
)
def test_values_out_of_range_are_refused(section: type, values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        section(**values)
    named = (*values, "ridge", "lr", "magic")
    assert any(key in str(caught.value) for key in named)


def test_read_outs_are_built_with_their_options() -> None:
    head = HeadConfig(
        readout="ridge", also=["alignment"], options={"ridge": {"features": 7}, "alignment": {}}
    )
    ridge, alignment = head.build()
    assert (ridge.name, ridge.features) == ("ridge", 7)
    assert (alignment.name, alignment.temperature) == ("alignment", 0.2)
    assert head.options["alignment"]["temperature"] == 0.2
    assert "heads" not in HeadConfig(readout="heads").options  # it has none


# The command line

FOLDER = ["--data.resize=8"]


def test_no_argument_gives_the_default_experiment() -> None:
    glyphs = experiment_of(["--config=glyphs"])
    assert (glyphs.data.name, glyphs.backbone.name) == ("glyphs", "cifar_vit")
    for argv in ([], ["--data=glyphs"], ["--backbone", "cifar_vit"]):
        assert load_experiment(argv) == glyphs
    assert load_experiment(["--train.lr=0.1"]) == replace(
        glyphs, train=replace(glyphs.train, lr=0.1)
    )


def test_other_data_or_backbones_start_from_the_defaults_of_the_settings() -> None:
    assert load_experiment(["--data=digits"]) == Experiment()
    assert resolved(load_experiment(["--config=digits"])) == resolved(
        experiment_of({"data": {"init_cls": 2, "increment": 2}})
    )
    assert load_experiment(["--backbone=glyphs"]) == Experiment()
    # The rate of the default experiment was chosen for LoDA.
    assert load_experiment(["--method=seq_lora"]).train.lr == Experiment().train.lr
    assert load_experiment(["--method=seq_lora", "--train.lr=0.5"]).train.lr == 0.5
    photos = load_experiment(["--data=folder", "--data.root=x"])
    assert (photos.backbone.name, photos.train.epochs) == ("cifar_vit", 12)
    larger = load_experiment(["--data.root=x", "--backbone=vit_small_patch16_224.augreg_in21k"])
    assert photos.train.lr == 0.18  # chosen for this backbone
    assert replace(larger.train, lr=0.18) == photos.train
    assert larger.train.lr == TrainConfig.lr
    assert load_experiment(["--data.root=x", "--method=o_lora"]).train.lr == TrainConfig.lr
    given = ["--data.root=x", "--backbone=vit_small_patch16_224.augreg_in21k", "--train.lr=0.5"]
    assert load_experiment(given).train.lr == 0.5


def test_a_backbone_made_from_such_images_is_refused() -> None:
    with pytest.raises(ValueError, match="cifar_vit"):
        experiment_of(["--config=glyphs", "--backbone=glyphs"])


def test_a_root_without_a_data_set_is_a_folder_of_images(tmp_path: Path) -> None:
    assert load_experiment(["--data.root", "x", *FOLDER]).data.name == "folder"
    path = tmp_path / "mine.yaml"
    path.write_text("data: {root: x, resize: 8}\n", encoding="utf-8")
    assert load_experiment(["--config", str(path)]).data.name == "folder"
    # A data set that is named, before or after, is kept.
    path.write_text("data: {name: cub, root: x, resize: 8}\n", encoding="utf-8")
    assert load_experiment(["--config", str(path)]).data.name == "cub"
    argv = ["--data.root", "x", "--data", "cub", *FOLDER]
    assert load_experiment(argv).data.options["root"] == "x"
    assert experiment_of({"data": {"name": "cub", "resize": 8}}, argv[:2]).data.name == "cub"


def test_the_folder_of_images_may_come_without_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for argv in (["photos", "--seed", "3"], ["--seed", "3", "photos"], ["--seed=3", "photos"]):
        _, settings = run_options(argv)
        assert load_experiment([*settings, *FOLDER]).data.options["root"] == "photos"
    for argv in (["photos", "photos"], ["absent"], ["photos", "--data.root=x"], ["digits"]):
        with pytest.raises(SystemExit):
            run_options(argv)


def test_command_line_overrides_the_file_which_overrides_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {lr: 0.3, epochs: 2}\nseed: 5\n")
    lr = ["--train.lr", "1e-2"]
    for argv in (["--config", path, *lr], [f"--config={path}", *lr], [*lr, "--config", path]):
        experiment = load_experiment(argv)
        assert (experiment.train.lr, experiment.train.epochs, experiment.seed) == (0.01, 2, 5)
        assert experiment.train.momentum == TrainConfig().momentum


def test_later_files_override_earlier_ones(tmp_path: Path) -> None:
    first = write(tmp_path, "train: {lr: 0.3, epochs: 2}\nmethod: {rank: 3, gamma: 2.0}", "first")
    second = write(tmp_path, "train.lr: 0.1\nmethod.rank: 5", "second")
    found = load_experiment(["--config", first, "--config", second])
    assert (found.train.lr, found.train.epochs) == (0.1, 2)
    assert found.method.options.items() >= {"rank": 5, "gamma": 2.0}.items()


def test_structured_values_on_the_command_line() -> None:
    found = load_experiment(
        [
            "--backbone=vit_tiny_patch16_224",
            "--backbone.options={img_size: 32}",
            "--backbone.options.depth=6",
            "--backbone.weights=w.pth",
            "--data.crop_scale=[0.2,0.9]",
            "--head.also=[ridge,heads]",
            "--data.cache=false",
            "--method.target=*.mlp.fc1",
        ]
    )
    assert found.backbone.options["options"] == {"img_size": 32, "depth": 6}
    assert (found.data.crop_scale, found.data.cache) == ((0.2, 0.9), False)
    assert found.head.also == ["ridge", "heads"]
    assert found.method.options["target"] == "*.mlp.fc1"


def test_a_value_may_be_called_as_a_section_is() -> None:
    found = load_experiment(
        ["--data", "folder", "--data.root", "data", "--data.resize=8", "--out", "method"]
    )
    assert (found.data.options["root"], found.out) == ("data", "method")


@pytest.mark.parametrize(("word", "weight"), [("mean", "mean"), ("0.25", 0.25), ("2", 2.0)])
def test_the_weight_of_the_history_is_a_number_or_a_word(word: str, weight: object) -> None:
    method = load_experiment([f"--method.history_weight={word}"]).method
    assert method.options["history_weight"] == weight


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--train.learning_rate=1", "train.learning_rate"),
        ("--train.l=1", "train.l"),  # no abbreviations: they would hide misspellings
        ("--train.lr=fast", "train.lr"),
        ("--train.lr=null", "train.lr"),
        ("--train.epochs=1.5", "train.epochs"),
        ("--train.epochs=true", "train.epochs"),
        ("--method.name=ewc", "ewc"),
        ("--method=ewc", "ewc"),
        ("--method.name", "method.name"),
        ("--method.penalty=1", "method.penalty"),  # it is of another method
        ("--method.history_weight=sum", "history_weight"),
        ("--head.also=[magic]", "magic"),
        ("--head.also=heads", "head.also"),
        ("--head.also=[heads", "head.also"),
        ("--head.ridge.features=3", "head.ridge.features"),  # not fitted by default
        ("--train.lr=-1", "train.lr"),
        ("--train.lr=.nan", "train.lr"),
        ("--seed=null", "seed"),
        ("--config=nowhere", "nowhere"),
        ("--config", "--config"),
        ("stray", "stray"),
    ],
)
def test_bad_arguments_leave_with_status_2_and_are_named(
    capsys: pytest.CaptureFixture[str], argument: str, named: str
) -> None:
    assert named in refused(capsys, argument)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("--method seq_lora --method.gamma 2", "method seq_lora.*another method: loda"),
        ("--method frozen --method.gao true", "method frozen.*none.*seq_lora"),
        ("--backbone glyphs --backbone.weights x", "backbone glyphs.*timm"),
        ("--backbone nothere.Net --backbone.width 4", "no module nothere"),
        ("--data digits --data.rot x", "data set digits.*data.root, of another data set: folder"),
        ("--data folder", "data.root must be given"),
        ("--head.ridge.features 5", "head.also"),
        ("--train.speed 5", "train.speed"),
        ("--overwrite", "only loda train"),
    ],
)
def test_options_of_other_components_are_refused_with_a_cure(argv: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        experiment_of(argv.split())


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("method: {name: o_lora, gamma: 2}", "method o_lora"),
        ("train: {lr: abc}", "train.lr"),
        ("method: ewc", "ewc"),
        ("head: {ridge: {features: 3}}", "head.also"),
        ("train: {lx: 1}", "train.lx"),
    ],
)
def test_errors_in_a_file_name_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, named: str
) -> None:
    path = write(tmp_path, text)
    message = refused(capsys, "--config", path, "--seed=3")
    assert f"{path}: " in message
    assert named in message


def test_print_config_is_a_configuration(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    changes = ["--data=digits", "--seed=3", "--train.lr=0.5"]
    changes += ["--method=o_lora", "--method.alpha=8"]
    path = write(tmp_path, printed(capsys, *changes, "--print-config"))
    method = MethodConfig("o_lora", {"alpha": 8.0})
    expected = Experiment(seed=3, method=method, train=TrainConfig(lr=0.5))
    assert read_experiment(path) == load_experiment(changes) == expected


def test_help_explains_every_setting() -> None:
    shown = " ".join(str(requested_help(["--help", "all"])).split())
    for name in flat_settings(load_experiment([])):
        short = name.removesuffix(".name")  # --method chooses method.name
        assert f"--{name} " in shown or f"--{short} " in shown
    assert "Weight γ of the new task against the old ones" in shown
    argv = ["--method", "o_lora", "--head.readout", "ridge", "--help", "all"]
    shown = " ".join(str(requested_help(argv)).split())
    assert "--method.penalty X Weight λ₁" in shown
    assert "--head.ridge.features" in shown
    assert "--method.gamma" not in shown


# Components


def test_options_of_a_component_that_is_not_chosen_any_more_are_dropped(tmp_path: Path) -> None:
    base = "method: {name: loda, rank: 8, gamma: 2.0}\ndata: {name: folder, root: x, resize: 8}\n"
    below = f"--config={write(tmp_path, base)}"
    found = load_experiment([below, "--method", "o_lora", "--data", "digits"])
    assert found.method == MethodConfig("o_lora", {"rank": 8})
    assert found.data == DataConfig(resize=8)
    # Chosen again, it has them back.
    assert load_experiment([below, "--method=loda"]).method.options["gamma"] == 2.0
    timm = f"--config={write(tmp_path, 'backbone: {name: any, weights: w, options.depth: 3}')}"
    assert experiment_of([timm, "--backbone=glyphs"]) == Experiment()


@pytest.mark.parametrize(
    ("named", "layers"),
    [
        ("gamma", [{"method": {"gamma": 2.0}}, ["--method=o_lora", "--method.gamma=3"]]),
        ("gama", [{"method": {"gama": 2.0}}, ["--method=o_lora"]]),
        ("penalty", [{"method.penalty": 1.0}]),
        ("lemperature", [{"head": {"alignment": {"lemperature": 1}}}, ["--head.readout=heads"]]),
        ("seed", [{"seed.of": 3}]),
    ],
)
def test_what_no_component_of_its_layer_has_is_refused(named: str, layers: list[Any]) -> None:
    with pytest.raises(ValueError, match=named):
        experiment_of(*layers)


def test_layers_are_mappings_or_arguments() -> None:
    found = experiment_of(
        {"method": "o_lora", "method.rank": 4}, ["--train.lr=1e-3"], {"train": {"epochs": 1}}
    )
    assert found.method == MethodConfig("o_lora", {"rank": 4})
    assert found.train == TrainConfig(lr=1e-3, epochs=1)


def test_read_outs_bring_their_options(tmp_path: Path) -> None:
    base = "head: {readout: alignment, also: [ridge], alignment: {epochs: 5}, ridge.features: 9}\n"
    below = f"--config={write(tmp_path, base)}"
    head = load_experiment([below]).head
    assert (head.options["alignment"]["epochs"], head.options["ridge"]) == (5, {"features": 9})
    head = load_experiment([below, "--head.readout=ridge", "--head.also=[heads]"]).head
    assert head == HeadConfig(readout="ridge", also=["heads"], options={"ridge": {"features": 9}})


def test_a_method_without_training_decides_by_its_own_read_out() -> None:
    found = experiment_of(
        ["--method=ranpac_frozen", "--head.ridge.features=9", "--head.also=[heads]"]
    )
    assert found.train.epochs == 0
    assert (found.head.readout, found.head.also) == ("ridge", [HeadConfig.readout, "heads"])
    assert found.head.options["ridge"] == {"features": 9}
    assert effective(found) == found
    by_hand = effective(Experiment(method=MethodConfig("ncm"), head=HeadConfig(readout="ridge")))
    assert (by_hand.head.readout, by_hand.head.also) == ("nearest_mean", ["ridge"])
    assert effective(Experiment()) == Experiment()


@pytest.mark.usefixtures("mine")
def test_classes_of_ones_own_are_chosen_by_their_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--method=mine_of_tests.Mine",
        "--method.strength=2",
        "--head.readout=mine_of_tests.KNN",
        "--head.KNN.k=3",
    ]
    found = load_experiment(argv)
    assert found.method.build().strength == 2.0
    assert [x.name for x in found.head.build()] == ["knn"]
    assert found.head.options == {"KNN": {"k": 3}}
    assert foreign_classes(found) == ["mine_of_tests.Mine", "mine_of_tests.KNN"]
    command = resume_command(Path("a run"), found)
    options, _ = run_options(shlex.split(command)[2:])
    assert (options.resume, options.allow) == (Path("a run"), foreign_classes(found))
    assert keeps_nothing(replace(found, keep=KeepConfig(branches=True))) == []  # not judged
    path = write(tmp_path, dump_experiment(found))
    assert load_experiment(["--config", path]) == found
    assert "method.weakness" in refused(capsys, *argv, "--method.weakness=1")
    shown = printed(capsys, *argv, "--help")
    assert "How strong it is." in shown
    assert "Number of neighbours." in shown


@pytest.mark.usefixtures("mine")
def test_the_file_of_a_run_runs_no_code(tmp_path: Path) -> None:
    values = experiment_values(Experiment())
    values["method"] = {"name": "mine_of_tests.Mine", "strength": "?", "more": 1}
    values["head"] |= {"readout": "mine_of_tests.KNN", "KNN": {"k": 3}}
    del values["head"][HeadConfig.readout]
    found = experiment_from(values, "here")
    assert "mine_of_tests" not in sys.modules
    assert found.method.options == {"strength": "?", "more": 1}
    assert found.head.options == {"KNN": {"k": 3}}
    assert experiment_values(found) == values
    assert effective(found) == found
    for use in (found.method.build, found.head.build):
        with pytest.raises(ValueError, match="--allow mine_of_tests"):
            use()
    values["method"] = {"name": "mine_of_tests.Mine", "strength": 3.0}
    path = Path(write(tmp_path, dump_experiment(experiment_from(values, "here"))))
    allowed = read_experiment(path, allow=["mine_of_tests.Mine"])
    assert allowed.method.build().strength == 3.0
    with pytest.raises(ValueError, match="KNN"):
        allowed.head.build()
    with pytest.raises(SystemExit):  # options of what is not allowed are no settings
        load_experiment(["--head.KNN.k=4"], recorded=path, allow=["mine_of_tests.Mine"])
    # Resuming a run allows the classes that the command line names.
    argv = ["--method", "mine_of_tests.Mine"]
    going_on = load_experiment(argv, recorded=path, allow=["mine_of_tests.KNN"])
    assert going_on.method.build().strength == 3.0
    assert going_on.head.build()[0].k == 3
    # Another method takes its place, with none of its options.
    other = load_experiment(["--method=o_lora"], recorded=path)
    assert other.method == MethodConfig("o_lora")
    assert differing_settings(other, read_experiment(path)) == ["method.name"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--method=ncm", "--train.lr=0.1"],
        ["--train.epochs=0", "--train.batch_size=8"],
        ["--train.optimizer=adam", "--train.momentum=0.8"],
        ["--method.gao=false", "--method.radius=0.1"],
        ["--checkpoint.keep=0", "--checkpoint.steps=3"],
    ],
)
def test_settings_without_effect_are_refused_where_they_are_given(
    capsys: pytest.CaptureFixture[str], argv: list[str], tmp_path: Path
) -> None:
    said = refused(capsys, *argv)
    assert argv[1].removeprefix("--").partition("=")[0] in said
    assert "no effect" in said
    # Those of a file stay: it may serve several methods.
    setting, _, value = argv[1].removeprefix("--").partition("=")
    section, _, key = setting.partition(".")
    path = write(tmp_path, f"{section}: {{{key}: {value}}}")
    load_experiment(["--config", path, argv[0]])


def test_the_settings_of_a_run_serve_a_new_one(tmp_path: Path) -> None:
    experiment = Experiment(seed=7, out=str(tmp_path))
    path = tmp_path / "config.yaml"
    path.write_text(dump_experiment(experiment), "utf-8")
    assert load_experiment(["--config", str(path)]) == experiment
    (tmp_path / "manifest.json").touch()  # a run, whose folder is taken
    assert load_experiment(["--config", str(path)]) == replace(experiment, out=None)


# Files


@pytest.mark.parametrize(
    "text",
    [
        "train: {lx: 1}",
        "extra: 1",
        "config: 3",
        "train: 3",
        "train: {lr: null}",
        "method: [loda]",
        "method: {name: 3}",
        "[1, 2]",
        "{:",
        "train: {lr: x}",
        "3",
        "",
        "tran: {}",
        "tran:",
        "overwrite: true",
        "? [1, 2]\n: 3",
    ],
)
def test_bad_files_are_refused_by_both_readers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = write(tmp_path, text)
    assert refused(capsys, "--config", path)
    with pytest.raises(ValueError, match=r"invalid configuration .*some\.yaml"):
        read_experiment(path)
    Path(path).unlink()  # and what is missing is no default
    with pytest.raises(FileNotFoundError):
        read_experiment(path)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = (
        "backbone: {name: any, weights: w, options: {drop_rate: 1e-3, when: 2026-01-01}}\n"
        "train: {lr: 2e-2, weight_decay: 1.5E-4}\nout: 1e5x\n"
    )
    found = read_experiment(write(tmp_path, text))
    assert found.backbone.options["options"] == {"drop_rate": 1e-3, "when": "2026-01-01"}
    assert (found.train.lr, found.train.weight_decay, found.out) == (0.02, 1.5e-4, "1e5x")


@given(
    seed=st.integers(0, 2**32 - 1),
    lr=st.floats(1e-12, 1e6),
    gamma=st.floats(1e-12, 1e6),
    root=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
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
    root: str,
    options: dict[str, object],
    flip: bool,
) -> None:
    experiment = Experiment(
        data=DataConfig("folder", {"root": root}, flip=flip, crop_scale=(0.25, 0.5), resize=8),
        backbone=BackboneConfig("any", {"options": options, "pretrained": False}),
        method=MethodConfig("loda", {"gamma": gamma}),
        train=TrainConfig(lr=lr),
        head=HeadConfig(also=["heads", "ridge"]),
        seed=seed,
    )
    path = write(tmp_path_factory.mktemp("round"), dump_experiment(experiment))
    assert read_experiment(path) == experiment
    assert experiment_from(experiment_values(experiment), "here") == experiment


def test_dump_holds_every_setting() -> None:
    values = yaml.safe_load(dump_experiment(Experiment()))
    assert list(values) == [item.name for item in fields(Experiment)]
    assert values["train"] == asdict(TrainConfig())
    assert values["method"] == {"name": "loda", **MethodConfig().options}
    assert set(values["head"]) >= {"start", "readout", "also", HeadConfig.readout}
    assert {"init_cls", "image_size"} <= set(values["data"])


@pytest.fixture
def chain(tmp_path: Path) -> str:
    """Three files that build on one another."""
    write(tmp_path, "train: {lr: 0.3, epochs: 2}\nseed: 5\n", "first")
    write(tmp_path, "base: first.yaml\ntrain: {epochs: 3}\nmethod: {rank: 7}\n", "second")
    return write(tmp_path, "# a comment\nbase: second\nmethod: {rank: 9}\n", "third")


def test_what_a_file_sets_wins_over_its_base(chain: str) -> None:
    for found in (load_experiment(["--config", chain]), read_experiment(chain)):
        assert (found.train.lr, found.train.epochs, found.seed) == (0.3, 3, 5)
        assert found.method.options["rank"] == 9
    assert load_experiment(["--config", chain, "--train.epochs=1"]).train.epochs == 1
    only = write(Path(chain).parent, "base: third\n", "only")
    assert read_experiment(only) == read_experiment(chain)


def test_a_base_may_be_packaged(tmp_path: Path) -> None:
    path = write(tmp_path, "base: paper/cub\ndata: {root: birds, tasks: 3}\n", "mine")
    found = read_experiment(path)
    assert (found.data.name, found.data.tasks) == ("cub", 3)
    assert found.method.options["history"] == "both"
    write(tmp_path, "seed: 77\n", "paper/cub")  # what lies beside the file comes first
    assert read_experiment(write(tmp_path, "base: paper/cub\n", "mine")).seed == 77


def test_files_that_only_serve_as_bases_are_not_listed() -> None:
    assert "paper/cub" in packaged_configs()
    assert not [name for name in packaged_configs() if "_protocol" in name or "sweeps" in name]
    assert resolve_config("paper/cub").with_name("_protocol.yaml").is_file()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: nowhere\n", "nowhere"),
        ("base: third\n", "circular"),
        ("base: 3\n", "base must be"),
        ("base:\n", "base must be"),
        (
            "base: first\nbase: first\n",
            "'base' must occur only once, got it twice, on lines 1 and 2",
        ),
        (
            "method: {rank: 3}\nmethod.rank: 4\n",
            "'method.rank' must occur only once, got it twice, on lines 1 and 2",
        ),
        (
            "method.rank: 4\nmethod: {rank: 3}\n",
            "'method.rank' must occur only once, got it twice, on lines 1 and 2",
        ),
        (
            "method:\n  rank: 3\n  gao: true\n  rank: 3\n",
            "'rank' must occur only once, got it twice, on lines 2 and 4",
        ),
        (
            "backbone.options: {depth: 1, depth: 1}\n",
            "'depth' must occur only once, got it twice, on line 1",
        ),
        ("base: first\nmethod: {rang: 3}\n", "method.rang"),
        ("base: first\ntran: {}\n", "tran"),
        ("method: &all {rank: 3}\ntrain: *all\n", "aliases"),
        (f"{'[' * 21}{']' * 21}\n", "nest"),
    ],
)
def test_wrong_files_say_what_is_wrong(
    chain: str, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(Path(chain).parent, text, "third")
    with pytest.raises(ValueError, match="invalid configuration") as caught:
        read_experiment(path)
    assert said in str(caught.value)
    assert said in refused(capsys, "--config", path)


def test_a_base_is_read_as_the_file_itself(chain: str, tmp_path: Path) -> None:
    write(tmp_path, "data: {name: folder, root: images, resize: 8}\n", "first")
    assert read_experiment(chain).data.options["root"] == "images"  # of the working directory
    write(tmp_path, "train: {lr: fast}\n", "first")
    with pytest.raises(ValueError, match=r"(?s)third\.yaml.*train\.lr"):
        read_experiment(chain)


def test_any_yaml_is_read_as_strictly(tmp_path: Path) -> None:
    path = Path(write(tmp_path, "variants: {a: {x.y: 1}, b: null}\nseeds: [1, 2]\n"))
    assert read_yaml(path) == {"variants": {"a": {"x.y": 1}, "b": None}, "seeds": [1, 2]}
    # The same place in different items of a list is not the same key.
    assert read_yaml(Path(write(tmp_path, "[{a: 1}, {a: 2}]"))) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match="only once"):
        read_yaml(Path(write(tmp_path, "[{a: 1, a: 2}]")))


def test_resolve_config_prefers_files_and_lists_packaged_names(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1")
    assert resolve_config(path) == Path(path)
    with pytest.raises(ValueError, match="nope") as caught:
        resolve_config("nope")
    assert all(name in str(caught.value) for name in packaged_configs())


# Recording and comparing


def test_recorded_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(
        data=DataConfig("folder", {"root": "images"}, resize=8),
        backbone=BackboneConfig("any", {"weights": "w.pth"}),
    )
    recorded = as_recorded(experiment)
    assert experiment.data.options["root"] == "images"
    assert recorded.data.options["root"] == str(tmp_path / "images")
    assert recorded.backbone.options["weights"] == str(tmp_path / "w.pth")
    assert as_recorded(Experiment()) == Experiment()
    assert differing_settings(experiment, recorded) == []


def test_differing_settings_are_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "link").symlink_to("images")

    def of(root: str, **changes: object) -> Experiment:
        data = DataConfig("folder", {"root": str(tmp_path / root)}, resize=8)
        return Experiment(data=data, **changes)  # type: ignore[arg-type]

    assert differing_settings(of("images", out="a"), of("link", out="b")) == []
    assert differing_settings(of("images"), of("other")) == ["data.root"]
    frozen, loda = MethodConfig("frozen"), MethodConfig("loda", {"rank": 3})
    assert differing_settings(of("images", method=frozen), of("images", method=loda)) == [
        "method.name"
    ]
    ridge = HeadConfig(readout="ridge", options={"ridge": {"features": 3}})
    assert differing_settings(of("images", method=loda, head=ridge), of("images")) == [
        "method.rank",
        "head.readout",
        "head.ridge.features",
        *(n for n in flat_settings(Experiment()) if n.startswith(f"head.{HeadConfig.readout}.")),
    ]


def test_settings_that_decide_nothing_exist() -> None:
    known = {*flat_settings(Experiment()), "data.root", "data.download"}
    assert set(FREE) < set(NEUTRAL) <= known


def test_switches_that_keep_nothing_are_named() -> None:
    keep = KeepConfig(branches=True, moments=True, heads=True, statistics=True)
    for name, named in (("loda", []), ("seq_lora", ["moments"]), ("ncm", ["branches", "moments"])):
        said = keeps_nothing(Experiment(method=MethodConfig(name), keep=keep))
        assert len(said) == len(named)
        assert all(word in line for word, line in zip(named, said, strict=True))


@pytest.mark.parametrize(
    "content", ["root:x:0:secret", "just a secret", "- secret\n b: [", "\0secret"]
)
def test_a_base_is_no_path_and_its_text_is_never_told(tmp_path: Path, content: str) -> None:
    outside = write(tmp_path / "outside", content)
    folder = tmp_path / "inside"
    for name in (outside, outside.removesuffix(".yaml"), "../outside/some", "../outside/some.yaml"):
        with pytest.raises(ValueError, match="base must be") as refused:
            read_experiment(write(folder, f"base: {name}\n", "mine"))
        assert "secret" not in str(refused.value)
    write(folder, content, "beside")
    with pytest.raises(ValueError, match="beside") as refused:
        read_experiment(write(folder, "base: beside\n", "mine"))
    assert "secret" not in str(refused.value)
    assert "\n" not in str(refused.value)
