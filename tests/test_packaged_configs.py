"""The packaged configurations: what they say, and that they run.

Those of the paper's experiments, the baselines' own settings over them, and the small ones.
"""

import hashlib
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import flags, tiny
from torchvision.datasets import CIFAR100

from training.config import (
    Experiment,
    experiment_of,
    flat_settings,
    resolved,
)
from training.methods import METHODS, steps_a_batch
from training.run_dir import read_json
from training.train import train
from training.yaml_files import packaged_configs, resolve_config

CONFIGS = [name for name in packaged_configs() if name.startswith("paper/")]
# One a data set is trained by every test, the others with the slow ones.
FAST = ("paper/cifar100", "paper/cub-ca", "paper/imagenet-r-10-ibot")
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 96, "depth": 1}
VIT["num_heads"] = 2

# What the authors released, by the data set (method, section "protocol"): classes a task, learning
# rate, weight decay, look-ahead, margin and rank.
RELEASED = {
    "paper/imagenet-r-20": ("imagenet-r", 10, 0.02, 0.0, 0.7, 0.1, 64),
    "paper/imagenet-a-10": ("imagenet-a", 20, 0.01, 5e-4, 0.3, 0.15, 32),
    "paper/cifar100": ("cifar100", 10, 0.005, 5e-4, 0.3, 0.0, 32),
    "paper/cub": ("cub", 20, 0.005, 5e-4, 0.3, 0.1, 32),
}
INFERRED = {
    "paper/imagenet-r-10": ("imagenet-r", 20, 0.02, 0.0, 0.7, 0.1, 32),
    "paper/imagenet-a-20": ("imagenet-a", 10, 0.01, 5e-4, 0.3, 0.15, 32),
    "paper/domainnet": ("domainnet", 69, 0.01, 5e-4, 0.3, 0.0, 32),
}
PLAIN = {**RELEASED, **INFERRED}
TEMPERATURES = {"imagenet-r": 0.2, "imagenet-a": 0.2, "cub": 0.2, "cifar100": 0.3, "domainnet": 0.1}
PUBLISHED = {
    "paper/imagenet-r-10": "81.93 after the last task, 87.18 on average",
    "paper/imagenet-r-20": "86.26 on average",
    "paper/imagenet-a-10": "62.59 after the last task",
    "paper/imagenet-a-20": "55.74 after the last task",
    "paper/imagenet-a-10-ca": "66.71 after the last task",
    "paper/cifar100": "90.47 after the last task, 94.7 on average",
    "paper/cub": "81.74 after the last task",
}
# Training and test images, and classes.
IMAGES = {
    "imagenet-r": (24_000, 6_000, 200),
    "imagenet-a": (5_981, 1_519, 200),
    "cifar100": (50_000, 10_000, 100),
    "cub": (9_430, 2_358, 200),
    "domainnet": (409_832, 176_743, 345),
}
BACKBONES = {
    "dino": "vit_base_patch16_224.dino",
    "clip": "vit_base_patch16_clip_224.openai",
    "ibot": "vit_base_patch16_224",
}
ABLATIONS: dict[str, dict[str, object]] = {
    "general-only": {"branches": "general"},
    "isolated-only": {"branches": "isolated"},
    "null-space": {"isolated": "null"},
    "no-gao": {"gao": False},
    "no-recalibration": {"recalibration": "none"},
    "full": {"recalibration": "full"},
    "diagonal": {"recalibration": "diagonal"},
    "scalar": {"recalibration": "scalar"},
}


@cache
def read(name: str) -> Experiment:
    return experiment_of(["--config", name, "--data.root", "x"])


def text(name: str) -> str:
    return resolve_config(name).read_text("utf-8")


# --- what they say


