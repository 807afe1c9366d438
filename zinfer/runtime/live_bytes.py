"""Count the bytes of tensors alive.  In: torch operations run under the counter.  Out: bytes now, and their peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which every storage that an operation creates is counted until it dies.

    `now` and `peak` are bytes; storages that existed before (weights, caches, pages) count only when `adopt`ed.
    What a kernel allocates for itself within one operation is not seen.  Used by one thread.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own hook: to keep its compiler out it would import it, which takes two seconds."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made outside."""
        for tensor in tensors:
            self._count(tensor.untyped_storage())

    def reset_peak(self) -> int:
        """Return the peak so far and begin a new one at what is alive."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and count what it returned, unless it is a view of what was there."""
        kwargs = kwargs or {}
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given:
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes()

        def forget(_: object) -> None:
            if self._seen.pop(key, None) is not None:
                self.now -= nbytes

        self._seen[key] = weakref.ref(storage, forget)
        self.now += nbytes
        self.peak = max(self.peak, self.now)


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address
