"""What an experiment is: the settings, their checks, and the YAML files that hold them.

Every setting is a field of a dataclass, with its meaning in the docstring; the same text is the
help of the command line. A file may set any part of them, the command line overrides the file::

    loda train --config caltech101 --data.root my/images --train.lr 0.1

A relative path (``data.root``, ``backbone.weights``, ``out``) starts at the working directory.
"""

from training.backbones.config import HUGGING_FACE, PACKAGED_WEIGHTS, BackboneConfig
from training.config.layers import packaged_configs, resolve_config
from training.config.method import MethodConfig
from training.config.parse import (
    dump_experiment,
    experiment_from,
    experiment_of,
    experiment_values,
    load_experiment,
    parser,
    read_experiment,
)
from training.config.recorded import as_recorded, differing_settings
from training.config.sections import (
    CheckpointConfig,
    Experiment,
    HeadConfig,
    KeepConfig,
    Readout,
    TrainConfig,
)
from training.data.config import DataConfig

__all__ = [
    "HUGGING_FACE",
    "PACKAGED_WEIGHTS",
    "BackboneConfig",
    "CheckpointConfig",
    "DataConfig",
    "Experiment",
    "HeadConfig",
    "KeepConfig",
    "MethodConfig",
    "Readout",
    "TrainConfig",
    "as_recorded",
    "differing_settings",
    "dump_experiment",
    "experiment_from",
    "experiment_of",
    "experiment_values",
    "load_experiment",
    "packaged_configs",
    "parser",
    "read_experiment",
    "resolve_config",
]