@pytest.mark.parametrize("name", PLAIN)
def test_settings_by_data_set(name: str) -> None:
    experiment, expected = read(name), PLAIN[name]
    assert expected == (
        experiment.data.name,
        experiment.data.increment,
        experiment.train.lr,
        experiment.train.weight_decay,
        experiment.method.options["radius"],
        experiment.head.margin,
        experiment.method.options["rank"],
    )
    assert experiment.data.init_cls == experiment.data.increment


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_all(name: str) -> None:
    experiment = read(name)
    data, method = experiment.data, experiment.method
    assert (data.image_size, data.train_crop, data.flip) == (224, "random_resized", True)
    assert (data.crop_scale, data.mean, data.std) == ((0.05, 1.0), 0.0, 1.0)
    assert (data.test_resize, data.test_crop, data.resize) == (256, "center", None)
    assert data.order_seed is None  # one seed sets class order and training
    assert data.shuffle
    expected = {"general_weight": 0.5, "isolated_weight": 1.0, "gamma": 3.0, "history": "both"}
    assert method.name == "loda"
    assert method.options.items() >= {**expected, "target": "*.attn.qkv"}.items()
    assert method.options["down_scale"] == pytest.approx(3**-0.5, abs=1e-12)
    assert (experiment.train.epochs, experiment.train.batch_size, experiment.train.momentum) == (
        20,
        48,
        0.9,
    )
    assert (experiment.head.start, experiment.head.scale) == ("random", 20.0)
    assert (experiment.precision, experiment.seed) == ("no", 1993)
    assert experiment.backbone.options["pretrained"]


@pytest.mark.parametrize("name", CONFIGS)
def test_variants_differ_from_their_experiment_in_what_they_are_named_after(name: str) -> None:
    base = next(n for n in sorted(PLAIN, key=len)[::-1] if name.startswith(n))
    variant = name.removeprefix(base).removeprefix("-")
    experiment, plain = read(name), read(base)
    assert (experiment.data, experiment.train) == (plain.data, plain.train)
    changed = {k: v for k, v in experiment.method.options.items() if v != plain.method.options[k]}
    assert changed == ABLATIONS.get(variant, {})
    if variant == "ca":
        assert (experiment.head.readout, experiment.head.also) == ("alignment", ["heads"])
        schedule = {"epochs": 5, "lr": 0.01, "temperature": TEMPERATURES[experiment.data.name]}
        options = experiment.head.options["alignment"]
        assert options.items() >= {**schedule, "covariance": 1e-3}.items()
    else:
        assert experiment.head == plain.head
        assert experiment.head.readout == "heads"
        form = changed.get("recalibration", "direction")
        assert experiment.method.options["recalibration"] == form
    name = BACKBONES.get(variant, "vit_base_patch16_224.augreg_in21k")
    assert experiment.backbone.name == name
    assert timm.is_model_pretrained(name)
    assert (experiment.backbone.options["weights"] is not None) == (variant == "ibot")


def test_every_experiment_of_the_paper_has_a_configuration() -> None:
    aligned = [f"{name}-ca" for name in PLAIN if not name.endswith("-20")]
    others = [f"paper/imagenet-r-10-{variant}" for variant in (*BACKBONES, *ABLATIONS)]
    assert sorted(CONFIGS) == sorted([*PLAIN, *aligned, *others])


def flops_of_an_image() -> float:
    """Floating point operations of a ViT-B/16 on 224 pixels: two for each multiplication."""
    tokens, width, depth = 197, 768, 12
    block = 12 * width**2 * tokens + 2 * tokens**2 * width
    return 2 * (depth * block + 196 * width * 3 * 16**2)


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_say_the_command_the_time_the_number_and_the_origin(name: str) -> None:
    experiment, head = read(name), text(name).partition("base:")[0]
    assert f"# Command:   loda train --config {name} --data.root DATA" in head
    assert ("--backbone.weights FILE" in head) == (
        experiment.backbone.options["weights"] is not None
    )
    number = PUBLISHED.get(name, "no number is recorded here")
    assert f"# Published: {number}" in head or (experiment.data.name, number[:2]) == (
        "domainnet",
        "no",
    )
    origin = "released" if name in RELEASED else "inferred|ours"
    assert re.search(rf"# Settings:  ({origin})", head)
    # A step passes each image forward and back, twice with look-ahead; a backward pass that takes
    # no gradient of weights costs as much as a forward one. At 10 TFLOP/s in float32.
    training, test, classes = IMAGES[experiment.data.name]
    tasks = classes / experiment.data.increment
    passes = experiment.train.epochs * 2 * (steps_a_batch(experiment.method) or 0) + 3
    passes += experiment.head.readout == "alignment"
    images = training * passes + test * (tasks + 1) / 2
    hours = images * flops_of_an_image() / 10e12 / 3600
    said = float(re.search(r"# Time:      about ([\d.]+) h", head)[1])  # type: ignore[index]
    assert said == pytest.approx(hours, rel=0.06)


