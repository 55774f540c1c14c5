"""Sweeps: what a file may say, what is planned, run, resumed and left alone."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from training import cli
from training.checkpoint import write_checkpoint
from training.config import as_recorded, dump_experiment, effective, read_experiment
from training.distributed import usable_cpus
from training.run_dir import FolderLock, held_by
from training.sweep import (
    Children,
    Job,
    Outcome,
    Sweep,
    can_resume,
    finished,
    job_state,
    packaged_sweeps,
    plan,
    read_groups,
    read_sweep,
    run_job,
    run_sweep,
    summarise,
    write_groups,
)


def sweep_file(folder: Path, content: object) -> Path:
    """A file that holds a sweep, or what is none."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def quiet(_: str) -> None:
    """Say nothing."""


# The file


LODA: dict[str, Any] = {"variants": ["loda"], "seeds": [1]}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ([1], "list"),
        ({"variants": ["loda"]}, "seeds"),
        (LODA | {"seed": 1}, "'seed'"),
        (LODA | {"settings": 3}, "settings"),
        (LODA | {"configs": "digits"}, "configs"),
        (LODA | {"variants": {}}, "variants"),
        (LODA | {"variants": [["loda"]]}, "variants"),
        *((LODA | {"variants": {name: {}}}, "letters") for name in ("../up", "-a", "logs")),
        (LODA | {"variants": {"loda": {}, "LoDA": {}}}, "different"),
        *((LODA | {"seeds": seeds}, "seeds") for seeds in ([1, 1], [-1], [True], ["1"])),
        *((LODA | {"groups": {"a": a}}, "groups") for a in (["ncm"], ["loda"] * 2, [], "loda")),
        (LODA | {"groups": ["loda"]}, "groups"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(content: object, word: str, tmp_path: Path) -> None:
    path = sweep_file(tmp_path, content)
    with pytest.raises(ValueError, match=word) as caught:
        read_sweep(path)
    assert str(path) in str(caught.value)


def test_plain_names_are_methods(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path, {"variants": ["frozen"], "seeds": [1]}))
    (job,) = plan(sweep, tmp_path)
    assert job.experiment.method.name == "frozen"


@pytest.mark.parametrize("name", packaged_sweeps())
def test_packaged_sweeps_are_sound(name: str, tmp_path: Path) -> None:
    # As the commands in their heads say: some come with data, some with a backbone.
    given = [] if name == "digits" or name.startswith("glyphs") else ["--data.root=x"]
    packaged = name in ("digits", "caltech101-cifar_vit", "caltech101-cifar_vit-trials")
    given += [] if packaged or name.startswith("glyphs") else ["--backbone.weights=y"]
    sweep = read_sweep(name)
    jobs = plan(sweep, tmp_path, given)
    assert len({job.folder for job in jobs}) == len(jobs) > 1
    if sweep.groups:
        assert {variant for part in sweep.groups.values() for variant in part} == {*sweep.variants}


def test_an_unknown_sweep_or_one_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caltech101, .*digits"):
        read_sweep("nothing")
    path = tmp_path / "sweep.yaml"
    path.write_text("variants:\n  a: {}\n  b: {}\n  a: {}\nseeds: [1]\n", "utf-8")
    with pytest.raises(ValueError, match="twice"):
        read_sweep(path)


def test_groups_are_kept_beside_the_runs(tmp_path: Path) -> None:
    groups = {"all": ["loda", "frozen"], "one": ["loda"]}
    write_groups(tmp_path / "out", groups)
    assert read_groups(tmp_path / "out") == groups
    write_groups(tmp_path / "out", None)  # another sweep on the folder, which has none
    assert read_groups(tmp_path / "out") == groups


# The plan


SWEEP = Sweep({"loda": {}, "plain": {"method": {"name": "seq_lora"}}}, [3, 4])


def test_every_variant_runs_with_every_seed(tmp_path: Path) -> None:
    jobs = plan(SWEEP, tmp_path, ["--method.rank=4"])
    assert [(j.experiment.method.name, j.experiment.seed, j.folder) for j in jobs] == [
        (method, seed, tmp_path / variant / f"seed{seed}")
        for seed in (3, 4)
        for method, variant in (("loda", "loda"), ("seq_lora", "plain"))
    ]
    assert {j.experiment.method.options["rank"] for j in jobs} == {4}


