"""The command `loda`: what it prints, what it returns, and that errors are one line."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from commands import says
from run_contents import contents
from small_runs import READOUTS, flags, tiny

from training import cli
from training.config import load_experiment, read_experiment, resolved, run_options, setting_choices

# An interpreter in which the libraries of the train extra cannot be found.
BASE_INSTALL = """
import importlib.util, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {names}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition('.')[0] in {names} else find_spec(name, package))
sys.meta_path.insert(0, Hidden())
from training.cli import main
sys.exit(main(sys.argv[1:]))
"""
EXTRA = tuple(dict.fromkeys((*cli._TRAIN, "numpy", "scipy")))


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LODA_DEBUG", raising=False)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail with status 2; what it said, without the usage."""

    def refused(*argv: object) -> str:
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        printed = capsys.readouterr()
        assert status == 2
        if argv[0] != "train":  # it says what it is about to do
            assert printed.out == ""
        assert "Traceback" not in printed.err
        lines = [x for x in printed.err.splitlines() if not x.startswith(("usage:", " "))]
        assert 1 <= len(lines) <= 2
        return " ".join(line.strip() for line in lines)

    return refused


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed in silence but for what it prints."""

    def shown(*argv: object) -> str:
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as leaving:
            status = int(leaving.code or 0)
        printed = capsys.readouterr()
        assert (status, printed.err) == (0, "")
        return printed.out

    return shown


STOPPED = """
from training.methods import Method
class Stopped(Method):
    def begin_task(self, batches):
        raise KeyboardInterrupt
