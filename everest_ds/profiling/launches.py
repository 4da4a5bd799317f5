"""Count the operators of a step that would launch a kernel on a GPU, and those that wait for it.

On a GPU, the host pays a few microseconds for every launch, whatever the size of its tensors. The count does
not depend on the device, so a CPU shows what the host of a GPU has to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# These operators return memory or another look at it; no kernel runs.
_WITHOUT_KERNEL = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided detach alias lift_fresh set_ resize_"
    " record_stream is_same_size _reshape_alias _unsafe_view unbind split split_with_sizes chunk".split()
)
# `.item()`, `bool(tensor)` and `.tolist()` end here: the host waits for everything that was launched.
_WAITING = "_local_scalar_dense"


class LaunchCounter(TorchDispatchMode):
    """Count operators while this context is active, in the forward and the backward pass of this thread.

    Attributes:
        launches: calls by operator name, views and allocations left out.
        waits: reads of a device value by the host, each of which waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits = 0

    @property
    def total(self) -> int:
        """All launches."""
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
    """Return the counts of one call."""
    with LaunchCounter() as counter:
        call()
    return counter
