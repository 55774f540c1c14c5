"""Files from anybody: each works or is refused in one clear line, and none runs code.

Configurations, sweeps, images, arrays, weights, run folders and checkpoints, damaged or with odd
content; and nothing outside a run folder is touched through one.
"""

import io
import json
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial, reduce
from itertools import pairwise
from operator import getitem
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import assert_clear, says
from hypothesis import example, given
from hypothesis import strategies as st
from interrupted import CutOff, at_step, end, stopped
from mangled import DEEP, ODD, damaged, mangled, places
from PIL import Image
from run_contents import resealed, set_in_config
from safetensors.torch import load, save
from small_runs import COLOURS, finished, flags, small_vit, squares, tiny, tree

from training import cli
from training.backbones.weights import load_weights
from training.checkpoint import newest_checkpoint, read_checkpoint, write_checkpoint, write_state
from training.config import (
    DataConfig,
    Experiment,
    begun_experiment,
    dump_experiment,
    experiment_from,
    read_experiment,
)
from training.data import UnreadableImageError, open_image
from training.data.datasets import walk_classes
from training.report.figures import drawings
from training.report.runs import by_section, read_run
from training.run_dir import RunFolder, read_tensors, write_tensors
from training.sweep import plan, read_sweep
from training.train import prepare, resume, run_to_end, train

# Configurations and sweeps

CONFIG: Any = yaml.safe_load(dump_experiment(Experiment()))
SWEEP: Any = {
    "configs": ["digits"],
    "settings": {"head.start": "class_mean"},
    "seeds": [1, 2],
    "variants": {"loda": {}, "plain": {"method": {"name": "seq_lora", "rank": 4}}},
    "slurm": {"timeout_min": 6},
}
# What yaml.dump would not write: other languages, code, and texts that grow as they are read.
TEXTS = [
    "[" * 3000,
    "{a: " * 3000,
    "- " * 3000 + "x",
    "a: !!python/object/apply:os.system ['false']",
    "seed: !!python/name:os.system",
    "a: &a [x, x]\n"
    + "".join(
        f"{c}: &{c} [*{p}, *{p}]\n"
        for p, c in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu", strict=True)
    ),
    "backbone: {options: &o {a: *o}}",
    "&a [*a]",
    "seed: 1\nseed: 2",
    "base: base",
    "base: ../../../../etc/passwd",
    "base: [a]",
    "base: {a: b}: c",
    "base: '",
    "\t- a\n b:",
    "seed: 9" * 2000,
    "seed: " + "9" * 6000,
    "train: {lr: 0x" + "f" * 400 + "}",
    "train.lr: 0.1",
    "config: a.yaml",
    "{}",
    "",
    "\ufeffseed: 3",
    "seed: 2001-01-01",
    "? [a]\n: b",
    "print_config: true",
    "help: true",
]


