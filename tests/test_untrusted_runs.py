"""Run folders and checkpoints of strangers: used or refused with clear words, never a crash."""

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import yaml
from commands import assert_clear, says
from hypothesis import given
from hypothesis import strategies as st
from interrupted import CutOff, at_step, end, stopped
from mangled import damaged, mangled
from run_contents import write_sealed
from safetensors.torch import load, save
from small_runs import finished, tiny, tree

from training import cli
from training.run_dir import read_tensors, write_tensors
from training.train import resume, train
from training.report.inside import inside_drawings
from training.report.runs import read_run
from training.checkpoint import newest_checkpoint, write_checkpoint

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "report": lambda run: ["report", str(run)],
    "verify": lambda run: ["verify", str(run)],
    "ranks": lambda run: ["ranks", str(run)],
    "predict": lambda run: ["predict", str(run), str(run / "accuracy.png")],
    "eval": lambda run: ["eval", str(run)],
    "analyse": lambda run: ["analyse", str(run), "--parts", "subspaces"],
}
# What each command reads; the first ones are drawn most often.
READS = {
    "report": ["summary.json", "metrics.jsonl", "classes.json", "environment.json", "config.yaml"],
    "verify": ["tasks/001/moments.safetensors", "tasks/001/branches.safetensors", "config.yaml"],
    "ranks": ["tasks/001/moments.safetensors", "tasks/000/moments.safetensors"],
    "predict": ["readouts.safetensors", "classes.json", "model.safetensors", "config.yaml"],
    "eval": ["classes.json", "config.yaml"],
    "analyse": ["tasks/001/branches.safetensors", "classes.json"],
}
SHAPES = [(), (0,), (1,), (3, 5), (16, 16), (1, 1, 1)]


@st.composite
def strange_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    """The tensors of a file with some of other shapes, types and values, or gone."""
    tensors = load(content)
    for name in draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=2)):
        kind = draw(st.sampled_from(["gone", "shape", "type", "nan", "renamed"]))
        tensor = tensors.pop(name, None)
        if tensor is None or kind == "gone":
            continue
        if kind == "shape":
            tensor = torch.ones(draw(st.sampled_from(SHAPES)))
        elif kind == "type":
            tensor = tensor.to(draw(st.sampled_from([torch.bool, torch.int8, torch.bfloat16])))
        elif kind == "nan" and tensor.is_floating_point() and tensor.numel():
            tensor = tensor.clone()
            tensor.view(-1)[0] = draw(st.sampled_from([float("nan"), float("inf"), 1e38]))
        tensors["../../x/../y" if kind == "renamed" else name] = tensor
    return save({k: v.contiguous() for k, v in tensors.items()})


@st.composite
def spoilt(draw: st.DrawFn, path: Path) -> bytes:
    """The content of a file as somebody else might have written it."""
    content = path.read_bytes()
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    if path.suffix == ".safetensors":
        return draw(strange_tensors(content))
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return b"\n".join(json.dumps(x).encode() for x in draw(mangled(lines)) or [])
    if path.suffix == ".yaml":
        return json.dumps(draw(mangled(yaml.safe_load(content)))).encode()  # JSON is YAML
    return json.dumps(draw(mangled(json.loads(content)))).encode()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and analysed run that may be spoilt file by file."""
    copy = tmp_path_factory.mktemp("strange") / "run"
    shutil.copytree(finished(tmp_path_factory), copy)
    assert cli.main(["analyse", str(copy)]) == 0
    return copy


@given(data=st.data())
def test_run_folders(run: Path, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    name = data.draw(st.sampled_from(READS[command]))
    before = (run / name).read_bytes()
    try:
        (run / name).write_bytes(data.draw(spoilt(run / name)))
        status, said = says(COMMANDS[command](run))
    finally:
        (run / name).write_bytes(before)
    assert_clear(command, status, said)


@given(data=st.data())
def test_analyses(run: Path, data: st.DataObject) -> None:
    before = (run / "analysis.json").read_bytes()
    try:
        (run / "analysis.json").write_bytes(data.draw(spoilt(run / "analysis.json")))
        with suppress(ValueError):
            assert all(words for _, _, _, words, _ in inside_drawings("run", [read_run(run)]))
    finally:
        (run / "analysis.json").write_bytes(before)


@given(data=st.data())
def test_records(run: Path, data: st.DataObject) -> None:
    path = run.parent / "records.jsonl"
    if not path.exists():
        assert cli.main(["export", str(run), "--out", str(path)]) == 0
    before = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoilt(path)))
        status, said = says(["report", str(path)])
    finally:
        path.write_bytes(before)
    assert_clear("report", status, said)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands inside its second task."""
    experiment = tiny(
        tree(tmp_path_factory), tmp_path_factory.mktemp("begun") / "run", checkpoint={"steps": 2}
    )
    run = stopped(experiment, 9)
    assert newest_checkpoint(run / "checkpoints").record["open"]["batch"] == 2
    return run


