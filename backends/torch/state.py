"""What LoDA is between two calls: its history, an open task, and both as flat tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backends.torch._checks import check_state
from backends.torch.adapt import check_rank, find_layers
from backends.torch.lora import LoRALinear
from backends.torch.moments import Forward, default_forward
from backends.torch.processes import Reduce
from backends.torch.session import OpenTask
from backends.torch.settings import LoDASettings


class LoDAState:
    """The part of :class:`LoDA` that holds; its parameters and attributes are explained there."""

    def __init__(
        self,
        model: nn.Module,
        settings: LoDASettings | None = None,
        *,
        trainable: Sequence[str] = (),
        forward: Forward = default_forward,
        reduce: Reduce | None = None,
    ) -> None:
        self.model = model
        self.settings = settings or LoDASettings()
        self.trainable = tuple(trainable)
        self.forward = forward
        self.reduce = reduce
        self.history: dict[str, Tensor] = {}
        self.tasks = 0
        self._open: OpenTask | None = None
        check_rank(find_layers(model, self.settings.target), self.settings.rank)

    @property
    def layers(self) -> dict[str, LoRALinear]:
        """The adapted layers during a task; empty between tasks."""
        return {} if self._open is None else self._open.layers

    def lora_parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches that are trained in the open task."""
        layers = self._task().layers.values()
        return [p for layer in layers for p in layer.parameters() if p.requires_grad]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Everything of the model that is trained in the open task."""
        self._task()
        return [p for p in self.model.parameters() if p.requires_grad]

    def state_dict(self) -> dict[str, Tensor]:
        """Flat state: tasks done, the history, and the branches of an open task.

        The model's own weights are not in it; save them beside it.
        """
        state = {"tasks": torch.tensor(self.tasks)}
        state.update({f"history/{name}": moment for name, moment in self.history.items()})
        return state if self._open is None else state | self._open.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state made by :meth:`state_dict` under the same settings.

        Parameters
        ----------
        state : mapping of str to Tensor
            Copied to the device of the model.

        Raises
        ------
        RuntimeError
            If a task is open.
        ValueError
            If the state belongs to other layers, or an open task to other settings.
        """
        self._require_closed()
        found = find_layers(self.model, self.settings.target)
        tasks, is_open = check_state(self.settings, found, state)
        if is_open:
            self._open = self._attach(first=tasks == 0)
            self._open.load_state_dict(state)
        self.history = {
            name: state[f"history/{name}"].to(layer.weight.device, copy=True)
            for name, layer in found.items()
            if tasks > 0
        }
        self.tasks = tasks

    def _attach(self, *, first: bool) -> OpenTask:
        return OpenTask(
            self.model,
            self.settings,
            self.trainable,
            self.forward,
            first=first,
            reduce=self.reduce,
        )

    def _task(self) -> OpenTask:
        if self._open is None:
            msg = "no task is open: call begin_task first"
            raise RuntimeError(msg)
        return self._open

    def _close(self) -> None:
        self._task().close()
        self._open = None

    def _require_closed(self) -> None:
        if self._open is not None:
            msg = "a task is open already: call end_task (or abandon_task) first"
            raise RuntimeError(msg)
