"""Write a pass down as steps of compiled code.  In: a function of bfloat16 tensors.  Out: what carries it out again.

What CUDA calls a graph, for the host: while a function is recorded, calls of kernels and the few ops of torch that lie
between them become steps over the very addresses that they were given.  An op that is no step is refused, so nothing
of a function is ever left out.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zinfer.kernels.native.calls import Kernels, notes
from zinfer.kernels.native.signatures import STEPS
from zinfer.plan.cost import RECORDED_ROWS
from zinfer.units import MIB, round_up

_WORDS = 16  # of a step: its kind, and at most so many arguments less one
_ALIGNED = 64  # bytes
_LOGIT_BYTES = 2 * MIB  # of a few rows; those of many would take more than everything else that is recorded
_SPARE = 2  # a block may be so many times what is asked for
_aten = torch.ops.aten
_VIEWS = {
    _aten.alias.default,
    _aten.as_strided.default,
    _aten.detach.default,
    _aten.expand.default,
    _aten.permute.default,
    _aten.select.int,
    _aten.slice.Tensor,
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.squeeze.dim,
    _aten.t.default,
    _aten.transpose.int,
    _aten.unbind.int,
    _aten.unsqueeze.default,
    _aten.view.default,
}

Words = npt.NDArray[np.uint64]


class NotRecordableError(RuntimeError):
    """What a function does is not among the steps: it runs op by op, as ever."""


class Pool:
    """Memory that what is recorded uses while it runs; tensors that have died make room for later ones.

    Steps run in the order in which they were recorded, one caller at a time, so this is as good as memory of their own.
    What leads from one recording to the next is `lent`: it lies where it was written and keeps no place, so that as
    many recordings as there are places for weights need one pass's memory.  Whoever records says what is alive then.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._free: list[npt.NDArray[np.uint8]] = []
        self._blocks: list[npt.NDArray[np.uint8]] = []
        self.nbytes = 0  # of blocks and steps

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of unknown content.  Raises NotRecordableError where there is no room."""
        nbytes = prod(shape) * dtype.itemsize
        block = self._block(max(round_up(nbytes, _ALIGNED), _ALIGNED))
        view = block[:nbytes]
        weakref.finalize(view, self._free.append, block).atexit = False  # torch holds the view, not the block
        return torch.from_numpy(view).view(dtype).view(shape)

    def lent(self, x: Tensor) -> Tensor:
        """The same place, which others may take once the tensor that was taken has died; itself if it is elsewhere."""
        block = next((block for block in self._blocks if _lies_in(block, x)), None)
        if block is None:
            return x
        rest = block[x.data_ptr() - block.ctypes.data :]
        whole = rest[: len(rest) // x.itemsize * x.itemsize]
        return torch.from_numpy(whole).view(x.dtype).as_strided(x.shape, x.stride())

    @contextmanager
    def holding(self, alive: Iterable[Tensor]) -> Iterator[None]:
        """Nobody takes the places of these meanwhile."""
        places, blocks, self._free[:] = list(alive), list(self._free), []
        held = [block for block in blocks if any(_lies_in(block, x) for x in places)]
        names = {id(block) for block in held}
        self._free += [block for block in blocks if id(block) not in names]
        try:
            yield
        finally:
            self._free += held

    def charge(self, steps: Words) -> None:
        """Steps take memory until they are given up.  Raises NotRecordableError where there is no room."""
        self._grow(steps.nbytes)
        weakref.finalize(steps, self._shrink, steps.nbytes).atexit = False

    def _block(self, nbytes: int) -> npt.NDArray[np.uint8]:
        fitting = [at for at, block in enumerate(self._free) if nbytes <= block.nbytes <= _SPARE * nbytes]
        if fitting:
            return self._free.pop(min(fitting, key=lambda at: self._free[at].nbytes))
        self._grow(nbytes + _ALIGNED)
        raw = np.empty(nbytes + _ALIGNED, np.uint8)
        start = -raw.ctypes.data % _ALIGNED
        self._blocks.append(raw[start : start + nbytes])
        return self._blocks[-1]

    def _grow(self, nbytes: int) -> None:
        if self.nbytes + nbytes > self._most_bytes:
            raise NotRecordableError(
                f"recorded passes have {self._most_bytes} bytes, {nbytes} more are wanted"
            )
        self.nbytes += nbytes

    def _shrink(self, nbytes: int) -> None:
        self.nbytes -= nbytes


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The steps of what is done while this is entered; results are tensors of `pool` with nothing in them yet."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's own hook: to keep its compiler out it would import it, which takes two seconds of the first pass."""
        return False

    def __init__(self, pool: Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._steps: list[list[int]] = []
        self._noting = notes(self.note)

    def __enter__(self) -> Tape:
        self._noting.__enter__()
        return super().__enter__()  # type: ignore[no-untyped-call, no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._noting.__exit__(None, None, None)

    def note(self, name: str, *arguments: int | float | None) -> None:
        """One more step: addresses, sizes, and numbers by their bits."""
        words = [STEPS.index(name), *map(_word, arguments)]
        self._steps.append(words + [0] * (_WORDS - len(words)))

    def steps(self) -> Words:
        """All of them, [steps, words]."""
        return np.array(self._steps, np.uint64).reshape(-1, _WORDS)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Note what is a step; raises NotRecordableError for what is none."""
        if func in _VIEWS:
            return func(*args, **(kwargs or {}))
        if func not in _HANDLERS:
            raise NotRecordableError(f"{func} is no step of compiled code")
        return _HANDLERS[func](self, *args, **(kwargs or {}))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return self._pool.take(shape, dtype or torch.get_default_dtype())

    def _new_empty(
        self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None, **_: Any
    ) -> Tensor:
        return self._pool.take(shape, dtype or like.dtype)

    def _empty_like(self, like: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return self._pool.take(like.shape, dtype or like.dtype)

    def _add(self, x: Tensor, z: Tensor, *, alpha: float = 1) -> Tensor:
        _ask(x.dtype == z.dtype == torch.bfloat16 and x.shape == z.shape and alpha == 1, "a sum of rows")
        _ask(x.is_contiguous() and z.is_contiguous(), "a sum of whole tensors")
        y = self._empty_like(x)
        self.note("add", x.data_ptr(), z.data_ptr(), y.data_ptr(), x.numel())
        return y

    def _to(self, x: Tensor, *, dtype: torch.dtype | None = None, **how: Any) -> Tensor:
        _ask(x.dtype == torch.bfloat16 and dtype == torch.float32, "a wider copy")
        _ask(not any(how.values()), "a copy on the host")
        y = self._pool.take(x.shape, torch.float32)
        self._widen(x, y)
        return y

    def _widen(self, x: Tensor, y: Tensor) -> None:
        _ask(x.is_contiguous() and _has_whole_rows(y), "a wider copy of rows")
        self.note("widen", x.data_ptr(), y.data_ptr(), len(x), x[:1].numel(), y.stride(0))

    def _index_select(self, x: Tensor, dim: int, rows_N: Tensor) -> Tensor:
        y = self._pool.take((len(rows_N), *x.shape[1:]), x.dtype)
        self._move(y, x, dim, from_rows=rows_N)
        return y

    def _index_copy(self, y: Tensor, dim: int, rows_N: Tensor, x: Tensor) -> Tensor:
        x = x if _has_whole_rows(x) else self._clone(x)
        self._move(y, x, dim, to_rows=rows_N)
        return y

    def _copy(self, y: Tensor, x: Tensor, non_blocking: bool = False) -> Tensor:
        _ask(y.shape == x.shape, "a copy of as much as there is room for")
        if (x.dtype, y.dtype) == (torch.bfloat16, torch.float32):
            self._widen(x, y)
        else:
            self._move(y, x, 0)
        return y

    def _clone(self, x: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
        _ask(memory_format in (None, torch.preserve_format, torch.contiguous_format), "a copy of one piece")
        y = self._pool.take(x.shape, x.dtype)
        if x.dim() and _has_whole_rows(x):
            self._move(y, x, 0)
        else:
            self._move(y.flatten(0, -2), _flat(x), 0)
        return y

    def _move(
        self,
        y: Tensor,
        x: Tensor,
        dim: int,
        *,
        from_rows: Tensor | None = None,
        to_rows: Tensor | None = None,
    ) -> None:
        """Rows of x to rows of y; rows may lie apart, each is of one piece."""
        _ask(x.dtype == y.dtype and dim == 0 and x.dim() == y.dim() > 0, "a move of rows")
        _ask(x.shape[1:] == y.shape[1:] and all(map(_has_whole_rows, (x, y))), "a move of whole rows")
        rows = [None if index is None else index.data_ptr() for index in (from_rows, to_rows)]
        _ask(
            all(i is None or (i.dtype == torch.int64 and i.is_contiguous()) for i in (from_rows, to_rows)),
            "rows",
        )
        count = next((len(index) for index in (from_rows, to_rows) if index is not None), len(x))
        sizes = (x[:1].nbytes, *(part.stride(0) * part.itemsize for part in (x, y)))
        self.note("move", x.data_ptr(), y.data_ptr(), *rows, count, *sizes)


_HANDLERS: dict[Any, Callable[..., Tensor]] = {
    _aten.clone.default: Tape._clone,
    _aten.empty.memory_format: Tape._empty,
    _aten.new_empty.default: Tape._new_empty,
    _aten.empty_like.default: Tape._empty_like,
    _aten.add.Tensor: Tape._add,
    _aten._to_copy.default: Tape._to,
    _aten.index_select.default: Tape._index_select,
    _aten.index_copy_.default: Tape._index_copy,
    _aten.copy_.default: Tape._copy,
}


class TapeRecorder:
    """A GraphRecorder (zinfer.runtime.graph) for the host, in at most so much memory: what a budget had to spare."""

    is_promised, most_rows, most_logit_bytes = False, RECORDED_ROWS, float(_LOGIT_BYTES)

    def __init__(self, kernels: Kernels, most_bytes: int) -> None:
        self._kernels, self._most_bytes = kernels, most_bytes
        self.forget()

    @property
    def nbytes(self) -> int:
        """Memory of everything recorded."""
        return self._pool.nbytes

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """As GraphRecorder.record.  Raises NotRecordableError, also where there is no memory for it."""
        tape = Tape(self._pool)
        with torch.no_grad(), tape:
            run()
        steps = tape.steps()
        self._pool.charge(steps)
        return partial(_play, self._kernels, steps, self._pool)

    def clone(self, x: Tensor) -> Tensor:
        """The same numbers, in memory of the pool."""
        return self._pool.take(x.shape, x.dtype).copy_(x)

    def lent(self, x: Tensor) -> Tensor:
        """As Pool.lent."""
        return self._pool.lent(x)

    def holding(self, alive: Iterable[Tensor]) -> AbstractContextManager[None]:
        """As Pool.holding."""
        return self._pool.holding(alive)

    def resize(self, most_bytes: int) -> None:
        """So much memory after the next `forget`."""
        self._most_bytes = most_bytes

    def forget(self) -> None:
        """Nothing that was recorded is ever played again."""
        self._pool = Pool(self._most_bytes)


def _play(kernels: Kernels, steps: Words, _memory: Pool) -> None:
    """The steps; their memory lives as long as whoever may play them."""
    kernels.play(steps.ctypes.data, len(steps))


def _lies_in(block: npt.NDArray[np.uint8], x: Tensor) -> bool:
    """Whether a tensor begins in a block; it then ends there."""
    return 0 <= x.data_ptr() - block.ctypes.data < block.nbytes


def _word(argument: int | float | None) -> int:
    if isinstance(argument, float):
        return int(struct.unpack("<Q", struct.pack("<d", argument))[0])
    return argument or 0


def _has_whole_rows(x: Tensor) -> bool:
    return x.shape[0] == 0 or x[0].is_contiguous()


def _flat(x: Tensor) -> Tensor:
    """All but the last dimension as one, where that is a view."""
    strides = zip(x.stride()[:-2], x.shape[1:-1], x.stride()[1:-1], strict=True)
    is_even = x.dim() > 1 and all(outer == count * inner for outer, count, inner in strides)
    _ask(is_even, "rows at one distance from each other")
    return x.flatten(0, -2)


def _ask(is_so: bool, what: str) -> None:
    if not is_so:
        raise NotRecordableError(f"compiled code knows {what} in bfloat16 alone")
