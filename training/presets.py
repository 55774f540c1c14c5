"""What a method fixes of the experiment around it."""

from dataclasses import replace

from training.config import Experiment
from training.config.sections import Readout
from training.data import Stream

_READOUTS: dict[str, Readout] = {"ncm": "nearest_mean", "ranpac_frozen": "ridge"}


def effective(experiment: Experiment) -> Experiment:
    """The experiment as it is run, and recorded.

    ``ncm`` and ``ranpac_frozen`` are read-outs of an untrained backbone: nothing is trained, and
    their read-out is the primary one. The one that was asked for is evaluated beside it.

    Examples
    --------
    >>> from training.config import MethodConfig
    >>> found = effective(Experiment(method=MethodConfig("ncm")))
    >>> found.train.epochs, found.head.readout, found.head.also
    (0, 'nearest_mean', ['alignment'])
    """
    readout = _READOUTS.get(experiment.method.name)
    if readout is None:
        return experiment
    head, train = experiment.head, replace(experiment.train, epochs=0)
    also = [kind for kind in dict.fromkeys([head.readout, *head.also]) if kind != readout]
    return replace(experiment, train=train, head=replace(head, readout=readout, also=also))


def method_stream(experiment: Experiment, stream: Stream) -> Stream:
    """The stream as the method sees it: ``joint`` learns all classes at once."""
    if experiment.method.name != "joint":
        return stream
    return replace(stream, tasks=[tuple(label for task in stream.tasks for label in task)])