"""


COMMANDS = [*cli._COMMANDS]


def test_help_names_every_command(shown: Callable[..., str]) -> None:
    without = shown()
    assert shown("--help") == without
    for command in COMMANDS:
        assert f"  {command} " in without


def test_the_help_of_train_is_short_and_the_rest_is_asked_for(
    shown: Callable[..., str],
) -> None:
    short, whole = shown("train", "--help"), shown("train", "-h", "all")
    assert 2 * len(short.splitlines()) < len(whole.splitlines())
    for setting in ("--config", "--method NAME", "--train.lr", "--out", "--resume RUN"):
        assert setting in short
    for setting in ("--print-config", "--method.rank", "--keep.moments", "--allow CLASS"):
        assert setting in whole
    for python in ("Literal[", "Optional[", "type:", "int |"):
        assert python not in whole
    section = shown("train", "--method", "frozen", "--help", "train")
    assert "--train.momentum" in section
    assert "--seed" not in section
    assert "  sd_lora: " in shown("train", "--method=sd_lora", "--help", "method")
    # The defaults are those of the experiment that would run.
    assert "(default: glyphs)" in " ".join(short.split())
    digits = shown("train", "--config", "digits", "--help")
    assert "(default: digits)" in " ".join(digits.split())


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["trian"], "did you mean train"),
        (["data", "chek"], "did you mean check"),
        (["xyz"], "choose from train"),
        (["report", "run", "--figur", "x"], "did you mean --figure"),
        (["train", "--lr", "3"], "did you mean train.lr"),
        (["train", "--method=sed_lora"], "did you mean sd_lora"),
        (["train", "--config=digitz"], "did you mean digits"),
        (["train", "--data=digit"], "did you mean digits"),
    ],
)
def test_what_does_not_exist_is_answered_with_what_was_meant(
    argv: list[str], meant: str, refused: Callable[..., str]
) -> None:
    assert meant in refused(*argv)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_can_complete_commands_and_settings(shell: str, shown: Callable[..., str]) -> None:
    pytest.importorskip("shtab")
    script = shown("completion", shell)
    for word in ("extend", "--method.recalibration", "--head.ridge.features", "seq_lora", "glyphs"):
        assert word in script


def test_completion_knows_the_values_of_settings_with_few() -> None:
    choices = {name: values for name, (_, values) in setting_choices().items()}
    assert choices["--train.optimizer"] == ["sgd", "adam"]
    assert "o_lora" in choices["--method"]
    assert "paper/cub" in choices["--config"]
    assert choices["--train.lr"] == []


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437"])
def test_consoles_that_lack_a_character_get_another(run: Path, encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.cli", "report", run],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert "accuracy" in done.stdout.decode(encoding).lower()


def test_arguments_that_are_no_settings_have_one_usage(
    refused: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["--overwrite=true"], ["--overwrite", "--resume=x"], ["--allow=a.B"]):
        with pytest.raises(SystemExit):
            run_options(argv)
        assert capsys.readouterr().err.count("usage: loda train [PHOTOS]") == 1
    assert "--overwrite" in refused("sweep", "caltech101", "--out=x", "--dry-run", "--overwrite")


def test_a_printed_configuration_can_be_given_back(
    tmp_path: Path, shown: Callable[..., str]
) -> None:
    changes = ["--train.lr", "0.3", "--head.also", "[ridge]", "--data.crop_scale", "[0.1, 0.9]"]
    changes += ["--method", "sd_lora", "--method.parts", "qv"]
    printed = shown("train", *changes, "--print-config")
    path = tmp_path / "printed.yaml"
    path.write_text(printed, "utf-8")
    assert load_experiment(["--config", str(path)]) == load_experiment(changes)
    assert shown("train", "--config", path, "--print-config") == printed


def test_from_training_to_prediction(tmp_path: Path, root: Path, shown: Callable[..., str]) -> None:
    out = tmp_path / "run"
    experiment = tiny(root, out)
    assert f"results: {out}" in shown("train", *flags(experiment))
    assert read_experiment(out / "config.yaml") == resolved(experiment)

    printed = shown("eval", out)
    assert printed.startswith("nearest_mean: accuracy ")
    assert "of 18 images)" in printed

    images = [str(root / "test" / name / "0.png") for name in ("red", "blue")]
    lines = shown("predict", out, *images, "--top", "2").splitlines()
    assert [line.partition(": ")[0] for line in lines] == images
    assert lines[0].partition(": ")[2].startswith("red ")
    assert all(line.count(",") == 1 for line in lines)
    # More classes than there are: all of them.
    assert shown("predict", out, images[0], "--top", "99").count(",") == 5


def test_predictions_of_a_folder_go_to_a_table(
    run: Path, root: Path, tmp_path: Path, shown: Callable[..., str], refused: Callable[..., str]
) -> None:
    out = tmp_path / "p.csv"
    arguments = ["predict", run, root / "test", "--readout=heads", "--threshold=1", "--out", out]
    assert "18 images by heads (probabilities)" in shown(*arguments)
    lines = out.read_text("utf-8").splitlines()
    assert len(lines) == 19
    assert lines[0].startswith("image,answer,class_1,probability_1,class_2")
    assert all(",unknown," in line for line in lines[1:])
    assert "--overwrite" in refused(*arguments)
    shown(*arguments, "--overwrite")
    assert "parquet" in refused(*arguments[:-1], tmp_path / "p.xlsx")


def test_files_that_cannot_be_read_are_skipped_and_the_status_says_so(
    run: Path, root: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(root / "test" / "red", tmp_path / "photos")
    (folder / "bad.png").write_text("no image")
    (folder / "notes.txt").write_text("no image")
    status, said = says(["predict", str(run), str(folder)])
    assert status == 1
    assert str(folder / "bad.png") in said
    assert "notes.txt" in said
    status, said = says(["predict", str(run), str(folder / "bad.png")])
    assert status == 2
    assert "none of the 1 images" in said


def test_an_evaluation_is_drawn_and_written(
    run: Path, tmp_path: Path, shown: Callable[..., str], refused: Callable[..., str]
) -> None:
    figure, out = tmp_path / "c.png", tmp_path / "classes.csv"
    printed = shown("eval", run, "--figure", figure, "--out", out, "--readout", "heads")
    assert printed.count("as recorded") == len(READOUTS)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert len(out.read_text("utf-8").splitlines()) == 7
    assert "--overwrite" in refused("eval", run, "--figure", figure)
    # Before the images are looked for.
    missing = ("--root", tmp_path / "missing")
    assert "nearest_mean" in refused("eval", run, "--readout", "nearest", *missing)


PLUGIN = """
from training.methods.loda import LoDAMethod

