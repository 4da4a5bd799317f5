"""Count the operators of a step that would launch a GPU kernel, and those that wait for the GPU.

On a GPU, the host spends a few microseconds on every launch, independent of the tensors' size. The count does
not depend on the device, so a CPU run shows the launch overhead of a GPU's host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# These operators only allocate memory or return a view of it, so they launch no kernel.
_WITHOUT_KERNEL = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided detach alias lift_fresh set_ resize_"
    " record_stream is_same_size _reshape_alias _unsafe_view unbind split split_with_sizes chunk".split()
)
# `.item()`, `bool(tensor)` and `.tolist()` call this operator: the host waits for all launched kernels.
_WAITING = "_local_scalar_dense"


class LaunchCounter(TorchDispatchMode):
    """A context that counts the operators of this thread, in the forward and the backward pass.

    Attributes:
        launches: calls by operator name, without views and allocations.
        waits: number of times that the host reads a device value and so waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits = 0

    @property
    def total(self) -> int:
        """Total number of launches."""
        return self.launches.total()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` and count it."""
        name = func.overloadpacket.__name__
        if name == _WAITING:
            self.waits += 1
        elif not func.is_view and name not in _WITHOUT_KERNEL:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


def count_launches(call: Callable[[], object]) -> LaunchCounter:
    """Run `call` once and return its launch counts."""
    with LaunchCounter() as counter:
        call()
    return counter