def test_options_on_the_command_line_are_for_the_methods_that_have_them(tmp_path: Path) -> None:
    sweep = Sweep({"loda": {}, "frozen": {"method.name": "frozen"}}, [0])
    loda, frozen = plan(sweep, tmp_path, ["--method.rank", "4", "--method.gao=false"])
    assert (loda.experiment.method.options["rank"], frozen.experiment.method.options) == (4, {})
    for flag in ("--method.rnak=4", "--seed=7"):  # what no method has, what the sweep sets
        with pytest.raises(ValueError, match=flag.removeprefix("--method.")[:4]):
            plan(sweep, tmp_path, [flag])


def test_a_part_of_the_variants_can_be_chosen(tmp_path: Path) -> None:
    jobs = plan(SWEEP, tmp_path, only=["plain"])
    assert [job.name for job in jobs] == ["plain, seed 3", "plain, seed 4"]
    with pytest.raises(ValueError, match="got other"):
        plan(SWEEP, tmp_path, only=["other"])


def test_the_command_line_wins_over_the_file_and_the_variant_over_both(tmp_path: Path) -> None:
    variants = {"a": {}, "b": {"train.lr": 0.5, "method": {"directions": "random"}}}
    sweep = Sweep(variants, [0], ["digits"], {"train": {"lr": 0.3, "epochs": 4}})
    a, b = plan(sweep, tmp_path, ["--train.lr=0.4"])
    assert (a.experiment.train.lr, b.experiment.train.lr) == (0.4, 0.5)
    assert a.experiment.train.epochs == 4
    assert b.experiment.method.options["directions"] == "random"


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"method.nme": "loda"}, "nme"),
        ({"method.name": "nothing"}, "seq_lora"),
        ({"train.lr": "fast"}, "lr"),
        ({"seed": 7}, "seed"),
        ({"out": "x"}, "out"),
        ({"tracker": b"x"}, "tracker"),
        # Options of methods too.
        ({"method": {"penalty": "big"}}, "penalty"),
        ({"method": {"penalty": None}}, "penalty"),
        ({"method": {"start": 1.0}}, "start"),
        ({"method": {"name": "sd_lora", "start": "high"}}, "start"),
        ({"method": {"name": "sd_lora", "parts": "qqq"}}, "parts"),
        ({"method": {"name": "frozen", "gao": True}}, "gao"),
    ],
)
def test_wrong_settings_are_found_before_anything_runs(
    own: dict[str, Any], word: str, tmp_path: Path
) -> None:
    sweep = Sweep({"fine": {}, "v": own}, [0], settings={"method.name": "o_lora"})
    with pytest.raises(ValueError, match=word) as caught:
        plan(sweep, tmp_path)
    assert str(caught.value).startswith("variant v: ")


# Running, with children that are no processes


