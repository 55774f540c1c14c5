"""Finished runs as classifiers of images."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from small_runs import COLOURS, READOUTS

import training
from training.config import read_experiment
from training.data import build_stream
from training.data import test_transform as evaluation_transform
from training.run_dir import read_json
from training.finished.inference import Classifier, load_classifier


@pytest.fixture(scope="session")
def classifier(run: Path) -> Classifier:
    return training.load(run)


def test_predictions_name_classes_best_first(classifier: Classifier, run: Path) -> None:
    root = Path(classifier.experiment.data.root or "")
    paths = [root / "test" / name / "0.png" for name in COLOURS]
    found = classifier.predict(paths, top=6)
    names = read_json(run / "classes.json")["class_names"]
    assert classifier.classes == names
    transform = evaluation_transform(classifier.experiment.data)
    items = build_stream(classifier.experiment.data, classifier.experiment.seed).test
    by_class = {names[label]: transform(image) for image, label in reversed(list(items))}
    for name, predictions in zip(COLOURS, found, strict=True):
        assert sorted(p.name for p in predictions) == sorted(COLOURS)
        scores = [p.score for p in predictions]
        assert scores == sorted(scores, reverse=True)
        assert all(-1 <= score <= 1 for score in scores)
        logits = classifier.logits(by_class[name][None])[0]
        assert dict(predictions) == pytest.approx(
            dict(zip(names, logits.tolist(), strict=True)), abs=1e-6
        )
    assert sum(p[0].name == name for name, p in zip(COLOURS, found, strict=True)) >= 5
    ((alone,),) = classifier.predict([str(paths[0])])  # a string, and top 1
    assert alone.name == found[0][0].name
    assert alone.score == pytest.approx(found[0][0].score, abs=1e-6)
    assert classifier.predict([]) == []


def test_every_readout_can_be_asked(classifier: Classifier) -> None:
    images = torch.rand(2, 3, 16, 16)
    assert set(classifier.readouts) == set(READOUTS)
    for kind in READOUTS:
        assert classifier.logits(images, kind).shape == (2, 6)
    assert torch.equal(classifier.logits(images), classifier.logits(images, "nearest_mean"))
    with pytest.raises(ValueError, match=r"no read-out 'nearest'; it has \[.*'nearest_mean'"):
        classifier.logits(images, "nearest")


def test_images_of_another_form_are_converted(classifier: Classifier, tmp_path: Path) -> None:
    grey = Image.new("L", (50, 20), 128)
    for mode in ("L", "RGB", "RGBA", "P"):
        grey.convert(mode).save(tmp_path / f"{mode}.png")
    found = classifier.predict(sorted(tmp_path.iterdir()), top=6)
    assert len(found) == 4
    assert all(predictions == found[0] for predictions in found)


def test_prediction_neither_trains_nor_draws(classifier: Classifier, run: Path) -> None:
    images = torch.rand(1, 3, 16, 16)
    state = torch.get_rng_state()
    load_classifier(run)
    first = classifier.logits(images)
    assert not first.requires_grad
    assert torch.equal(first, classifier.logits(images))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.rand(3, 16, 16), r"\(N, C, H, W\).*\(3, 16, 16\)"),
        (torch.rand(0, 3, 16, 16), r"N at least 1.*\(0, 3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"floating.*uint8"),
        (torch.rand(1, 1, 16, 16), "1 channels"),
        (torch.rand(1, 3, 8, 8), "8 by 8 pixels"),
        (torch.full((1, 3, 16, 16), float("nan")), "NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    classifier: Classifier, images: torch.Tensor, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        classifier.logits(images)


def test_what_cannot_be_predicted_is_named(classifier: Classifier, tmp_path: Path) -> None:
    good = next(Path(classifier.experiment.data.root or "").rglob("*.png"))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:200])
    cases = {
        "text.png": "cannot read the image",
        "half.png": "cannot read the image",
        "missing.png": "there is no image file",
        ".": "is a folder",
    }
    for name, said in cases.items():
        with pytest.raises(ValueError, match=said) as error:
            classifier.predict([good, tmp_path / name])
        assert tmp_path.name in str(error.value)
    with pytest.raises(TypeError, match="give a list of image files"):
        classifier.predict(str(good))
    for top in (0, 7):
        with pytest.raises(ValueError, match="top must be from 1 to 6"):
            classifier.predict([good], top=top)


def test_a_run_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no run folder .*none"):
        training.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"no finished run: config\.yaml, classes\.json"):
        training.load(tmp_path)


def test_the_configuration_of_a_run_is_that_of_its_classifier(
    classifier: Classifier, run: Path
) -> None:
    assert classifier.experiment == read_experiment(run / "config.yaml")
    assert not list(run.glob(".*"))


def test_a_device_that_is_not_there_is_named(run: Path) -> None:
    with pytest.raises(ValueError, match="cannot use the device 'nonsense'"):
        training.load(run, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot use the device 'cuda'"):
            training.load(run, device="cuda")


def test_model_and_readouts_move_together(run: Path) -> None:
    images = torch.zeros(2, 3, 16, 16)
    classifier = training.load(run)
    before = {kind: classifier.logits(images, kind) for kind in classifier.readouts}
    assert classifier.to(torch.device("cpu")) is classifier
    for kind, logits in before.items():
        torch.testing.assert_close(classifier.logits(images, kind), logits, rtol=0, atol=0)
    if torch.cuda.is_available():
        classifier.to("cuda")
        for kind, logits in before.items():
            torch.testing.assert_close(classifier.logits(images, kind).cpu(), logits)
