"""Training in two processes: the weights of one, and an end of all when one ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import timm
import torch
from forked import status, together
from run_contents import events
from safetensors.torch import load_file, save_file
from small_runs import VIT, flags, squares, tiny, tree

from training.cli import main
from training.data import build_stream, loader, train_transform
from training.distributed import Processes, Share, launched_processes, usable_cpus
from training.run_dir import checkpoint_files, read_json

ROOT = Path(__file__).parents[1]
KEPT = ["--keep.moments=true", "--keep.branches=true", "--keep.heads=true"]
# With mini-batches of 5 and 2 images, two classes each, a rank often has none of a half.
QUICK: dict[str, list[str]] = {
    "loda": ["--head.also=[heads,ridge]", "--head.ridge.features=32", *KEPT],
    "loda-one-image": ["--train.batch_size=1", "--train.epochs=1", "--train.eval_batch_size=3"],
    "o_lora": ["--method=o_lora", "--method.gao=true"],
    "inflora": ["--method=inflora", "--data.workers=1"],
}
SLOW: dict[str, list[str]] = {
    "loda-random-heads": ["--head.start=random", "--train.lr=0.01"],
    "o_lora-plain": ["--method=o_lora"],
    "null_lora": ["--method=null_lora", "--train.lr=0.01"],
    "sd_lora": ["--method=sd_lora"],
    "seq_lora": ["--method=seq_lora"],
    "frozen": ["--method=frozen", "--head.readout=heads"],
}


def command(root: Path, out: Path, *settings: str) -> list[str]:
    own = flags(tiny(root, out))
    if "--method=frozen" in settings:
        own.remove("--method.rank=4")
    return ["train", *own, "--threads=1", *settings]


def assert_close(run: Path, expected: Path) -> None:
    """Whether all tensors of two runs are the same to rounding."""
    files = sorted(path.relative_to(expected) for path in expected.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(run) for path in run.rglob("*.safetensors"))
    for file in files:
        if file.name == "state.safetensors":  # what it holds is in the other files
            continue
        ours, theirs = load_file(run / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            scale = float(tensor.double().norm()) or 1.0
            apart = float((ours[name].double() - tensor.double()).norm())
            # Single directions of a subspace and regressions magnify what both are made from.
            sensitive = file.name == "branches.safetensors" or name.startswith("ridge")
            rounding = 1e-3 if sensitive else 2e-5
            assert apart <= rounding * scale, f"{file}, {name}: {apart / scale}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs in two processes, and their logs."""
    return in_two(QUICK, tmp_path_factory)


