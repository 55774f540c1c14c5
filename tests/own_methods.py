"""Methods of one's own, chosen by their import path: LoDA with something that a test needs."""

import os
import signal
from typing import Any

from training.methods.loda import LoDAMethod


class Unsaved(LoDAMethod):
    """LoDA that does not promise a complete state inside a task."""

    saves_open_task = False


class Signalled(LoDAMethod):
    """LoDA whose process gets a signal in a step: ``SIGNALLED="8 SIGTERM group"`` in its 8th."""

    steps = 0

    def step(self, *arguments: Any, **settings: Any) -> Any:
        """The step of LoDA, with the signal before it."""
        self.steps += 1
        number, name, to = os.environ.get("SIGNALLED", "0 SIGTERM process").split()
        if self.steps == int(number):
            sent = signal.Signals[name]
            if to == "group":
                os.killpg(0, sent)
            else:
                os.kill(os.getpid(), sent)
        return super().step(*arguments, **settings)