def ends_clearly(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that may refuse, but not crash; what it says then."""
    capsys.readouterr()
    status = cli.main(arguments)
    said = capsys.readouterr().err
    assert_clear(arguments[0], status, said)
    return said


def works_or_refuses(path: Path, read: Any) -> None:
    with suppress(ValueError, OSError):
        read(path)


texts = (
    st.sampled_from(TEXTS).map(str.encode)
    | mangled(CONFIG).map(lambda x: yaml.safe_dump(x, allow_unicode=True).encode())
    | damaged(dump_experiment(Experiment()).encode())
    | st.text(max_size=60).map(str.encode)
)


@given(texts)
def test_configurations(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_bytes(text)
    works_or_refuses(path, read_experiment)


def test_sections_that_are_no_mappings() -> None:
    for *keys, last in filter(None, places(CONFIG)):
        for odd in (None, -1, []):
            content: Any = json.loads(json.dumps(CONFIG))
            section = reduce(getitem, keys, content)
            if isinstance(section[last], dict):
                section[last] = odd
                with suppress(ValueError):
                    experiment_from(content, "config.yaml")


@pytest.mark.parametrize("text", TEXTS)
def test_configurations_that_are_hard_to_read(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "base.yaml"
    path.write_bytes(text.encode())
    works_or_refuses(path, read_experiment)
    works_or_refuses(path, read_sweep)
    ends_clearly(["sweep", str(path), "--out", str(tmp_path / "out"), "--dry-run"], capsys)


sweeps = mangled(SWEEP).map(lambda x: yaml.safe_dump(x, allow_unicode=True).encode()) | damaged(
    yaml.safe_dump(SWEEP).encode()
)


@given(sweeps)
def test_sweeps(tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "sweep.yaml"
    path.write_bytes(text)
    out = tmp_path_factory.getbasetemp() / "sweep"

    def read(path: Path) -> None:
        for job in plan(read_sweep(path), out):
            assert out in job.folder.parents

    works_or_refuses(path, read)


# Images

PIXELS = DataConfig("folder", {"root": "x"}, resize=8)


def image(kind: str, **how: Any) -> bytes:
    rng = np.random.default_rng(0)
    content = io.BytesIO()
    pixels = Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8))
    pixels.save(content, kind, **how)
    return content.getvalue()


IMAGES = {
    "BMP": image("BMP"),
    "GIF": image("GIF"),
    "JPEG": image("JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00"),
    "JPEG2000": image("JPEG2000"),
    "PNG": image("PNG"),
    "PPM": image("PPM"),
    "TIFF": image("TIFF", compression="tiff_lzw"),
    "WEBP": image("WEBP"),
}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@given(st.sampled_from(sorted(IMAGES)).flatmap(lambda kind: damaged(IMAGES[kind])))
@example(EPS)
@example(b"")
def test_images(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "image.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of odd metadata and decodes all the same
        try:
            said = str([*open_image(path, PIXELS).shape])
        except UnreadableImageError as error:
            said = str(error)
        assert said == "[3, 8, 8]" or str(path) in said


@pytest.mark.parametrize("kind", sorted(IMAGES))
def test_every_kind_of_image_is_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(IMAGES[kind])
    assert open_image(path, PIXELS).shape == (3, 8, 8)


def test_no_image_starts_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(EPS)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("it did"))
    with pytest.raises(UnreadableImageError, match="not an image of a format"):
        open_image(path, PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
def test_a_small_file_that_claims_to_be_huge_is_refused(tmp_path: Path, kind: str) -> None:
    content, side = bytearray(IMAGES[kind]), (60000).to_bytes(4, "big")
    if kind == "PNG":
        content[16:24] = side + side
        content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    elif kind == "GIF":
        content[6:10] = b"\x60\xea\x60\xea"
    else:
        content[18:26] = side[::-1] + side[::-1]
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match="limit"):
        open_image(path, PIXELS)


# Arrays for loda verify

ARRAYS: Any = {
    "0/blocks.0/moment_new": np.eye(6) + 1,
    "0/blocks.0/moment_old": np.diag(np.arange(1.0, 7)),
    "0/blocks.0/A_general": np.eye(6)[:2],
    "0/blocks.0/B_general": np.ones((4, 2)),
    "0/blocks.0/A_isolated": np.eye(6)[2:4],
    "0/blocks.0/B_isolated": np.ones((4, 2)),
    "0/blocks.0/moment_new_trained": np.eye(6),
    "0/blocks.0/qkv_before": np.zeros((4, 6)),
    "0/blocks.0/qkv_after": np.ones((4, 6)),
    "0/blocks.0/coefficients": np.eye(2),
    "settings": np.array(json.dumps({"gamma": 3.0, "form": "full"})),
}
STRANGE: Any = [
    np.array(3.0),
    np.array([]),
    np.zeros((0, 0)),
    np.zeros((6, 6)),
    np.full((6, 6), np.nan),
    np.full((6, 6), 1e308),
    np.full((2, 6), 1e-320),
    np.eye(5),
    np.eye(6) * 1j,
    np.eye(6, dtype=bool),
    np.eye(6, dtype=np.uint8),
    np.eye(6, dtype=np.float16),
    np.eye(6).astype("M8[s]"),
    np.array([["a"] * 6] * 6),
    np.zeros((6, 6), dtype=[("a", "f4"), ("b", "i4")]),
    -np.eye(6),
    np.ones((1, 6, 6)),
    np.triu(np.ones((6, 6))),
    *(np.array(json.dumps(odd)) for odd in ODD if odd is not DEEP),
    *(np.array(json.dumps({"gamma": odd})) for odd in ODD[:12]),
    np.array("[" * 3000),
    np.array(b"{}"),
]


def archive(arrays: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    arrays = dict(ARRAYS)
    for name in draw(st.lists(st.sampled_from(sorted(ARRAYS)), max_size=3)):
        if draw(st.booleans()):
            arrays.pop(name, None)
        else:
            arrays[name] = draw(st.sampled_from(STRANGE))
    content = archive(arrays)
    return draw(damaged(content)) if draw(st.integers(0, 2)) == 0 else content


@given(archives())
def test_arrays_to_verify(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "arrays.npz"
    path.write_bytes(content)
    assert_clear("verify", *says(["verify", str(path)]))


def test_an_archive_that_claims_to_be_huge_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bomb.npz"
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000000), }"
    header += b" " * (117 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        name = "0/blocks.0/moment_new.npy"
        file.writestr(name, b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    assert "cannot read" in ends_clearly(["verify", str(path)], capsys)


# Weights


def weights(kind: str) -> bytes:
    tensors, content = small_vit().state_dict(), io.BytesIO()
    if kind == "safetensors":
        return save(tensors)
    if kind == "pth":
        torch.save({"state_dict": tensors}, content)
        return content.getvalue()
    return archive({name: tensor.numpy() for name, tensor in tensors.items()})


WEIGHTS = {kind: weights(kind) for kind in ("npz", "pth", "safetensors")}


@given(st.sampled_from(sorted(WEIGHTS)), st.data())
def test_weights(tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / f"weights.{kind}"
    path.write_bytes(data.draw(damaged(WEIGHTS[kind])))
    works_or_refuses(path, partial(load_weights, small_vit()))


@pytest.mark.parametrize("odd", [torch.zeros(16, dtype=torch.cfloat), torch.zeros(16).to("meta")])
def test_weights_that_are_no_real_numbers(tmp_path: Path, odd: torch.Tensor) -> None:
    path, model = tmp_path / "weights.pth", small_vit()
    torch.save({**model.state_dict(), "norm.bias": odd}, path)
    with pytest.raises(ValueError, match=r"norm\.bias"):
        load_weights(model, path)


class Evil:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


def test_no_pickle_is_ever_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, path = tmp_path / "trace", tmp_path / "evil.npz"
    evil: Any = np.array([Evil(trace)], dtype=object)
    np.savez(path, **{"0/blocks.0/moment_new": evil}, allow_pickle=True)
    assert "cannot read" in ends_clearly(["verify", str(path)], capsys)
    torch.save({"state_dict": Evil(trace)}, tmp_path / "evil.pth")
    run = ["--data=digits", f"--backbone.weights={tmp_path / 'evil.pth'}"]
    model = ["--backbone=vit_tiny_patch16_224", f"--out={tmp_path / 'run'}"]
    assert "more than tensors" in ends_clearly(["train", *run, *model], capsys)
    assert not trace.exists()


def test_weights_that_unpack_to_far_more_than_their_size(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    plain = io.BytesIO()
    torch.save({"norm.bias": torch.zeros(2**18)}, plain)
    with zipfile.ZipFile(plain) as given, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in given.infolist():
            file.writestr(member.filename, given.read(member))
        # Zeros that nothing refers to, in blocks so that this test needs little memory.
        with file.open("archive/data/9", "w", force_zip64=True) as zeros:
            for _ in range(1100):
                zeros.write(bytes(2**20))
    with pytest.raises(ValueError, match="unpack"):
        load_weights(small_vit(), path)


# What is printed

NAMES = {
    "escape": "\x1b[2K\x1b[1;31mred\x1b]0;title\x07",
    "return": "red\rloda: done",
    "lines": "red\nresults: /etc",
    "direction": "red\u202egnp.\u2066x",
    "hidden": "re\u200bd\u2028x\x85y",
    "html": "<img src=x onerror=alert(1)> [a](b) |",
}


def printable(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_names_of_classes_and_files_are_printed_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = squares(tmp_path / "squares")
    for colour, name in zip(COLOURS, NAMES.values(), strict=True):
        for split in ("train", "test"):
            (root / split / colour).rename(root / split / name.replace("/", "∕"))
    run, image = tmp_path / "run", tmp_path / "\x1b[2J\n.png"
    shutil.copy(next(root.rglob("0.png")), image)
    (root / "train" / "note\x1b[31m.txt").touch()
    said = ""
    for arguments in (
        ["data", "check", str(root)],
        ["train", *flags(tiny(root, run))],
        ["predict", str(run), str(image)],
        ["predict", str(run), str(image), "--top=6"],
        ["eval", str(run)],
        ["report", f"a\x1b[31m\n<b>={run}"],
        ["report", str(run), f"--out={tmp_path / 'rep'}"],
        ["train", "--resume", str(run)],
    ):
        assert cli.main(arguments) == 0
        said += "".join(capsys.readouterr())
    assert cli.main(["predict", str(run), str(tmp_path / "\x1b[31m")]) == 2
    said += "".join(capsys.readouterr())
    assert printable(said)
    assert r"red\rloda: done" in said
    for name in ("tables.md", "tables.tex"):
        assert printable((tmp_path / "rep" / name).read_text("utf-8"))


# What would never end


def test_links_that_lead_to_one_folder_in_millions_of_ways(tmp_path: Path) -> None:
    root = squares(tmp_path / "squares", train=2, test=1)
    levels = [tmp_path / "store" / str(number) for number in range(22)]
    for level in levels:
        level.mkdir(parents=True)
    for level, below in pairwise(levels):
        (level / "a").symlink_to(below)
        (level / "b").symlink_to(below)
    shutil.copy(root / "train" / "red" / "0.png", levels[-1] / "deep.png")
    (root / "train" / "red" / "more").symlink_to(levels[0])
    walks, _ = walk_classes(root / "train")
    assert [path.name for path in walks["red"].images] == ["0.png", "1.png", "deep.png"]
    assert len(walks["red"].loops) == 21  # the second way at every level


@pytest.mark.parametrize("setting", ["threads", "data.workers"])
def test_numbers_of_threads_and_processes_are_bounded(
    setting: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setting in says(["train", f"--{setting}=100000"])[1]
    content = yaml.safe_load((copy / "config.yaml").read_text("utf-8"))
    *section, name = setting.split(".")
    reduce(getitem, section, content)[name] = 100_000
    (copy / "config.yaml").write_text(yaml.safe_dump(content), "utf-8")
    assert setting in ends_clearly(["eval", str(resealed(copy))], capsys)


# Run folders

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "report": lambda run: ["report", str(run)],
    "verify": lambda run: ["verify", str(run)],
    "ranks": lambda run: ["ranks", str(run)],
    "predict": lambda run: ["predict", str(run), str(run / "accuracy.png")],
    "eval": lambda run: ["eval", str(run)],
    "analyse": lambda run: ["analyse", str(run), "--parts", "subspaces"],
    "extend": lambda run: [
        *("extend", str(run), str(run.parent / "new")),
        *("--out", str(run.parent / "extended"), "--overwrite"),
    ],
}
# What each command reads; the first ones are drawn most often.
READS = {
    "report": ["summary.json", "metrics.jsonl", "classes.json", "environment.json", "config.yaml"],
    "verify": ["tasks/002/moments.safetensors", "tasks/002/branches.safetensors", "config.yaml"],
    "ranks": ["tasks/002/moments.safetensors", "tasks/001/moments.safetensors"],
    "predict": ["readouts.safetensors", "classes.json", "model.safetensors", "config.yaml"],
    "eval": ["classes.json", "config.yaml"],
    "analyse": ["tasks/002/branches.safetensors", "classes.json"],
    "extend": ["environment.json", "classes.json", "state.safetensors", "config.yaml"],
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
        lines = draw(mangled(lines))
        return b"\n".join(
            json.dumps(x).encode() for x in (lines if isinstance(lines, list) else [lines])
        )
    if path.suffix == ".yaml":
        return json.dumps(draw(mangled(yaml.safe_load(content)))).encode()  # JSON is YAML
    return json.dumps(draw(mangled(json.loads(content)))).encode()


@pytest.fixture(scope="module")
def analysed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and analysed run that may be spoilt file by file."""
    copy = tmp_path_factory.mktemp("strange") / "run"
    shutil.copytree(finished(tmp_path_factory), copy)
    for split in ("train", "test"):  # photos of a class that it does not know
        photos = tree(tmp_path_factory) / split / "red"
        shutil.copytree(photos, copy.parent / "new" / split / "black")
    assert cli.main(["analyse", str(copy)]) == 0
    return copy


@given(data=st.data())
def test_run_folders(analysed: Path, data: st.DataObject) -> None:
    command = data.draw(st.sampled_from(sorted(COMMANDS)))
    path = analysed / data.draw(st.sampled_from(READS[command]))
    before = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoilt(path)))
        if data.draw(st.booleans()):  # else the manifest tells
            resealed(analysed)
        status, said = says(COMMANDS[command](analysed))
    finally:
        path.write_bytes(before)
        resealed(analysed)
    assert_clear(command, status, said)


