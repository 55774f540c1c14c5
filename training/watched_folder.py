"""The run folder as a process sees it that does not write."""

from pathlib import Path
from typing import Any

import torch

from training.backbones import Backbone
from training.config import Experiment
from training.data import Stream
from training.run_folder import RunFolder
from training.state import RunState


class WatchedFolder(RunFolder):
    """Knows where the folder is, and leaves all writing to the first process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None:
        """The folder is another process's."""

    def begin(self, experiment: Experiment, stream: Stream, backbone: Backbone) -> None:
        """Write nothing."""

    def log(self, event: str, **values: Any) -> None:
        """Write nothing."""

    def restore_log(self, content: bytes) -> None:
        """Write nothing."""

    def keep(self, task: int, **groups: dict[str, torch.Tensor]) -> None:
        """Write nothing."""

    def finish(self, state: RunState, summary: dict[str, Any]) -> None:
        """Write nothing."""
