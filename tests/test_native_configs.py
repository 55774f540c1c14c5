"""The baselines' own settings, laid over those of a data set."""

from pathlib import Path

import pytest
from small_runs import flags, tiny, tree

from training.config import experiment_of, load_experiment
from training.train import train
from training.methods import METHODS, check_method, steps_a_batch

NATIVE = [f"native/{name}" for name in ("inflora", "o_lora", "ranpac_frozen", "sd_lora")]
# What the authors' papers and code say: rank, optimiser, schedule, rate, batch and epochs.
PUBLISHED = {
    "native/inflora": (10, "adam", "cosine", 5e-4, 128, 20),
    "native/sd_lora": (10, "sgd", "constant", 8e-3, 128, 20),
}


@pytest.mark.parametrize("name", NATIVE)
def test_what_is_not_a_methods_own_stays_that_of_the_data_set(name: str) -> None:
    below = load_experiment(["--config", "paper/cifar100", "--data.root", "x"])
    found = load_experiment(["--config", "paper/cifar100", "--config", name, "--data.root", "x"])
    assert found.method.name == name.removeprefix("native/")
    assert (found.data, found.backbone) == (below.data, below.backbone)
    check_method(found.method)
    assert steps_a_batch(found.method) == 1
    if name in PUBLISHED:
        t = found.train
        own = (found.method.rank, t.optimizer, t.schedule, t.lr, t.batch_size, t.epochs)
        assert own == PUBLISHED[name]


@pytest.mark.parametrize("method", sorted({*METHODS} - {"loda"}))
def test_no_method_gets_the_look_ahead_of_loda_from_the_settings_of_a_paper(method: str) -> None:
    found = experiment_of(["--config=paper/cub", "--data.root=x", f"--method.name={method}"])
    check_method(found.method)
    assert steps_a_batch(found.method) == 1


@pytest.mark.parametrize("name", NATIVE)
def test_each_trains(name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    small = flags(tiny(tree(tmp_path_factory), tmp_path / "run"))
    small = [flag for flag in small if not flag.startswith(("--train.lr", "--head.readout"))]
    experiment = experiment_of([f"--config={name}", *small, "--data.tasks=2", "--train.epochs=1"])
    assert (train(experiment, quiet=True) / "summary.json").is_file()
