"""Methods of one's own, chosen by their import path: LoDA with something that a test needs."""

import os
import signal
from typing import Any

from backends.torch import plain_step
from training.methods import Method
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


class Whole(Method):
    """A method that trains the backbone itself, without branches."""

    def start(self, model: Any, context: Any) -> None:
        """Unfreeze the model."""
        super().start(model, context)
        model.requires_grad_(True)

    def parameters(self) -> list[Any]:
        """Train everything."""
        return list(self.model.parameters())


class Alone:
    """A method that has all functions without being a `Method`."""

    def start(self, model: Any, context: Any) -> None:
        """Freeze the model."""
        model.requires_grad_(False)

    def begin_task(self, batches: Any) -> None:
        """Do nothing."""

    def parameters(self) -> list[Any]:
        """Train nothing but the heads."""
        return []

    def step(self, loss: Any, labels: Any, optimizer: Any, *, generator: Any, backward: Any) -> Any:
        """Take a plain step."""
        del generator
        return plain_step(loss, labels, optimizer, backward=backward)

    def end_task(self, batches: Any) -> None:
        """Leave no record."""

    def state_dict(self) -> dict[str, Any]:
        """Carry nothing over."""
        return {}

    def load_state_dict(self, state: Any) -> None:
        """Take nothing over."""