class Fake(Children):
    """Children that start nothing: they leave a finished run, or fail where it cannot be built."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[Sequence[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def run(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, append: bool
    ) -> int:
        self.commands.append(command[5:])  # behind loda train
        self.environments.append(environment)
        return self.train(command[command.index("train") + 2], log)

    def train(self, source: str, log: Path) -> int:
        if not source.endswith(".yaml"):  # the folder of a resumed run
            Path(source, "summary.json").write_text("{}")
            return 0
        experiment = read_experiment(source)
        if experiment.method.options.get("target") == "nowhere":
            log.write_bytes(b"first\nno layer \xff matches  \n\n   \n")
            return 2
        begun(experiment)
        Path(str(experiment.out), "summary.json").write_text("{}")
        return 0


def begun(experiment: Any) -> Path:
    """The folder of a run that has begun."""
    folder = Path(experiment.out)
    folder.mkdir(parents=True, exist_ok=True)
    recorded = dump_experiment(as_recorded(effective(experiment)))
    (folder / "config.yaml").write_text(recorded, "utf-8")
    return folder


def interrupted(job: Job) -> Path:
    """The folder of a run that has begun and left a checkpoint."""
    folder = begun(job.experiment)
    write_checkpoint(folder, {}, {}, b"", keep=2)
    return folder


def planned(out: Path, *flags: str, **settings: Any) -> Job:
    """The only run of a sweep."""
    (job,) = plan(Sweep({"loda": settings}, [0]), out, flags)
    return job


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_sweep_skips_what_is_done_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    bad = {"method.target": "nowhere"}
    sweep = Sweep({"good": {}, "bad": bad, "frozen": {"method.name": "frozen"}}, [0])
    lines: list[str] = []
    outcomes = run_sweep(plan(sweep, tmp_path), tmp_path, tell=lines.append, children=Fake())
    assert [o.status for o in outcomes] == ["finished", "failed", "finished"]
    # The last line of its log that says anything.
    said = f"bad, seed 0: failed (no layer \ufffd matches; log: {tmp_path / 'logs/bad-seed0.log'})"
    assert said in lines
    again = Fake()
    outcomes = run_sweep(plan(sweep, tmp_path), tmp_path, tell=quiet, children=again)
    assert [o.status for o in outcomes] == ["done before", "failed", "done before"]
    assert len(again.commands) == 1
    assert summarise(outcomes) == (["2 of 3 runs are done"], ["failed: bad, seed 0"])


def test_an_unfinished_run_without_a_checkpoint_starts_again(tmp_path: Path) -> None:
    job, children = planned(tmp_path), Fake()
    begun(job.experiment)
    assert not finished(job)
    assert not can_resume(job)
    assert run_job(job, tmp_path, children=children).status == "finished"
    assert finished(job)
    config = tmp_path / "logs" / f"loda-seed0.{os.getpid()}.yaml"  # nobody else's, and removed
    assert children.commands == [["--config", str(config), "--overwrite-unfinished"]]
    assert not config.exists()


def test_a_run_that_another_sweep_finished_meanwhile_is_done(tmp_path: Path) -> None:
    class Late(Fake):
        def train(self, source: str, log: Path) -> int:
            super().train(source, log)  # by the other sweep
            return 2  # ours was refused

    assert run_job(planned(tmp_path), tmp_path, children=Late()).status == "done before"


@pytest.mark.parametrize("own", [None, "noted_images.Noting"])
def test_an_interrupted_run_goes_on(tmp_path: Path, own: str | None) -> None:
    settings = {"backbone": {"name": own}} if own else {}
    job, children = planned(tmp_path, **settings), Fake()
    interrupted(job)
    assert can_resume(job)
    # What decides nothing may differ.
    other = planned(tmp_path, **settings, **{"data.workers": 2, "checkpoint.steps": 9})
    assert run_job(other, tmp_path, children=children).status == "finished"
    allowed = [f"--allow={own}"] if own else []
    assert children.commands == [["--resume", str(job.folder), *allowed]]
    assert not can_resume(job)
    assert finished(job)


def test_an_unfinished_run_of_other_settings_is_not_replaced(tmp_path: Path) -> None:
    root = str(tmp_path / "images")
    images = {"data.name": "folder", "data.root": root, "data.resize": 8, "data.image_size": 8}
    children, run = Fake(), interrupted(planned(tmp_path, **images))
    before = contents(run)
    for name, value in (("train.lr", 0.7), ("device", "cpu"), ("data.root", "moved")):
        job = planned(tmp_path, **{**images, name: value})
        outcome = run_job(job, tmp_path, children=children)
        assert outcome.status == "failed"
        assert f"other values of {name}" in outcome.reason
    (run / "config.yaml").write_text("method: {", "utf-8")
    outcome = run_job(planned(tmp_path, **images), tmp_path, children=children)
    assert outcome.status == "failed"
    assert "cannot be read" in outcome.reason
    assert not children.commands
    assert contents(run) == {**before, "config.yaml": b"method: {"}
    # A run that nothing can go on from is replaced.
    for state in (run / "checkpoints").iterdir():
        state.write_bytes(state.read_bytes()[:-1])
    assert run_job(planned(tmp_path, **images), tmp_path, children=children).status == "finished"


def test_an_unfinished_run_goes_on_with_data_by_another_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    folder = ["--data=folder", "--data.resize=8", "--data.image_size=8"]
    interrupted(planned(tmp_path, *folder, f"--data.root={tmp_path / 'images'}"))
    monkeypatch.chdir(tmp_path)
    assert can_resume(planned(tmp_path, *folder, "--data.root=./images/../images"))


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    assert run_job(planned(tmp_path), tmp_path, children=Fake()).status == "finished"
    with pytest.raises(ValueError, match=r"train\.lr"):
        planned(tmp_path, **{"train.lr": 0.7})
    # What does not decide what is learned may differ.
    assert finished(planned(tmp_path, **{"method.heldout": False, "device": "cpu"}))


def test_a_finished_run_that_cannot_be_read_stops_no_other(tmp_path: Path) -> None:
    sweep = Sweep({"broken": {}, "frozen": {"method.name": "frozen"}}, [0])
    folder = tmp_path / "broken" / "seed0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: {", "utf-8")
    (folder / "summary.json").write_text("{}")
    jobs = plan(sweep, tmp_path)
    assert [job_state(job) for job in jobs] == ["unreadable", "to do"]
    said: list[str] = []
    outcomes = run_sweep(jobs, tmp_path, tell=said.append, children=Fake())
    assert [o.status for o in outcomes] == ["unreadable", "finished"]
    assert f"{folder} holds a finished run that cannot be read" in said[0]
    assert (folder / "config.yaml").read_text("utf-8") == "method: {"


def test_weights_and_data_by_another_path_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    (tmp_path / "images").mkdir()
    given = [
        "--data=folder",
        "--data.resize=8",
        "--data.image_size=8",
        "--backbone=vit_tiny_patch16_224",
    ]
    here = [f"--data.root={tmp_path / 'images'}", f"--backbone.weights={weights}"]
    job = planned(tmp_path, *given, *here)
    assert run_job(job, tmp_path, children=Fake()).status == "finished"
    recorded = f'{{"backbone": {{"weights_sha256": "{sha256(b"weights").hexdigest()}"}}}}'
    (job.folder / "environment.json").write_text(recorded, "utf-8")

    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    (tmp_path / "link").symlink_to(weights)
    copy = shutil.copy(weights, tmp_path / "copy.safetensors")
    for path in ("../weights.safetensors", "../link", copy):
        there = ["--data.root=../images", f"--backbone.weights={path}"]
        assert finished(planned(tmp_path, *given, *there))
    Path(copy).write_bytes(b"others")
    with pytest.raises(ValueError, match=r"backbone\.weights"):
        planned(tmp_path, *given, "--data.root=../images", f"--backbone.weights={copy}")


def test_a_run_at_which_another_process_is_has_not_failed(tmp_path: Path) -> None:
    jobs = plan(Sweep({"a": {}, "b": {}, "c": {}, "d": {}}, [0]), tmp_path)
    locks = {}
    for job in jobs[:2]:
        job.folder.mkdir(parents=True)
        locks[job.folder.parent.name] = FolderLock(job.folder)
    logs: list[str] = []

    class Busy(Fake):
        def train(self, source: str, log: Path) -> int:
            logs.append(log.name)
            locks["a"].release()  # the other process ends, with nothing to show for it
            if log.name == "c-seed0.log":  # and another one was faster than this
                jobs[2].folder.mkdir(parents=True)
                locks["c"] = FolderLock(jobs[2].folder)
                return 2
            return 0

    said: list[str] = []
    outcomes = run_sweep(jobs, tmp_path, tell=said.append, children=Busy())
    elsewhere = f"running elsewhere (process {os.getpid()})"
    assert said == [
        *(f"{name}, seed 0: {elsewhere}" for name in "abc"),
        "d, seed 0: finished",
        "a, seed 0: finished",  # looked at once more in the end
        *(f"{name}, seed 0: {elsewhere}" for name in "bc"),
    ]
    statuses = ["finished", "running elsewhere", "running elsewhere", "finished"]
    assert [o.status for o in outcomes] == statuses
    assert logs == ["c-seed0.log", "d-seed0.log", "a-seed0.log"]
    said, failures = summarise(outcomes)
    assert said == ["2 of 4 runs are done", "running elsewhere: b, seed 0; c, seed 0"]
    assert not failures


def test_a_job_that_a_cluster_stopped_is_not_done(tmp_path: Path) -> None:
    first, second = plan(Sweep({"loda": {}, "frozen": {}}, [1]), tmp_path)
    outcomes = [Outcome(first, "finished", tmp_path), Outcome(second, "stopped", tmp_path)]
    assert summarise(outcomes) == (["1 of 2 runs are done"], ["stopped: frozen, seed 1"])


def test_the_processors_that_may_be_used_are_shared_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    children = Fake()
    run_sweep([planned(tmp_path)], tmp_path, workers=2, tell=quiet, children=children)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # what is inherited wins
    run_sweep([planned(tmp_path / "b")], tmp_path, workers=2, tell=quiet, children=children)
    given = [environment["OMP_NUM_THREADS"] for environment in children.environments]
    assert given == [str(max(1, usable_cpus() // 2)), "5"]


def test_runs_are_side_by_side(tmp_path: Path) -> None:
    both = threading.Barrier(2)

    class Meeting(Fake):
        def train(self, source: str, log: Path) -> int:
            both.wait()  # each waits for the other to have begun
            return 0

    jobs = plan(SWEEP, tmp_path)
    outcomes = run_sweep(jobs, tmp_path, workers=2, tell=quiet, children=Meeting())
    assert [(o.job, o.status) for o in outcomes] == [(job, "finished") for job in jobs]


def test_an_error_of_the_sweep_starts_nothing_more(tmp_path: Path) -> None:
    def broken(_: str) -> None:
        msg = "disk full"
        raise OSError(msg)

    children = Fake()
    with pytest.raises(OSError, match="disk full"):
        run_sweep(plan(SWEEP, tmp_path), tmp_path, tell=broken, children=children)
    assert len(children.commands) == 1


def test_a_sweep_without_a_cluster_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["sweep", str(sweep_file(tmp_path, LODA)), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--engine", "slurm"]) == 2
    assert "srun" in capsys.readouterr().err
    for wrong in ({"timeout": 3}, {"timeout_min": "long"}):
        sweep_file(tmp_path, LODA | {"slurm": wrong})
        assert cli.main([*arguments, "--engine", "local"]) == 2
        said = capsys.readouterr().err
        assert "submitit" in said
        assert len(said.splitlines()) == 1


def test_a_dry_run_lists_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = sweep_file(tmp_path, LODA), tmp_path / "out"
    assert cli.main(["sweep", str(path), "--out", str(out), "--dry-run"]) == 0
    assert capsys.readouterr().out == f"loda, seed 1: to do ({out / 'loda' / 'seed1'})\n"
    assert not out.exists()


# Running, with real processes


# Starts a child that writes a file, and one more when it gets SIGTERM; then waits for it.
PARENT = """
import os, signal, sys, threading, time
from pathlib import Path
from training.sweep import Children
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup, which has it ignored
child = '''
import signal, sys
from pathlib import Path
def stop(*_):
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: Path(sys.argv[1], "twice").touch())
Path(sys.argv[1], "ready").touch()
while True:
    signal.pause()
'''
folder = Path(sys.argv[1])
command = [sys.executable, "-c", child, str(folder)]
try:
    with Children() as children:
        def begin():
            return children.run(command, folder / "log", os.environ, append=False)
        if "breaks" in sys.argv:
            threading.Thread(target=begin).start()
            while not (folder / "ready").exists():
                time.sleep(0.01)
            raise OSError("disk full")
        print(begin(), flush=True)
        children.leave()
