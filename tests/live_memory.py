"""Bytes of the tensors that are alive, counted operator by operator."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors from their making to their end, and its peak.

    What an operator allocates and frees before it returns is not seen.

    Parameters
    ----------
    tensors : iterable of Tensor
        Already there, and counted from the beginning.
    apart : iterable of Tensor
        Already there, and never counted.
    """

    def __init__(self, tensors: Iterable[Tensor] = (), apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._apart = {tensor.untyped_storage()._cdata: tensor for tensor in apart}
        self._storages: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Not by torch's pytree, whose cycles of references would keep the tensors alive.
        for output in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(output, Tensor):
                self._count(output)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages or key in self._apart:
            return

        def end(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)