class Mine(LoDAMethod):
    def __init__(self, *, twist: float = 0.5, **settings) -> None:
        super().__init__(**settings)
        self.twist = twist
"""


def test_a_run_of_a_method_of_ones_own_can_be_used_without_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: Callable[..., str]
) -> None:
    run, module = tmp_path / "run", tmp_path / "plugged_in.py"
    module.write_text(PLUGIN)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        own = ["--method=plugged_in.Mine", "--method.twist=2", "--method.rank=4"]
        shown("train", *flags(tiny(root, run)), *own)
    module.unlink()
    monkeypatch.delitem(sys.modules, "plugged_in")
    image = root / "test" / "red" / "0.png"
    assert "red" in shown("predict", run, image)
    assert "as recorded" in shown("eval", run)
    assert "plugged_in.Mine" in shown("report", run)
    assert "Checked" in shown("export", run, "--format=timm", "--out", tmp_path / "timm")
    assert "plugged_in" not in sys.modules


def test_the_module_runs_as_a_process(run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "training.cli", "eval", run],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "nearest_mean: accuracy" in done.stdout


@pytest.mark.parametrize("debug", [False, True])
def test_a_warning_is_one_line_unless_its_place_is_asked_for(
    debug: bool, run: Path, root: Path, tmp_path: Path
) -> None:
    images = shutil.copytree(root, tmp_path / "images")
    next((images / "test" / "red").iterdir()).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "training.cli", "eval", run, "--root", images],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LODA_DEBUG": "1" if debug else ""},
    )
    assert done.returncode == 0
    brief = [x for x in done.stderr.splitlines() if x.startswith("warning: the test images are")]
    assert len(brief) == (not debug)
    assert ("RuntimeWarning: the test images are" in done.stderr) == debug


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "no command fly"),
        (["train", "--train.lrr", "1"], "train.lrr"),
        (["train", "--train.lr", "fast"], "train.lr"),
        (["train", "--train.lr", "-1"], "train.lr must be positive"),
        (["train", "--method", "magic"], "magic"),
        (["train", "--method", "frozen", "--method.rank", "8"], "method.rank"),
        (["train", "stray"], "stray"),
        (["train", "--overwrite=true"], "--overwrite"),
        (["train", "--config", "no-such"], "no-such"),
        (["train", "--data=folder", "--data.root"], "data.root"),
        (["train", "--resume", "a", "--overwrite"], "--overwrite"),
        (["train", "--allow", "a.B"], "--allow"),
        (["train", "--resume", "/no/run"], "/no/run"),
        (["sweep", "digits", "--out", "x", "--workers", "0"], "--workers"),
        (["eval"], "required: RUN"),
        (["eval", "a", "--fast"], "no --fast"),
        (["predict", "a"], "required: FILE|FOLDER"),
        (["predict", "a", "b", "--top", "x"], "--top must be a whole number, got x"),
    ],
)
def test_bad_arguments(argv: list[str], said: str, refused: Callable[..., str]) -> None:
    assert said in refused(*argv)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--method.rank=17"], "17"),
        (["--method.target=*.none"], "*.none"),
        (["--data.image_size=8", "--data.resize=8"], "8 by 8 pixels"),
        (["--data.classes=9"], "data.classes"),
        (["--data.root=/no/such/folder"], "/no/such/folder"),
        (["--backbone.weights=/none.pth", "--backbone.pretrained=true"], "/none.pth"),
        (["--backbone.name=vit_tiniest"], "vit_tiniest"),
        (["--backbone.options={depth: deep}"], "backbone.options"),
    ],
)
def test_settings_that_cannot_work_end_at_once(
    tmp_path: Path, root: Path, extra: list[str], said: str, refused: Callable[..., str]
) -> None:
    experiment = tiny(root, tmp_path / "run")
    assert said in refused("train", *flags(experiment), *extra)
    assert not (tmp_path / "run").exists()


def test_errors_of_runs_and_images_are_one_line(
    run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    assert "no finished run" in refused("eval", tmp_path)
    (tmp_path / "a.png").write_text("text")
    assert str(tmp_path / "b.png") in refused("predict", run, tmp_path / "b.png")
    assert "top" in refused("predict", run, tmp_path / "a.png", "--top", 0)
    again = ["train", *flags(read_experiment(run / "config.yaml"))]
    assert "--overwrite" in refused(*again)
    (tmp_path / "file").write_text("")
    assert "which is a file" in refused(*again, f"--out={tmp_path / 'file'}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_an_output_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.cli", "sweep", "digits", "--dry-run", "--out", "x"]
    # As usual, the output is flushed only at the end.
    usual = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=usual, check=False
        )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("loda sweep: ")
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, env=usual, check=False
    )
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, "")


HUNGRY = """
import torch
from training.methods import Method