@pytest.mark.parametrize("name", PLAIN)
def test_the_table_in_the_docs_says_what_the_heads_say(name: str) -> None:
    docs = Path(__file__).parents[1].joinpath("docs", "experiments.md").read_text("utf-8")
    row = re.search(rf"^\| `{name.removeprefix('paper/')}` \|.*$", docs, re.MULTILINE)
    assert row is not None
    tasks, last, average, origin, hours = [cell.strip() for cell in row[0].split("|")[2:-1]]
    head, experiment = text(name), read(name)
    assert int(tasks) == IMAGES[experiment.data.name][2] // experiment.data.increment
    assert f"about {hours} h" in head
    assert f"# Settings:  {origin}" in head
    assert not last or f"{last} after the last task" in head
    assert not average or f"{average} on average over tasks" in head
    assert bool(last or average) == (name in PUBLISHED)


# --- that they run, on made-up folders of the same shape


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with as many classes as the data sets have; few images, which repeat."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    sources = []
    for number in range(12):
        path = root / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
        sources.append(path.read_bytes())

    def fill(folder: Path, count: int, first: int) -> None:
        folder.mkdir(parents=True)
        for index in range(count):
            (folder / f"{index}.png").write_bytes(sources[(first + index) % len(sources)])

    for number in range(200):
        fill(root / "cub" / "train" / f"{number:03d}.name", 2, number)
        fill(root / "cub" / "test" / f"{number:03d}.name", 1, number + 5)
    for name in ("imagenet-r", "imagenet-a"):
        (root / name).symlink_to(root / "cub")
    for number in range(345):
        fill(root / "domainnet" / "real" / f"class_{number}", 2, number)
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    for position, domain in enumerate(domains):
        for index, split in enumerate(("train", "test")):
            lines = [  # not every domain has every class: each is in two of the six
                f"{domain}/class_{number}/{index}.png {number}\n"
                for number in range(345)
                if number % 3 == position % 3
            ]
            (root / "domainnet" / f"{domain}_{split}.txt").write_text("".join(lines))
        if domain != "real":
            (root / "domainnet" / domain).symlink_to(root / "domainnet" / "real")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", num_classes=0, **VIT)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return path


