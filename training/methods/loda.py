"""LoDA and its ablations."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from backends.torch.settings import LoDASettings
from training.methods.base import Context, Method, aligned_radius

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import TaskRecord

Directions = Literal["solved", "random"]


class LoDAMethod(Method):
    """LoDA (arXiv:2603.00191); its options switch its parts off one by one.

    Parameters
    ----------
    gao
        Take gradient-aligned steps; false takes plain ones.
    radius
        Largest length of the look-ahead of a gradient-aligned step.
    directions
        solved (from the second moments), or random, the control that shows what solving is worth.
    rank
        Number of directions of each branch, r.
    heldout
        Log how well the chosen directions do on images that they were not chosen on.
    **settings
        The other fields of LoDASettings.
    """

    saves_open_task = True
    sums_over_processes = True

    # jsonargparse follows **settings into LoDASettings, so its fields are options of this method.
    # rank and heldout have other defaults than LoDASettings, whose defaults are the paper's:
    # experiments start on small backbones, and their log is read.
    def __init__(
        self,
        *,
        gao: bool = True,
        radius: float = 0.3,
        directions: Directions = "solved",
        rank: int = 16,
        heldout: bool = True,
        **settings: Any,
    ) -> None:
        # The training loop keeps batch norms in evaluation mode whatever the method.
        self.settings = LoDASettings(
            rank=rank, heldout=heldout, radius=radius, freeze_statistics=True, **settings
        )
        self.radius = aligned_radius(gao, radius)
        self.directions = directions

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach LoDA to a model."""
        from backends.torch import LoDA

        self.loda = LoDA(model, self.settings, record_moments=True, reduce=context.reduce)
        super().start(model, context)

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions of the branches."""
        self.loda.begin_task(batches, bases=self._random_bases())

    def parameters(self) -> "list[nn.Parameter]":
        """The tensors of the branches."""
        return self.loda.lora_parameters()

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Recalibrate and merge."""
        return self.loda.end_task(batches)

    def state_dict(self) -> "dict[str, Tensor]":
        """The history of second moments, and the branches of an open task."""
        return self.loda.state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load the history, and the branches of an open task."""
        self.loda.load_state_dict(state)

    def _random_bases(self) -> "dict[str, dict[str, Tensor]] | None":
        if self.directions == "solved":
            return None
        from backends.torch import find_layers, random_bases

        tasks = self.loda.tasks
        return random_bases(
            self.settings,
            find_layers(self.model, self.settings.target),
            first_task=tasks == 0,
            generator=self.generator(tasks),
        )


class NullLoRA(LoDAMethod):
    """Only an isolated branch, in the null space of the old tasks: what LoDA argues against.

    The update does not change outputs on old inputs, as far as their moment has a null space. The
    first task has no past and trains a general branch, as in LoDA. Branches that are alone have
    twice the weight that they have in LoDA, as `LoDASettings` says, so a step moves further.

    Parameters
    ----------
    gao
        Take gradient-aligned steps; false takes plain ones.
    **settings
        The other options of LoDAMethod.
    """

    def __init__(self, *, gao: bool = False, **settings: Any) -> None:
        super().__init__(
            gao=gao,
            branches="isolated",
            isolated="null",
            # Without a general branch nothing is recalibrated, and the null space has neither
            # ridge nor floor. Fixed here, these are not offered as options without effect.
            recalibration="none",
            joint=False,
            gamma=LoDASettings.gamma,
            history_weight=LoDASettings.history_weight,
            ridge=LoDASettings.ridge,
            ridge_scale=LoDASettings.ridge_scale,
            energy_floor=LoDASettings.energy_floor,
            **settings,
        )
