"""Tables over runs: accuracies, controls and costs."""

import json
from pathlib import Path

import pytest
from fake_runs import fake_run
from image_folders import CLASSES, folder, grow
from read_reports import FROZEN, sections, table, texts

from training.config import HeadConfig, MethodConfig, TrainConfig
from training.report import Report, comparison_curves


def test_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    for seed, last in ((3, (30, 70)), (1, (60, 80)), (2, (90, 90))):
        fake_run(tmp_path / str(seed), ((90,), last), seed=seed)
    (section,) = sections(tmp_path)
    assert texts(table(section, "Accuracy, read-out alignment")) == [
        # last 50, 70, 90; average 70, 80, 90; forgetting 60, 30, 0
        [
            "loda",
            "70.00 ± 20.00",
            "80.00 ± 10.00",
            "30.00 ± 30.00",
            "95.00 ± 0.00",
            "1, 2, 3",
        ]
    ]
    curves = comparison_curves([section])
    assert curves == {"loda": [[0.9, 0.7], [0.9, 0.9], [0.9, 0.5]]}  # by seed


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    (section,) = sections(fake_run(tmp_path / "a"))
    assert texts(table(section, "Accuracy"))[0][1] == "70.00"


def test_a_task_that_was_logged_twice_is_refused(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a")
    log = run / "metrics.jsonl"
    log.write_text(log.read_text() + log.read_text().splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match=r"a.metrics\.jsonl logs the end of task 2 more than once"):
        Report.over([tmp_path]).markdown()


def test_heads_that_never_trained_are_no_read_out(tmp_path: Path) -> None:
    head = HeadConfig(readout="nearest_mean", also=["heads", "alignment"])
    still = TrainConfig(epochs=0)
    run = fake_run(tmp_path / "a", method=MethodConfig("ncm"), head=head, train=still)
    (section,) = sections(run)
    assert section.readouts == ["nearest_mean", "alignment"]
    assert texts(table(section, "Controls"))[0][1] == "0"  # nothing trained either
    # A run that asked for them as its own read-out shows them.
    heads = HeadConfig(readout="heads")
    run = fake_run(tmp_path / "b", head=heads, train=still)
    assert sections(run)[0].readouts == ["heads"]


def test_the_best_of_a_column_is_bold(tmp_path: Path) -> None:
    fake_run(tmp_path / "a", ((90,), (60, 80)))
    fake_run(tmp_path / "b", ((80,), (70, 70)), method=FROZEN)  # ties in last, forgets less
    fake_run(tmp_path / "c", ((99, 99),), method=MethodConfig("joint"))
    (section,) = sections(tmp_path)
    found = table(section, "Accuracy")
    bold = {row[0].text: [cell.best for cell in row[1:5]] for row in found.rows}
    assert bold["loda"] == [True, True, False, True]
    assert bold["frozen"] == [True, False, True, True]
    assert bold["joint"] == [False] * 4
    joint = next(row for row in texts(found) if row[0] == "joint")
    assert joint[1:5] == ["99.00", "–", "–", "–"]


def test_costs(tmp_path: Path) -> None:
    (section,) = sections(fake_run(tmp_path / "a"))
    assert texts(table(section, "Costs")) == [["loda", "3.5", "2.5", "301", "–"]]


@pytest.mark.parametrize(
    ("method", "each"),
    [
        (MethodConfig("loda"), 2),
        (MethodConfig("loda", gao=False), 1),
        (MethodConfig("loda", radius=0.0), 2),
        (MethodConfig("seq_lora"), 1),
        (MethodConfig("seq_lora", gao=True), 2),
        (MethodConfig("null_lora"), 1),
        (FROZEN, 1),
    ],
)
def test_controls(tmp_path: Path, method: MethodConfig, each: int) -> None:
    train = TrainConfig(epochs=3, batch_size=10)
    run = fake_run(tmp_path / "a", method=method, train=train)
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[1:] == ["2,000", "1,048,576", "524,288", "5.0", "–", "–"]  # it counted no images
    classes = {"class_names": ["a", "b"], "order": [0, 1], "tasks": [[0], [1]]}
    (run / "classes.json").write_text(json.dumps({**classes, "images": [25, 500]}))
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == [str(each * 3 * (3 + 50)), f"{each * 3 * 525:,}"]


def test_images_of_older_runs_are_counted_where_they_are(tmp_path: Path) -> None:
    data = folder(grow(tmp_path / "images", {"train": 7, "test": 1}), image_size=8)
    train = TrainConfig(epochs=2, batch_size=5)
    rows = ((90, 90, 90), (60, 80, 80, 70, 70))  # three classes, then two
    run = fake_run(tmp_path / "a", rows, method=FROZEN, train=train, data=data)
    classes = {"class_names": list(CLASSES), "order": [0] * 5, "tasks": [[0, 1, 2], [3, 4]]}
    (run / "classes.json").write_text(json.dumps(classes))
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == [str(2 * (5 + 3)), str(2 * 35)]
    (tmp_path / "images" / "train").rename(tmp_path / "images" / "gone")
    (row,) = texts(table(sections(run)[0], "Controls"))
    assert row[5:] == ["–", "–"]