@given(data=st.data())
def test_analyses(analysed: Path, data: st.DataObject) -> None:
    path = analysed / "analysis.json"
    before = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoilt(path)))
        with suppress(ValueError):
            (section,) = by_section([read_run(analysed)])
            assert all(drawing.alt for drawing in drawings(section))
    finally:
        path.write_bytes(before)


@given(data=st.data())
def test_bundles(analysed: Path, data: st.DataObject) -> None:
    path = analysed.parent / "bundle.jsonl"
    if not path.exists():
        assert cli.main(["bundle", str(analysed), "--out", str(path)]) == 0
    before = path.read_bytes()
    try:
        path.write_bytes(data.draw(spoilt(path)))
        status, said = says(["report", str(path)])
    finally:
        path.write_bytes(before)
    assert_clear("report", status, said)


@pytest.mark.parametrize("section", ["data", "backbone", "method", "head"])
def test_no_class_that_a_run_names_is_imported_unasked(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    trace = tmp_path / "trace"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Evil: pass\n"
    (tmp_path / "evil.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    set_in_config(copy, section, **{"readout" if section == "head" else "name": "evil.Evil"})
    statuses = {}
    for command, arguments in COMMANDS.items():
        statuses[command], said = says(arguments(copy))
        assert_clear(command, statuses[command], said)
    assert not trace.exists()
    assert statuses["eval"] == (0 if section == "method" else 2)
    says([*COMMANDS["eval"](copy), "--allow", "evil.Evil"])
    assert trace.exists()
    sys.modules.pop("evil", None)


# Checkpoints


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands inside its second task."""
    out = tmp_path_factory.mktemp("begun") / "run"
    run = stopped(tiny(tree(tmp_path_factory), out, checkpoint={"steps": 2}), 9)
    assert newest_checkpoint(run).record["open"]["batch"] == 2
    return run


def goes_on_or_refuses(path: Path) -> None:
    """Resume, up to the next step."""
    with warnings.catch_warnings():
        # It may say that it is of another run.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            run = prepare(begun_experiment(path), resume_from=path)
            run.on_step = at_step(1, end)
            run_to_end(run, quiet=True)
        except (ValueError, OSError, FloatingPointError) as error:
            if not str(error):
                raise
        except CutOff:
            pass


@given(data=st.data())
def test_checkpoints_with_sound_checksums(begun: Path, data: st.DataObject) -> None:
    # Whoever writes a checkpoint writes its checksum: it is no proof of who that was.
    with TemporaryDirectory() as folder:
        run = Path(shutil.copytree(begun, Path(folder, "run")))
        newest = newest_checkpoint(run)
        record, tensors = newest.record, newest.tensors
        if data.draw(st.booleans()):
            record = data.draw(mangled(record))
        else:
            tensors = load(data.draw(strange_tensors(save(dict(tensors)))))
        write_checkpoint(run, tensors, record, newest.metrics, keep=9)
        goes_on_or_refuses(run)


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
    newest = newest_checkpoint(run)
    key = next(key for key in newest.tensors if key.endswith(name))
    tensors = {**newest.tensors, key: spoil(newest.tensors[key])}
    write_checkpoint(run, tensors, newest.record, newest.metrics, keep=9)
    with pytest.raises(ValueError, match=said):
        resume(run, quiet=True)


@given(data=st.data())
def test_damaged_checkpoints_are_passed_over(begun: Path, data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        run = Path(shutil.copytree(begun, Path(folder, "run")))
        sound = newest_checkpoint(run).path
        copy = sound.with_name("000900.safetensors")
        copy.write_bytes(data.draw(damaged(sound.read_bytes())))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            newest = newest_checkpoint(run)
        assert newest.path in (sound, copy)
        assert len(caught) == (newest.path == sound)
        assert all("000900" in str(warning.message) for warning in caught)


# What is outside a run folder

# The last one is what TensorBoard writes to.
LINKS = ["checkpoints", "tasks", "tasks/001", "loda"]


@pytest.mark.parametrize("name", LINKS)
def test_links_out_of_a_run_folder_are_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "001").mkdir(parents=True)
    write_tensors(outside / "001" / "dear.safetensors", {"a": torch.ones(2)})
    write_state(outside / "000001.safetensors", {"a": torch.ones(2)}, {}, b"")
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(outside, target_is_directory=True)
    (run / "config.yaml").write_text("seed: 1")
    resealed(run)
    with pytest.raises(OSError, match="symbolic link"):
        train(tiny(tree(tmp_path_factory), run), overwrite=True, quiet=True)
    assert list(read_tensors(outside / "001" / "dear.safetensors")) == ["a"]
    assert list(read_checkpoint(outside / "000001.safetensors").tensors) == ["a"]


def test_files_that_are_links_are_replaced_not_followed(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    dear, run = tmp_path / "dear", tmp_path / "run"
    dear.write_text("dear")
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "manifest.json"):
        (run / name).symlink_to(dear)
    experiment = tiny(tree(tmp_path_factory), run)
    train(experiment, overwrite=True, quiet=True)
    assert dear.read_text() == "dear"
    (run / ".lock").symlink_to(dear)
    with pytest.raises(OSError, match="cannot write"):
        train(experiment, overwrite=True, quiet=True)
    assert dear.read_text() == "dear"


def test_what_a_killed_process_had_half_written_is_removed_and_nothing_else(copy: Path) -> None:
    half = [
        copy / ".model.safetensors.12.tmp",
        copy / "tasks" / "001" / ".heads.safetensors.12.tmp",
        *(folder / ".tmpAb12Cd" for folder in (copy, copy / "tasks" / "001")),  # of safetensors
    ]
    mine = copy / ".mine.tmp"
    for path in (*half, mine):
        path.write_bytes(b"half a file")
    RunFolder(copy, resume=True).close()
    assert not any(path.exists() for path in half)
    assert mine.exists()