def fake_cifar100(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of CIFAR-100, with two training and one test image a class."""
    base = root / CIFAR100.base_folder
    base.mkdir(exist_ok=True)
    digests = {}
    for kind, count in (("train", 2), ("test", 1), ("meta", 0)):
        rng = np.random.default_rng(count)
        content = {
            "data": rng.integers(0, 256, (100 * count, 3072), dtype=np.uint8),
            "fine_labels": list(range(100)) * count,
            "fine_label_names": [f"class{index:03d}" for index in range(100)],
        }
        (base / kind).write_bytes(pickle.dumps(content))
        digests[kind] = hashlib.md5((base / kind).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digests["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": digests["meta"]}
    monkeypatch.setattr(CIFAR100, "meta", meta)


def small(name: str, data: Path, weights: Path, out: Path, tasks: int | None) -> Experiment:
    given = f"weights={weights}" if name.endswith("ibot") else "pretrained=false"
    return experiment_of(
        [
            f"--config={name}",
            f"--data.root={data}",
            f"--data.tasks={'null' if tasks is None else tasks}",
            "--data.image_size=32",
            "--data.test_resize=36",
            "--data.workers=0",
            f"--backbone.options={VIT}",
            f"--backbone.{given}",
            "--train.epochs=1",
            "--keep.figure=false",
            "--device=cpu",
            f"--out={out}",
        ]
    )


FIRST_TASKS = [pytest.param(n, 2, marks=[] if n in FAST else pytest.mark.slow) for n in CONFIGS]
WHOLE = ("paper/imagenet-r-20", "paper/cifar100", "paper/domainnet")
WHOLE_STREAMS = [pytest.param(name, None, marks=pytest.mark.slow) for name in WHOLE]


@pytest.mark.parametrize(("name", "tasks"), [*FIRST_TASKS, *WHOLE_STREAMS])
def test_streams_run(
    name: str,
    tasks: int | None,
    data: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_cifar100(data, monkeypatch)
    experiment = small(name, data, weights, tmp_path / "run", tasks)
    folder = train(experiment, quiet=True)
    classes, summary = read_json(folder / "classes.json"), read_json(folder / "summary.json")
    size, count = experiment.data.increment, IMAGES[experiment.data.name][2]
    tasks = tasks or count // size
    assert [len(task) for task in classes["tasks"]] == [size] * tasks
    order = np.random.RandomState(1993).permutation(count)
    assert classes["order"] == order[: size * tasks].tolist()
    assert list(summary["readouts"]) == [experiment.head.readout, *experiment.head.also]
    totals = summary["counts"][experiment.head.readout]["total"][-1]
    assert len(totals) == size * tasks


# --- the baselines' own settings, laid over those of a data set

NATIVE = [f"native/{name}" for name in ("inflora", "o_lora", "ranpac_frozen", "sd_lora")]
# What the authors' papers and code say: rank, optimiser, schedule, rate, batch and epochs.
OWN = {
    "native/inflora": (10, "adam", "cosine", 5e-4, 128, 20),
    "native/sd_lora": (10, "sgd", "constant", 8e-3, 128, 20),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_a_methods_own_stays_that_of_the_data_set(name: str) -> None:
    below = read("paper/cifar100")
    experiment = experiment_of(["--config=paper/cifar100", f"--config={name}", "--data.root=x"])
    assert experiment.method.name == name.removeprefix("native/")
    assert (experiment.data, experiment.backbone) == (below.data, below.backbone)
    assert steps_a_batch(experiment.method) == 1
    if name in OWN:
        rank, t = experiment.method.options["rank"], experiment.train
        assert OWN[name] == (rank, t.optimizer, t.schedule, t.lr, t.batch_size, t.epochs)


# first_task is LoDA as long as it trains a branch.
@pytest.mark.parametrize("method", sorted({*METHODS.paths} - {"loda", "first_task"}))
def test_no_method_gets_the_look_ahead_of_loda_from_the_settings_of_a_paper(method: str) -> None:
    experiment = experiment_of(["--config=paper/cub", "--data.root=x", f"--method={method}"])
    assert steps_a_batch(experiment.method) == 1


@pytest.mark.parametrize("name", NATIVE)
def test_the_settings_of_a_baseline_train(name: str, root: Path, tmp_path: Path) -> None:
    small = flags(tiny(root, tmp_path / "run"))
    small = [flag for flag in small if not flag.startswith(("--train.lr", "--head.readout"))]
    if name == "native/ranpac_frozen":  # it has no rank, and 10,000 features take a while
        small = [flag for flag in small if "rank" not in flag] + ["--head.ridge.features=32"]
    experiment = experiment_of([f"--config={name}", *small, "--data.tasks=2", "--train.epochs=1"])
    assert (train(experiment, quiet=True) / "summary.json").is_file()


# --- the small ones


def test_the_configuration_of_the_digits_says_the_defaults() -> None:
    assert resolved(experiment_of(["--config=digits"])) == resolved(
        experiment_of({"data": {"init_cls": 2, "increment": 2}})
    )


def test_the_packaged_caltech101_asks_for_weights() -> None:
    with pytest.raises(ValueError, match="weights FILE"):
        read("caltech101")
    experiment = experiment_of(["--config=caltech101", "--data.root=x", "--backbone.weights=w.pth"])
    settings = flat_settings(experiment)
    assert settings["backbone.options"]["depth"] == 6
    assert (settings["method.recalibration"], settings["head.also"]) == (
        "direction",
        ["nearest_mean", "alignment", "ridge"],
    )