finally:
    try:
        os.waitpid(-1, os.WNOHANG)
        (folder / "left").touch()
    except ChildProcessError:  # it has waited for all of them
        pass
"""


@contextmanager
def started(*command: str | Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive its test."""
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(there: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Wait as long as the process lives."""
    while not there():
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT), (signal.SIGHUP, 129)],
)
def test_a_signal_to_the_parent_alone_ends_its_children_first(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    with started("-c", PARENT, tmp_path) as process:
        wait_for((tmp_path / "ready").exists, process)
        process.send_signal(number)
        out, _ = process.communicate()
    assert process.returncode == status
    assert out == b"143\n"
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "left").exists()


def test_ctrl_c_in_a_terminal_reaches_a_child_once(tmp_path: Path) -> None:
    with started("-c", PARENT, tmp_path, start_new_session=True) as process:
        wait_for((tmp_path / "ready").exists, process)
        os.killpg(process.pid, signal.SIGINT)  # to all of the group, as a terminal does
        process.communicate()
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "left").exists()
    assert not (tmp_path / "twice").exists()


def test_an_error_leaves_no_child_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PARENT, tmp_path, "breaks"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "disk full" in done.stderr
    assert (tmp_path / "saved").exists()
    assert not (tmp_path / "left").exists()


def test_a_sweep_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from training import cli\n"
        f"cli.main(['sweep', 'digits', '--out', {str(tmp_path / 'out')!r}, '--dry-run'])\n"
        "print([name for name in ('torch', 'timm', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def small(root: Path) -> list[str]:
    """Settings of runs of about a second."""
    from small_runs import flags, tiny

    own = [flag for flag in flags(tiny(root, "x")) if not flag.startswith("--out")]
    return [*own, "--data.tasks=1"]


def test_runs_of_one_seed_see_the_same_classes_and_mini_batches(root: Path, tmp_path: Path) -> None:
    import noted_images

    from training.train import train

    # An aligned step would show the two halves of a mini-batch one by one.
    variants = {"seq_lora": {}, "loda": {"method.gao": False}, "frozen": {}}
    given = [flag for flag in small(root) if not flag.startswith(("--backbone", "--method"))]
    given += ["--backbone=noted_images.Noting", "--keep.figure=false"]
    sweep = Sweep({name: own | {"method.name": name} for name, own in variants.items()}, [5])
    mini_batches: list[str] = []
    for job in plan(sweep, tmp_path, given):
        noted_images.shown.clear()
        noted_images.trained.clear()
        train(job.experiment, quiet=True)
        mini_batches = mini_batches or [*noted_images.trained]
        others = iter(noted_images.shown)  # moments and evaluations among them
        assert all(batch in others for batch in mini_batches), job.name
    assert len(set(mini_batches)) > 2
    classes = {(tmp_path / name / "seed5" / "classes.json").read_bytes() for name in variants}
    assert len(classes) == 1


@pytest.mark.slow
@pytest.mark.gate
def test_runs_have_processes_of_their_own_and_logs(root: Path, tmp_path: Path) -> None:
    sweep = Sweep({"good": {}, "bad": {"method.target": "nowhere"}}, [0])
    lines: list[str] = []
    jobs = plan(sweep, tmp_path, small(root))
    outcomes = run_sweep(jobs, tmp_path, workers=2, tell=lines.append)
    assert [o.status for o in outcomes] == ["finished", "failed"]
    (said,) = [line for line in lines if "failed" in line]
    assert "matches no linear layer" in said
    assert str(tmp_path / "logs" / "bad-seed0.log") in said
    assert "task 1/1" in outcomes[0].log.read_text()
    assert finished(jobs[0])


@pytest.mark.slow
def test_submitit_runs_a_sweep(tmp_path: Path) -> None:
    job = planned(tmp_path, **{"method.target": "nowhere"})
    outcomes = run_sweep([job], tmp_path, engine="local", slurm={"timeout_min": 60}, tell=quiet)
    assert [o.status for o in outcomes] == ["failed"]
    assert "matches no linear layer" in outcomes[0].log.read_text()


@pytest.mark.slow
@pytest.mark.gate
def test_a_stopped_sweep_leaves_runs_that_go_on(root: Path, tmp_path: Path) -> None:
    long = [*small(root), "--train.epochs=5000"]
    path, out = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text("variants: [loda, seq_lora]\nseeds: [0]\n", "utf-8")
    jobs = plan(read_sweep(path), out, long)
    with started("-m", "training.cli", "sweep", path, f"--out={out}", *long) as process:
        wait_for((jobs[0].folder / "metrics.jsonl").is_file, process)
        # Meanwhile a second sweep would leave the run to the first.
        assert [job_state(job) for job in jobs] == ["running elsewhere", "to do"]
        owner = held_by(jobs[0].folder)
        assert run_job(jobs[0], out)[1::2] == ("running elsewhere", f"process {owner}")
        process.send_signal(signal.SIGTERM)
        printed, errors = process.communicate()
    assert process.returncode == 143, errors
    assert b"SIGTERM: stopping as soon as every run is saved" in errors
    assert printed == b"loda, seed 0: stopped (start the sweep again to resume it)\n"
    assert held_by(jobs[0].folder) is None
    assert can_resume(jobs[0])
    assert not jobs[1].folder.exists()