def goes_on(run: Path) -> None:
    """Resume, up to the next step; the folder is as it was afterwards."""
    with at_step(1, end), warnings.catch_warnings():
        # It may say that it is of another run.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            resume(run, quiet=True)
        except (ValueError, OSError, FloatingPointError) as error:
            if not str(error):
                raise
        except CutOff:
            pass


@given(data=st.data())
def test_checkpoints_with_sound_checksums(begun: Path, data: st.DataObject) -> None:
    # Whoever writes a checkpoint writes its checksums: they are no proof of who that was.
    with TemporaryDirectory() as folder:
        run = Path(shutil.copytree(begun, Path(folder, "run")))
        found = newest_checkpoint(run / "checkpoints")
        record, tensors = found.record, found.tensors
        if data.draw(st.booleans()):
            record = data.draw(mangled(record))
        else:
            tensors = load(data.draw(strange_tensors(save(dict(tensors)))))
        write_checkpoint(run / "checkpoints", tensors, record, found.metrics, keep=9)
        goes_on(run)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("history/blocks.0.attn.qkv", lambda t: t.to(torch.complex64), "torch.complex64"),
        ("history/blocks.0.attn.qkv", lambda t: t.to(torch.float8_e5m2), "torch.float8_e5m2"),
        ("history/blocks.0.attn.qkv", lambda t: t.to(torch.int32), "torch.int32"),
        ("new/blocks.0.attn.qkv", lambda t: t * torch.nan, "not finite"),
        ("norm.weight", lambda t: t * torch.inf, "not finite"),
        ("momentum_buffer", lambda t: torch.zeros(1, 4), "shape"),
    ],
)
def test_sealed_checkpoints_of_odd_numbers(
    begun: Path, tmp_path: Path, name: str, spoil: Callable[..., torch.Tensor], said: str
) -> None:
    run = Path(shutil.copytree(begun, tmp_path / "run"))
    found = newest_checkpoint(run / "checkpoints")
    key = next(key for key in found.tensors if key.endswith(name))
    tensors = {**found.tensors, key: spoil(found.tensors[key])}
    write_checkpoint(run / "checkpoints", tensors, found.record, found.metrics, keep=9)
    with pytest.raises(ValueError, match=said):
        resume(run, quiet=True)


@given(data=st.data())
def test_checkpoints_of_other_versions_and_odd_names(begun: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        run = Path(shutil.copytree(begun, Path(folder, "run")))
        newest = newest_checkpoint(run / "checkpoints").path
        copy = Path(shutil.copytree(newest, newest.with_name("000900")))
        path = copy / "checkpoint.json"
        content = json.loads(path.read_bytes())
        content.pop("sha256")
        spoilt = data.draw(mangled(content))
        if isinstance(spoilt, dict):  # whoever writes one seals it too
            write_sealed(path, spoilt)
        else:
            path.write_text(json.dumps(spoilt))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = newest_checkpoint(run / "checkpoints")
        assert found.path in (newest, copy)
        passed_over = [str(one.message) for one in caught]
        assert len(passed_over) == (found.path == newest)
        assert all("000900 is damaged" in said for said in passed_over)
        if found.path == copy and found.record != content["record"]:
            goes_on(run)


# The last one is what TensorBoard writes to.
LINKS = ["checkpoints", "tasks", "checkpoints/000001", "tasks/000", "loda"]


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_a_run_folder_are_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "000").mkdir(parents=True)
    write_tensors(outside / "000" / "dear.safetensors", {"a": torch.ones(2)})
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(outside, target_is_directory=True)
    (run / "config.yaml").write_text("seed: 1")
    experiment = tiny(tree(tmp_path_factory), run, overwrite=True)
    with pytest.raises(OSError, match=r"is a link; put what it stands for there"):
        train(experiment, quiet=True)
    assert list(read_tensors(outside / "000" / "dear.safetensors")) == ["a"]


def test_files_that_are_links_are_replaced_not_followed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dear, run = tmp_path / "dear", tmp_path / "run"
    dear.write_text("dear")
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "model.safetensors"):
        (run / name).symlink_to(dear)
    train(tiny(tree(tmp_path_factory), run, overwrite=True), quiet=True)
    assert dear.read_text() == "dear"
    (run / ".lock").symlink_to(dear)
    with pytest.raises(OSError, match=r"cannot write to the run folder"):
        train(tiny(tree(tmp_path_factory), run, overwrite=True), quiet=True)
    assert dear.read_text() == "dear"
