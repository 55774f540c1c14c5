"""What outdated class statistics cost: the read-outs of finished runs, fitted again on all images.

    python docs/refreshed_statistics.py RUN...

A read-out keeps the statistics of a class from the end of its task. Later tasks move the features,
and the statistics stay. Here every statistic is gathered again, from the training images of all
tasks through the network as it is in the end, and the read-outs are fitted to these. That needs
the images of old tasks, so it is a diagnosis and no method: the difference to the recorded accuracy
is what outdated statistics cost, and what is still missing to ``joint`` is in the features.
"""

import argparse
import sys
from pathlib import Path

from pandas import DataFrame
from torch import Tensor

from backends.torch.readouts import Readouts
from training.analysis.evaluate import set_up
from training.analysis.predict import load
from training.data.images import ImageSet
from training.metrics import count_correct
from training.seeds import derive
from training.train import evaluation_batches, extract_features


def refreshed(run: Path) -> DataFrame:
    """Accuracies in per cent of each read-out with the statistics of the run, and with new ones.

    Heads as they were trained have no statistics and are left out.
    """
    classifier = load(run)
    experiment = classifier.experiment
    stream, accelerator = set_up(run, experiment)
    classifier.to(accelerator.device)
    readouts = Readouts(
        experiment.head.build(),
        dim=classifier.backbone.features,
        seed=derive(experiment.seed, 0, "ridge"),
    )

    def features(images: ImageSet) -> tuple[Tensor, Tensor]:
        batches = evaluation_batches(images, experiment, accelerator.device)
        return extract_features(classifier.model, batches, accelerator)

    for task in stream.tasks:
        rows, labels = features(stream.train.subset(task))
        readouts.begin_task(rows)  # no statistic has anything to make up for
        readouts.add_task(rows, labels, len(task))
    heads = classifier.readouts.get("heads")
    weight = heads.tensors()["weight"] if heads else None
    fitted = readouts.fit(weight, derive(experiment.seed, len(stream.tasks) - 1, "alignment"))
    tested = features(stream.test)
    shares = [
        {
            name: 100 * sum(correct) / sum(total)
            for name, (correct, total) in count_correct(by_name, *tested, len(stream.order)).items()
        }
        for by_name in (classifier.readouts, fitted)
    ]
    return DataFrame(shares, index=["recorded", "refreshed"]).T.drop("heads", errors="ignore")


def table(runs: list[Path]) -> str:
    """A row a run: recorded, refreshed and the difference, by read-out."""
    found = {run: refreshed(run) for run in runs}
    names = list(next(iter(found.values())).index)
    lines = [
        "| run | " + " | ".join(f"{name}: recorded | refreshed" for name in names) + " |",
        "|---|" + "---:|---:|" * len(names),
    ]
    for run, values in found.items():
        cells = [f"{values.loc[name, column]:.2f}" for name in names for column in values]
        lines.append(f"| {run.parent.name}/{run.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Print the table of some runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    given = parser.parse_args(arguments)
    try:
        text = table(given.runs)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
