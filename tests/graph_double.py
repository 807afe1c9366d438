"""A graph recorder for the CPU, as faithful as a host can be: it knows tensors and the ops between them, nothing else.

While a function is recorded, every aten op is noted with the very tensors that it reads and writes.  A replay runs
those ops on those tensors: what the function worked out in Python, or read from other tensors, is baked in, as it is
in a CUDA graph.  Results that recording left behind are spoiled, since a capture carries nothing out.
"""

from contextlib import nullcontext
from math import inf

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_READS_THE_HOST = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


class DoubleRecorder:
    """Counts what it has recorded; `refuse_after` recordings it raises, as a capture does."""

    is_promised, most_rows, most_logit_bytes = True, 64, inf

    def __init__(self, refuse_after=10**9):
        self.num_recorded = self.num_replayed = 0
        self.refuse_after = refuse_after
        self.nbytes = 0

    def record(self, run):
        if self.num_recorded >= self.refuse_after:
            raise RuntimeError("operation not permitted when stream is capturing")
        noting = _Noting()
        with torch.no_grad(), noting:
            run()
        self.num_recorded += 1
        for _, _, _, result in noting.ops:
            for x in tree_flatten(result)[0]:
                if isinstance(x, torch.Tensor) and x.data_ptr() in noting.made and x.is_floating_point():
                    x.fill_(float("nan"))

        def replay():
            self.num_replayed += 1
            for function, args, kwargs, result in noting.ops:
                again = function(*args, **kwargs)
                for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay

    def clone(self, x):
        return x.clone()

    def lent(self, x):
        return x

    def holding(self, alive):
        return nullcontext()

    def resize(self, most_bytes):
        pass

    def forget(self):
        pass


class _Noting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = []
        self.made = set()  # addresses of memory that was allocated meanwhile
        self._seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in _READS_THE_HOST:
            raise RuntimeError(f"{name} while a stream is captured")
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.made:
                self._seen.add(x.untyped_storage().data_ptr())
        result = function(*args, **kwargs)
        for x in tree_flatten(result)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self._seen:
                self.made.add(x.untyped_storage().data_ptr())
        self.ops.append((function, args, kwargs, result))
        return result