class Hungry(Method):
    def start(self, model, context):
        {}
"""


@pytest.mark.parametrize(
    "code", ["torch.empty(2**55)", "bytearray(2**60)", "raise torch.OutOfMemoryError('none left')"]
)
def test_a_lack_of_memory_is_one_line_with_a_cure(
    tmp_path: Path,
    root: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    (tmp_path / "hungry_by_tests.py").write_text(HUNGRY.format(code), "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "hungry_by_tests", raising=False)
    settings = [x for x in flags(tiny(root, tmp_path / "run")) if not x.startswith("--method")]
    said = refused("train", *settings, "--method=hungry_by_tests.Hungry")
    assert "out of memory" in said
    assert "train.batch_size" in said
    assert "\n" not in said


OUTWARD = ("x/../../../../victim", "/victim", "..")


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTWARD)
def test_no_command_writes_outside_of_what_it_is_told(
    copy: Path, tmp_path: Path, root: Path, shown: Callable[..., str], name: str
) -> None:
    """Names in a run or in a file of settings are anybody's; none leads out of a folder."""
    stranger = tmp_path / "a" / "b" / "c" / "run"
    shutil.copytree(copy, stranger)
    bundle = stranger.with_name("b.jsonl")
    shown("analyse", stranger, "--parts", "subspaces")
    for file in ("summary.json", "analysis.json"):
        text = (stranger / file).read_text("utf-8")
        for word in ("nearest_mean", "blocks.0.attn.qkv", "isolated"):
            text = text.replace(json.dumps(word), json.dumps(name))
        (stranger / file).write_text(text, "utf-8")
    victims = [folder / "victim.png" for folder in stranger.parents[:4]]
    for victim in victims:
        victim.write_text("mine")
    before = contents(tmp_path)
    out = stranger / "out"
    commands = [
        ["report", stranger, "--out", out],
        ["report", f"{name}={stranger}", "--out", out, "--overwrite"],
        ["bundle", f"{name}={stranger}", "--out", bundle],
        ["report", bundle, "--out", out, "--overwrite"],
        ["eval", stranger],
        ["predict", stranger, root / "test" / "red" / "0.png"],
        ["verify", stranger, "--export", out / "a.npz"],
        ["ranks", stranger],
        ["data", "check", root],
    ]
    for command in commands:
        says([str(word) for word in command])  # it may refuse
        after = contents(tmp_path)
        expected = {name for name in after if out in (tmp_path / name).parents}
        expected.add(str(bundle.relative_to(tmp_path)))
        assert {k: v for k, v in after.items() if k not in expected} == before, command
    assert (out / "report.html").is_file()


