"""Finished runs as classifiers of images of every kind, tables of predictions, damaged runs."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from run_contents import resealed
from safetensors.torch import load_file, save_file
from small_runs import COLOURS, READOUTS

import training
from training.analysis.evaluate import evaluate_run
from training.analysis.predict import (
    Classifier,
    Prediction,
    answer,
    image_files,
    load,
    printable,
    require_table,
    write_table,
)
from training.calibration import probabilities
from training.config import read_experiment
from training.data import build_stream
from training.data import test_transform as evaluation_transform
from training.run_dir import read_json

MODEL, READOUT_FILE = "model.safetensors", "readouts.safetensors"


@pytest.fixture(scope="session")
def classifier(run: Path) -> Classifier:
    return training.load(run)


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
        assert {p.name: p.score for p in predictions} == pytest.approx(expected, abs=1e-6)
    assert sum(p[0].name == name for name, p in zip(COLOURS, by_image, strict=True)) >= 5
    assert all(p.probability is None for best in by_image for p in best)  # nearest mean
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
    with pytest.raises(ValueError, match="top must be at least 1"):
        classifier.predict([good], top=0)
    assert len(classifier.predict([good], top=7)[0]) == len(classifier.classes) == 6


def test_a_pil_image_that_is_cut_off_leaves_the_others_their_predictions(
    classifier: Classifier, tmp_path: Path
) -> None:
    good = next(Path(classifier.experiment.data.options["root"]).rglob("*.png"))
    with Image.open(good) as whole:
        whole.resize((64, 64)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(content[: 2 * len(content) // 3])
    refused: list[Any] = []
    with Image.open(tmp_path / "half.jpg") as half:
        found = classifier.predict([good, half], on_error=lambda image, _: refused.append(image))
        assert refused == [half]
    assert [len(best) for best in found] == [1, 0]


# Images that are not files


def pixels_of(classifier: Classifier, name: str = "red") -> tuple[Path, NDArray[np.uint8]]:
    path = Path(classifier.experiment.data.options["root"]) / "test" / name / "0.png"
    with Image.open(path) as image:
        return path, np.asarray(image.convert("RGB"))


def test_files_pictures_arrays_and_tensors_are_one_image(classifier: Classifier) -> None:
    path, array = pixels_of(classifier)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    same: list[Any] = [path, Image.fromarray(array), array, tensor, array[:, ::-1][:, ::-1]]
    (first, *others) = classifier.predict(same, top=6)
    assert all(other == first for other in others)  # the same bits
    floats: list[Any] = [
        array / 255,
        tensor.float() / 255,
        tensor.double() / 255,
        array.astype(">f4") / 255,
    ]
    for other in classifier.predict(floats, top=6):
        assert [p.name for p in other] == [p.name for p in first]
        assert [p.score for p in other] == pytest.approx([p.score for p in first], abs=1e-6)


def test_batches_are_predicted_as_lists_are(classifier: Classifier) -> None:
    arrays = np.stack([pixels_of(classifier, name)[1] for name in ("red", "blue")])
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = classifier.predict(list(arrays))
    assert classifier.predict(arrays) == expected
    assert classifier.predict(tensors) == expected


def test_grey_and_transparent_images_are_taken_as_files_of_them_are(
    classifier: Classifier, tmp_path: Path
) -> None:
    _, array = pixels_of(classifier)
    grey = array[..., 0]
    alpha = np.concatenate([array, np.full((16, 16, 1), 255, np.uint8)], axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    for name, images in {"grey": [grey, grey[..., None]], "alpha": [alpha]}.items():
        expected = classifier.predict([tmp_path / f"{name}.png"])
        assert all(classifier.predict([image]) == expected for image in images)
    (floating,) = classifier.predict([grey / 255])
    assert floating[0].score == pytest.approx(classifier.predict([grey])[0][0].score, abs=1e-6)


@pytest.mark.parametrize(
    ("image", "kind", "said"),
    [
        (np.zeros((16, 16, 3), np.int64), TypeError, "int64"),
        (np.zeros((16, 16, 3), bool), TypeError, "bool"),
        (torch.zeros(3, 16, 16, dtype=torch.int32), TypeError, "int32"),
        (np.zeros((3, 16, 16), np.uint8), ValueError, "last"),
        (torch.zeros(16, 16, 3, dtype=torch.uint8), ValueError, "first"),
        (np.zeros((16, 16, 2), np.uint8), ValueError, "channels"),
        (np.zeros((0, 16, 3), np.uint8), ValueError, "shape"),
        (np.zeros(16, np.uint8), ValueError, "shape"),
        (np.full((16, 16, 3), 200.0), ValueError, "255"),
        (torch.full((3, 16, 16), -0.5), ValueError, "normalisation"),
        (torch.full((3, 16, 16), float("nan")), ValueError, "nan"),
        (np.zeros((16, 16, 4)), ValueError, "alpha"),
        (b"image", TypeError, "bytes"),
    ],
)
def test_what_is_no_image_is_refused(
    classifier: Classifier, image: Any, kind: type[Exception], said: str
) -> None:
    _, good = pixels_of(classifier)
    with pytest.raises(kind, match=said):
        classifier.predict([good, image])
    failed: list[Any] = []
    first, second = classifier.predict([good, image], on_error=lambda x, _: failed.append(x))
    assert first
    assert second == []
    assert failed[0] is image


def test_a_single_image_is_no_list(classifier: Classifier) -> None:
    path, array = pixels_of(classifier)
    for single in (path, Image.fromarray(array), array, torch.zeros(3, 16, 16)):
        with pytest.raises(TypeError, match="brackets"):
            classifier.predict(single)  # type: ignore[arg-type]


# Probabilities, tables, files


def test_probabilities_are_the_softmax_at_the_temperature_of_the_run(
    classifier: Classifier, run: Path
) -> None:
    calibration = read_json(run / "summary.json")["calibration"]
    assert classifier.temperatures == {k: v["temperature"] for k, v in calibration.items()}
    path, _ = pixels_of(classifier)
    for readout, temperature in classifier.temperatures.items():
        (best,) = classifier.predict([path], top=6, readout=readout)
        shares = [p.probability for p in best]
        assert sum(x for x in shares if x is not None) == pytest.approx(1)
        expected = probabilities(torch.tensor([p.score for p in best]), temperature)
        assert shares == pytest.approx(expected.tolist())


def test_a_table_has_a_row_for_every_image_that_can_be_read(
    classifier: Classifier, tmp_path: Path
) -> None:
    path, array = pixels_of(classifier)
    (tmp_path / "text.png").write_text("no image")
    failed: list[object] = []
    table = classifier.table(
        [path, tmp_path / "text.png", array],
        top=2,
        readout="heads",
        threshold=1.0,
        on_error=lambda image, _: failed.append(image),
    )
    assert failed == [tmp_path / "text.png"]
    columns = ["image", "answer", "class_1", "probability_1", "class_2", "probability_2"]
    assert list(table) == columns
    assert list(table["image"]) == [str(path), 2]
    assert set(table["answer"]) == {"unknown"}
    assert list(classifier.table([path])) == ["image", "class_1", "score_1"]
    known = classifier.table([path], readout="heads", threshold=0.0)
    assert list(known["answer"]) == list(known["class_1"])


def test_thresholds_that_no_value_can_reach_are_refused(classifier: Classifier) -> None:
    path, _ = pixels_of(classifier)
    for readout, threshold in (("heads", 1.5), ("heads", -0.1), ("ridge", math.nan)):
        with pytest.raises(ValueError, match="threshold"):
            classifier.table([path], readout=readout, threshold=threshold)
    # A score may have any size.
    assert set(classifier.table([path], readout="ridge", threshold=7.0)["answer"]) == {"unknown"}


def test_an_answer_at_the_threshold_is_given() -> None:
    assert answer([Prediction("cat", 0.1, 0.5)], 0.5) == "cat"


def test_files_of_folders_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.JPG", "a/c/1.webp", "a/notes.txt", ".hidden/3.png", "b/.4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    single = tmp_path / "a" / "notes.txt"  # a file that is named is taken
    images, others = image_files([tmp_path, single])
    assert [x.relative_to(tmp_path).as_posix() for x in images] == [
        "a/c/1.webp",
        "b/10.JPG",
        "b/2.png",
        "a/notes.txt",
    ]
    assert others == [single]
    linked = tmp_path / "elsewhere"  # a folder of links to folders, one of them to itself
    linked.mkdir()
    (linked / "photos").symlink_to(tmp_path / "b")
    (linked / "again").symlink_to(linked)
    assert image_files([linked])[0] == [linked / "photos" / name for name in ("10.JPG", "2.png")]
    with pytest.raises(FileNotFoundError, match="none"):
        image_files([tmp_path, tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        image_files([tmp_path / "empty"])


@pytest.mark.parametrize("ending", ["csv", "json", "parquet"])
def test_tables_are_read_back_as_they_were(tmp_path: Path, ending: str) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    table = pandas.DataFrame(
        {"image": ["a, ß.png", "b"], "class_1": ["x", "y"], "score_1": [0.1, 1 / 3]}
    )
    path = write_table(table, tmp_path / "new" / f"t.{ending}")
    read = {"csv": pandas.read_csv, "json": pandas.read_json, "parquet": pandas.read_parquet}
    pandas.testing.assert_frame_equal(read[ending](path), table)
    with pytest.raises(FileExistsError, match="overwrite"):
        write_table(table, path)
    write_table(table[:1], path, overwrite=True)
    assert len(read[ending](path)) == 1


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="parquet"):
        require_table(tmp_path / "t.xlsx")


def test_names_that_are_not_utf_8_can_be_written() -> None:
    assert printable(os.fsdecode(b"caf\xe9.png")) == "caf\\xe9.png"
    assert printable(Path("café.png")) == "café.png"


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


def cold(run: Path) -> None:
    summary = read_json(run / "summary.json")
    summary["calibration"]["heads"]["temperature"] = 0
    (run / "summary.json").write_text(json.dumps(summary), "utf-8")


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
    "a temperature of zero": (cold, r"summary\.json.*positive"),
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