def in_two(wanted: dict[str, list[str]], factory: pytest.TempPathFactory) -> Path:
    root, folder = tree(factory), factory.mktemp("two")
    commands = [command(root, folder / name, *settings) for name, settings in wanted.items()]
    for process in together(commands, folder, watched=folder):
        code = status(process)
        assert code == 0, (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return folder


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("name", QUICK)
def test_two_processes_give_the_weights_of_one(
    name: str, runs: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert main(command(tree(tmp_path_factory), tmp_path / name, *QUICK[name])) == 0
    assert_same_run(runs / name, tmp_path / name)


@pytest.mark.slow
@pytest.mark.gate
def test_so_do_all_methods(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = in_two(SLOW, tmp_path_factory)
    for name, settings in SLOW.items():
        assert main(command(tree(tmp_path_factory), tmp_path / name, *settings)) == 0
        assert_same_run(folder / name, tmp_path / name)


def assert_same_run(run: Path, expected: Path) -> None:
    """Whether weights are the same to rounding, and what was counted is the same."""
    assert_close(run, expected)
    two, one = events(run), events(expected)
    assert len(two) == len(one)
    for ours, theirs in zip(two, one, strict=True):
        assert ours["event"] == theirs["event"]
        if ours["event"] == "epoch":
            assert ours["accuracy"] == theirs["accuracy"], "images that training got right"
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        elif ours["event"] == "task":
            assert ours["counts"] == theirs["counts"]
            moved = theirs["update"]["relative"] if "update" in theirs else None
            assert moved is None or ours["update"]["relative"] == pytest.approx(moved, rel=0.02)
    ours, theirs = (read_json(path / "summary.json") for path in (run, expected))
    assert ours["counts"] == theirs["counts"]


def test_one_process_writes_and_talks(runs: Path) -> None:
    first, second = ((runs / f"{rank}.log").read_text() for rank in range(2))
    assert first.count("changed") > 100
    assert "task 3/3: accuracy over all classes so far" in first
    assert second == ""


SIGNALLED = "own_methods.Signalled"


def test_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    root, run = squares(tmp_path / "data"), tmp_path / "run"
    long = command(root, run, f"--method={SIGNALLED}", "--checkpoint.steps=1")
    first, second = together([long], tmp_path, environment={"SIGNALLED": "8 SIGKILL process"})
    assert [status(first), status(second)] == [2, -signal.SIGKILL]
    said = (tmp_path / "0.log").read_text()
    assert "process 0 of 2 has lost the others" in said
    assert "Traceback" not in said
    # One process can go on with it, and comes to where it would have come.
    assert main(["train", "--resume", str(run), f"--allow={SIGNALLED}"]) == 0
    assert main(command(root, tmp_path / "whole")) == 0
    assert_close(run, tmp_path / "whole")


def test_a_signal_to_one_process_saves_and_ends_all(tmp_path: Path) -> None:
    root, run = squares(tmp_path / "data"), tmp_path / "run"
    signalled = command(root, run, f"--method={SIGNALLED}")
    processes = together([signalled], tmp_path, environment={"SIGNALLED": "8 SIGTERM process"})
    assert [status(process) for process in processes] == [143, 143]
    assert "a checkpoint was written" in (tmp_path / "0.log").read_text()
    assert not (run / "summary.json").exists()
    for process in together([["train", "--resume", str(run), f"--allow={SIGNALLED}"]], tmp_path):
        assert status(process) == 0
    assert main(command(root, tmp_path / "whole")) == 0
    assert_close(run, tmp_path / "whole")


def test_what_differs_between_processes_is_refused(tmp_path: Path) -> None:
    root = squares(tmp_path / "data")
    fewer = squares(tmp_path / "fewer", train=5)
    settings = [command(root, tmp_path / "run", f"--seed={seed}") for seed in (1, 2)]
    images = [command(data, tmp_path / "run") for data in (root, fewer)]
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        save_file(model.state_dict(), tmp_path / f"{seed}.safetensors")
        own = f"--backbone.weights={tmp_path / f'{seed}.safetensors'}"
        weights.append(command(root, tmp_path / "run", "--backbone.pretrained=true", own))
    pairs = ((settings, "settings"), (images, "images"), (weights, "backbone"))
    for (ours, theirs), what in pairs:
        (tmp_path / what).mkdir()
        for rank, process in enumerate(together([ours], tmp_path / what, others=[theirs])):
            assert status(process) == 2
            assert f"must have the same {what}" in (tmp_path / what / f"{rank}.log").read_text()
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_the_first_process_finds_ends_all(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    root = squares(tmp_path / "data")
    for process in together([command(root, tmp_path / "run")], tmp_path):
        assert status(process) == 2
    first, second = ((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert "is not empty" in first
    assert "process 0 has stopped" in second


def test_a_launcher_must_say_who_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, but RANK, .* torchrun"):
        launched_processes()
    with pytest.raises(SystemExit, match="2"):
        main(["report", "runs"])


def test_alone_nothing_is_waited_for() -> None:
    alone = Processes()
    weight = torch.ones(2, 3)
    for together_with_nobody in (alone.sum, alone.copy_from_first):
        together_with_nobody([weight])
    assert torch.equal(weight, torch.ones(2, 3))
    assert torch.equal(alone.gather_rows(weight, 2), weight)
    assert (alone.maximum(3), alone.from_first(lambda: "value")) == (3, "value")
    assert (alone.bounds(5), alone.even_bounds(5), alone.writes) == ((0, 5), (0, 5), True)
    alone.require_same("anything", object())
    alone.wait()


def test_the_processors_are_those_that_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); import training.distributed as d;"
    code += "print(d.usable_cpus())"
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system ties no process to processors")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert usable_cpus() >= 1


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_the_parts_of_mini_batches_are_those_of_one_process(
    count: int, batch: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    experiment = tiny(tree(tmp_path_factory), None)
    images = build_stream(experiment.data, 1).train.with_transform(train_transform(experiment.data))
    settings = {"shuffle": True, "seed": 4}
    whole = list(loader(images, batch, **settings))  # type: ignore[arg-type]
    parts = [
        list(loader(images, batch, share=Share(rank, count), cut=True, **settings))  # type: ignore[arg-type]
        for rank in range(count)
    ]
    passes = [
        torch.cat([x for x, _ in loader(images, batch, share=Share(rank, count), **settings)])  # type: ignore[arg-type]
        for rank in range(count)
    ]
    assert torch.equal(torch.cat(passes), torch.cat([x for x, _ in whole]))
    assert all(len(part) % 2 == 0 for part in passes[:-1])
    for (pixels, labels), *cut in zip(whole, *parts, strict=True):
        assert all(torch.equal(theirs, labels) for _, theirs in cut)
        assert torch.equal(torch.cat([x for x, _ in cut if x.numel()]), pixels)


def saved(run: Path) -> int:
    """Number of the newest checkpoint; older ones are gone soon."""
    return max((int(path.stem) for path in checkpoint_files(run)), default=0)


def launched(launcher: list[str], arguments: list[str], timeout: int) -> subprocess.Popen[str]:
    program = str(Path(sys.executable).parent / launcher[0])
    return subprocess.Popen(
        [program, *launcher[1:], "-m", "training.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LODA_TIMEOUT": str(timeout)},
    )


# Both find a free port themselves.
TORCHRUN = ["torchrun", "--nproc-per-node=2", "--standalone"]
ACCELERATE = ["accelerate", "launch", "--multi_gpu", "--num_machines=1", "--num_processes=2"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]


@pytest.mark.slow
@pytest.mark.gate
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_the_launchers(launcher: list[str], tmp_path: Path) -> None:
    root = squares(tmp_path / "data")
    done = launched(launcher, command(root, tmp_path / "two"), 240)
    said, _ = done.communicate()
    assert done.returncode == 0, said
    assert main(command(root, tmp_path / "one")) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_ends_when_a_process_does_not_answer(sent: signal.Signals, tmp_path: Path) -> None:
    root, run = squares(tmp_path / "data"), tmp_path / "run"
    long = command(root, run, "--train.epochs=50", "--checkpoint.steps=1")
    # A gone one is noticed at once; one that hangs, when the time is up. On a busy machine they
    # may begin many seconds apart.
    whole = launched(TORCHRUN, long, 240 if sent == signal.SIGKILL else 20)
    while saved(run) < 3:
        assert whole.poll() is None
        time.sleep(0.01)
    (second,) = (
        child
        for child in psutil.Process(whole.pid).children(recursive=True)
        if child.environ().get("RANK") == "1"
    )
    second.send_signal(sent)
    said, _ = whole.communicate()
    assert whole.returncode != 0
    assert "process 0 of 2 has lost the others" in said
    assert not second.is_running()