def test_named_files_are_replaced_only_where_that_is_asked_for(
    run: Path, tmp_path: Path, refused: Callable[..., str], shown: Callable[..., str]
) -> None:
    for command, option, name in (("report", "--figure", "a.png"), ("verify", "--export", "a.npz")):
        file = tmp_path / name
        file.write_text("mine")
        assert "--overwrite" in refused(command, run, option, file)
        assert file.read_text() == "mine"
        shown(command, run, option, file, "--overwrite")
        assert file.read_bytes() != b"mine"


def test_a_run_is_overwritten_where_that_is_asked_for(
    copy: Path, root: Path, shown: Callable[..., str]
) -> None:
    again = ["train", *flags(tiny(root, copy)), "--seed=7", "--data.tasks=1"]
    assert "results" in shown(*again, "--overwrite")
    assert "overwrite" not in (copy / "config.yaml").read_text("utf-8")
    assert read_experiment(copy / "config.yaml").seed == 7


def test_divergence_ends_with_status_2(
    tmp_path: Path, root: Path, refused: Callable[..., str]
) -> None:
    experiment = tiny(root, tmp_path / "run")
    extra = ["--train.lr=1e30", "--train.weight_decay=1e10"]
    said = refused("train", *flags(experiment), *extra)
    assert said.startswith("loda train: training diverged: in task 1, epoch 1")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODA_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["eval", "/no/such/run"])


@pytest.mark.parametrize("hidden", [EXTRA, ("timm", "rich")], ids=["all", "some"])
@pytest.mark.parametrize("command", [["train"], ["train", "--help"], ["eval", "run"]])
def test_a_base_install_says_what_is_missing(hidden: tuple[str, ...], command: list[str]) -> None:
    code = BASE_INSTALL.format(names=set(hidden))
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    missing = [name for name in cli._TRAIN if name in hidden]
    assert f"needs {', '.join(missing)}, which the base install leaves out" in done.stderr
    assert "pip install 'loda[train]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_base_install_has_help_and_version() -> None:
    code = BASE_INSTALL.format(names=set(EXTRA))
    for argument, said in (("--help", "COMMAND"), ("--version", version("loda"))):
        done = subprocess.run(
            [sys.executable, "-c", code, argument], capture_output=True, text=True, check=True
        )
        assert said in done.stdout


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("loda")
    if not script.exists():
        pytest.skip("the package is not installed as a command here")
    done = subprocess.run(
        [script, "--version"], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert done.stdout.strip() == f"loda {version('loda')}"


def test_ctrl_c_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stopped_by_tests.py").write_text(STOPPED, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    argv = ["train", "--method=stopped_by_tests.Stopped", f"--out={tmp_path / 'run'}"]
    assert cli.main([*argv, "--device=cpu"]) == 130
    assert capsys.readouterr().err.startswith("loda train: interrupted")


def test_a_finished_run_has_nothing_to_go_on_with(
    copy: Path, shown: Callable[..., str], refused: Callable[..., str]
) -> None:
    assert "finished" in shown("train", "--resume", copy, "--data.workers=0")
    assert "train.lr" in refused("train", "--resume", copy, "--train.lr=0.3")
    assert "method.name" in refused("train", "--resume", copy, "--method=o_lora")


def test_a_reader_that_has_enough_is_no_error(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as head does after its last line
    with os.fdopen(writing, "w", buffering=1) as out:
        monkeypatch.setattr("sys.stdout", out)
        assert cli.main(["report", str(run)]) == 141
    assert capsys.readouterr().err == ""


def test_data_that_moved_are_found(run: Path, tmp_path: Path, shown: Callable[..., str]) -> None:
    root = read_experiment(run / "config.yaml").data.options["root"]
    moved = shutil.copytree(str(root), tmp_path / "moved")
    assert shown("eval", run, "--root", moved) == shown("eval", run)


def test_report_and_verify_print_tables(run: Path, shown: Callable[..., str]) -> None:
    assert "| loda |" in shown("report", run)
    assert "checks passed" in shown("verify", run)
