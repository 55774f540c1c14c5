"""Finished runs as classifiers, evaluated again from the weights alone, and damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_folders import repaint
from run_contents import contents, resealed, set_in_config
from safetensors.torch import load_file, save_file
from small_runs import COLOURS, READOUTS, finished, tree

import training
from training.analysis.predict import Classifier, evaluate_run, load
from training.config import read_experiment
from training.data import build_stream
from training.data import test_transform as evaluation_transform
from training.run_dir import read_json

MODEL, READOUT_FILE = "model.safetensors", "readouts.safetensors"
Counts = dict[str, tuple[list[int], list[int]]]


@pytest.fixture(scope="session")
def classifier(run: Path) -> Classifier:
    return training.load(run)


def recorded(run: Path) -> Counts:
    counts = read_json(run / "summary.json")["counts"]
    return {name: (c["correct"][-1], c["total"][-1]) for name, c in counts.items()}


def evaluated(run: Path) -> Counts:
    return {name: (r["correct"], r["total"]) for name, r in evaluate_run(run).items()}


def test_predictions_name_classes_best_first(classifier: Classifier, run: Path) -> None:
    root = Path(classifier.experiment.data.options["root"])
    paths = [root / "test" / name / "0.png" for name in COLOURS]
    by_image = classifier.predict(paths, top=6)
    names = read_json(run / "classes.json")["class_names"]
    assert classifier.classes == names
    transform = evaluation_transform(classifier.experiment.data)
    items = build_stream(classifier.experiment.data, classifier.experiment.seed).test
    pixels = {names[label]: transform(image) for image, label in reversed(list(items))}
    for name, predictions in zip(COLOURS, by_image, strict=True):
        assert sorted(p.name for p in predictions) == sorted(COLOURS)
        scores = [p.score for p in predictions]
        assert scores == sorted(scores, reverse=True)
        assert all(-1 <= score <= 1 for score in scores)
        logits = classifier.logits(pixels[name][None])[0]
        expected = dict(zip(names, logits.tolist(), strict=True))
        assert dict(predictions) == pytest.approx(expected, abs=1e-6)
    assert sum(p[0].name == name for name, p in zip(COLOURS, by_image, strict=True)) >= 5
    ((alone,),) = classifier.predict([str(paths[0])])  # a string, and top 1
    assert alone.name == by_image[0][0].name
    assert alone.score == pytest.approx(by_image[0][0].score, abs=1e-6)
    assert classifier.predict([]) == []


def test_every_readout_can_be_asked(classifier: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    assert tuple(classifier.readouts) == READOUTS  # the primary one first
    for name in READOUTS:
        assert classifier.logits(images, name).shape == (2, 6)
    assert torch.equal(classifier.logits(images), classifier.logits(images, "nearest_mean"))
    with pytest.raises(ValueError, match="got 'nearest'"):
        classifier.logits(images, "nearest")


def test_prediction_neither_trains_nor_draws(classifier: Classifier, run: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    state = torch.get_rng_state()
    again = load(run)
    assert again.experiment == read_experiment(run / "config.yaml")
    first = classifier.logits(images)
    assert not first.requires_grad
    assert torch.equal(first, again.logits(images))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(3, 16, 16), r"\(3, 16, 16\)"),
        (torch.rand(0, 3, 16, 16), r"\(0, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (torch.rand(1, 1, 16, 16), "1 channels"),
        (torch.rand(1, 3, 8, 8), "8 by 8"),
        (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    classifier: Classifier, images: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        classifier.logits(images)


def test_what_cannot_be_predicted_is_named(classifier: Classifier, tmp_path: Path) -> None:
    good = next(Path(classifier.experiment.data.options["root"]).rglob("*.png"))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:200])
    for name in ("text.png", "half.png", "missing.png", "."):
        with pytest.raises(ValueError, match=(tmp_path / name).name):
            classifier.predict([good, tmp_path / name])
    with pytest.raises(TypeError, match="list"):
        classifier.predict(str(good))
    for top in (0, 7):
        with pytest.raises(ValueError, match="top must be from 1 to 6"):
            classifier.predict([good], top=top)


def test_a_device_that_is_not_there_is_named(run: Path) -> None:
    absent = ["nonsense"] if torch.cuda.is_available() else ["nonsense", "cuda"]
    for device in absent:
        with pytest.raises(ValueError, match=f"device '{device}'"):
            training.load(run, device=device)


def test_model_and_readouts_move_together(run: Path) -> None:
    images = torch.zeros(2, 3, 16, 16)
    classifier = training.load(run)
    before = {name: classifier.logits(images, name) for name in classifier.readouts}
    assert classifier.to(torch.device("cpu")) is classifier
    for name, logits in before.items():
        torch.testing.assert_close(classifier.logits(images, name), logits, rtol=0, atol=0)
    if torch.cuda.is_available():
        classifier.to("cuda")
        for name, logits in before.items():
            torch.testing.assert_close(classifier.logits(images, name).cpu(), logits)


# Evaluation


@pytest.mark.parametrize("method", ["loda", "seq_lora", "frozen"])
def test_evaluation_reproduces_the_recorded_counts(
    method: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = finished(tmp_path_factory, method)
    expected = recorded(run)
    needed = ("config.yaml", "classes.json", "manifest.json", MODEL, READOUT_FILE)
    for name in needed:
        shutil.copy(run / name, tmp_path)
    before = contents(tmp_path)
    results = evaluate_run(tmp_path)
    assert next(iter(results)) == "nearest_mean"  # the primary read-out first
    assert results.keys() == expected.keys()
    for name, result in results.items():
        correct, total = expected[name]
        assert (result["correct"], result["total"]) == (correct, total)
        assert result["accuracy"] == sum(correct) / sum(total)
        assert result["by_task"] == [sum(correct[k : k + 2]) / 6 for k in (0, 2, 4)]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_evaluation_does_not_depend_on_the_batch_size(run: Path, copy: Path, size: int) -> None:
    set_in_config(copy, "train", eval_batch_size=size)
    assert evaluated(copy) == recorded(run)


def test_evaluation_does_not_depend_on_the_order_of_the_images(
    run: Path, classifier: Classifier
) -> None:
    test = build_stream(classifier.experiment.data, classifier.experiment.seed).test
    images = test.with_transform(evaluation_transform(classifier.experiment.data))
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(3)).tolist()
    for name, (correct, total) in recorded(run).items():
        hits, seen = [0] * 6, [0] * 6
        for first in range(0, len(order), 4):
            items = [images[k] for k in order[first : first + 4]]
            scores = classifier.logits(torch.stack([pixels for pixels, _ in items]), name)
            for best, (_, label) in zip(scores.argmax(1).tolist(), items, strict=True):
                hits[label] += int(best == label)
                seen[label] += 1
        assert (hits, seen) == (correct, total)


def test_a_run_on_held_out_images_is_evaluated_without_the_test_split(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    run = finished(
        tmp_path_factory, "frozen", data={"root": str(data), "validation": 0.34}, keep={}
    )
    shutil.rmtree(data / "test")
    assert evaluated(run) == recorded(run)


def test_data_of_other_classes_are_refused(
    copy: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = shutil.copytree(tree(tmp_path_factory), tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "red").rename(data / split / "zinnober")
    with pytest.raises(ValueError, match="classes"):
        evaluate_run(copy, root=str(data))
    shutil.rmtree(data)
    with pytest.raises(FileNotFoundError, match="root"):
        evaluate_run(copy, root=str(data))
    assert load(copy).classes  # prediction needs no data


# Damaged runs


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"):
        training.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"config\.yaml, classes\.json, model.*, readouts"):
        training.load(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "classes.json", MODEL, READOUT_FILE])
def test_an_unfinished_run_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no finished run: {name}"):
        evaluate_run(copy)


def change(name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        tensors = load_file(run / name)
        edit(tensors)
        save_file(tensors, run / name)

    return apply


def write(name: str, content: object) -> Callable[[Path], None]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda run: (run / name).write_text(text, "utf-8") and None


def truncate(name: str) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return apply


def to_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).fill_(float("nan"))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a model": (truncate(MODEL), MODEL),
    "a model without a tensor": (change(MODEL, lambda t: t.pop("norm.bias")), "norm.bias"),
    "a model of another width": (
        change(MODEL, lambda t: t.update({"norm.bias": torch.zeros(8)})),
        rf"{MODEL}.*norm\.bias",
    ),
    "a model with more tensors": (
        change(MODEL, lambda t: t.update({"head.weight": torch.zeros(8)})),
        rf"{MODEL}.*head\.weight",
    ),
    "a model that is not finite": (change(MODEL, to_nan), rf"{MODEL}.*NaN"),
    "half of the read-outs": (truncate(READOUT_FILE), READOUT_FILE),
    "read-outs that are not finite": (change(READOUT_FILE, to_nan), rf"{READOUT_FILE}.*NaN"),
    "no read-outs": (change(READOUT_FILE, dict.clear), READOUT_FILE),
    "no primary read-out": (
        change(READOUT_FILE, lambda t: t.pop("nearest_mean/weight")),
        rf"{READOUT_FILE}.*'nearest_mean'",
    ),
    "a read-out of other features": (
        change(READOUT_FILE, lambda t: t.update({"heads/weight": torch.ones(6, 8)})),
        READOUT_FILE,
    ),
    "a read-out of fewer classes": (
        change(READOUT_FILE, lambda t: t.update({"nearest_mean/weight": torch.ones(4, 16)})),
        rf"{READOUT_FILE}.*4 classes",
    ),
    "no configuration": (write("config.yaml", "train: [1"), r"config\.yaml"),
    "an unknown setting": (write("config.yaml", "tran: {lr: 1}"), r"config\.yaml"),
    "no JSON": (write("classes.json", "{"), r"classes\.json"),
    "a list": (write("classes.json", [1]), r"classes\.json"),
    "no names": (write("classes.json", {"order": [1]}), r"classes\.json.*class_names"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_runs_are_refused_and_the_file_is_named(copy: Path, damage: str) -> None:
    apply, said = DAMAGES[damage]
    apply(copy)
    with pytest.raises(ValueError, match=said):
        evaluate_run(resealed(copy))


@pytest.mark.parametrize("name", [MODEL, READOUT_FILE, "classes.json"])
def test_files_that_the_run_did_not_write_are_refused(copy: Path, name: str) -> None:
    whole = (copy / name).read_bytes()
    half = len(whole) // 2
    (copy / name).write_bytes(whole[:half] + bytes(len(whole) - half))
    for read in (evaluate_run, training.load):
        with pytest.raises(ValueError, match=rf"{name} is not the file"):
            read(copy)
    (copy / name).write_bytes(whole)
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match="manifest"):
        training.load(copy)


def test_tensors_of_other_readouts_are_left_alone(copy: Path) -> None:
    change(READOUT_FILE, lambda t: t.update({"magic/weight": torch.zeros(6, 16)}))(copy)
    assert set(load(resealed(copy)).readouts) == set(READOUTS)


def test_test_images_that_changed_are_told(copy: Path, tmp_path: Path) -> None:
    root = tmp_path / "squares"
    shutil.copytree(read_experiment(copy / "config.yaml").data.options["root"], root)
    evaluate_run(copy, root=str(root))  # no warning: only the place is another one
    image = root / "test" / "red" / "0.png"
    repaint(image, 1)
    with pytest.warns(RuntimeWarning, match=r"recorded 18 \(.*found 18 \("):
        evaluate_run(copy, root=str(root))
    image.unlink()
    with pytest.warns(RuntimeWarning, match="found 17"):
        evaluate_run(copy, root=str(root))
