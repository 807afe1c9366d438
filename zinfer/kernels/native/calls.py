"""Run the compiled kernels.  In: bfloat16 tensors on the host.  Out: tensors, in bfloat16; forward only.

They serve where they were compiled, load, and are right on a small case each.  A row's bits depend on the row alone.
What a thread calls while it `notes` is written down and not carried out (`zinfer.kernels.native.tape`).
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from zinfer.kernels.native import trials
from zinfer.kernels.native.build import library
from zinfer.kernels.native.signatures import FLAGS, POINTER, PRODUCTS, ROW_KERNELS, SIZE, SOURCES, THREADS
from zinfer.kernels.panels import QuantWeight
from zinfer.kernels.remembered import remembered
from zinfer.log import logger
from zinfer.spec.cost import packed_rows
from zinfer.spec.quant import GROUP

MOST_INPUTS = 2**16  # of a dense product, whose threads keep some rows on their stacks
_VECTOR, _MOST_DIM, _MOST_QUERIES, _MOST_ELEMENTS = 16, 256, 64, 8192  # attention.c
_MATRIX_VECTOR, _MATRIX_QUERIES, _MATRIX_ELEMENTS = 32, 256, 16384  # amx_attention.c
_OPENMP = ("libgomp", "libiomp5", "libomp")
NUMBERS = 2**16  # of bfloat16
Note = Callable[..., None]  # the name of a step and its arguments but the number of threads
_noting = threading.local()


@contextmanager
def notes(note: Note) -> Iterator[None]:
    """Inside, this thread's calls of kernels go to `note`; nothing is computed, results hold whatever lay there."""
    _noting.note = note
    try:
        yield
    finally:
        _noting.note = None


def is_noting() -> bool:
    """Whether this thread's calls are written down at the moment."""
    return getattr(_noting, "note", None) is not None


@cache
def kernels() -> Kernels | None:
    """Compiled, loaded and found right once per library and machine; None, and said once, where that fails.

    What was found wrong is tried again.  A library that is trusted to be run is trusted to be the one that was tried.
    """
    path, threads = library(SOURCES, FLAGS), _openmp()
    if path is None or threads is None:
        return None
    try:
        found = Kernels(path, threads)
        wrong = remembered(_as_it_is(path), lambda answer: answer == "", lambda: trials.wrong(found))
    except (OSError, AttributeError) as error:
        logger.warning("the compiled kernels do not load (%s): slower torch code replaces them", error)
        return None
    if wrong:
        logger.warning("the compiled kernels give wrong numbers (%s): slower torch code replaces them", wrong)
        return None
    return found


def _as_it_is(path: Path) -> str:
    """The library and what calls it: whatever may be wrong in one of them, and was not when they were tried."""
    found, files = path.stat(), (Path(__file__), Path(trials.__file__))
    caller = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return f"compiled kernels {path.name} {found.st_size} {found.st_mtime_ns} {caller[:16]}"


class Kernels:
    """The library at `path`, on the threads of the OpenMP library that torch uses: a pool of its own would fight
    with torch's for the cores.

    Raises OSError or AttributeError where it does not load.
    """

    def __init__(self, path: Path, threads: Path) -> None:
        ctypes.CDLL(str(threads), mode=ctypes.RTLD_GLOBAL)  # the library takes its names from there
        self._code = ctypes.CDLL(str(path))
        self.has_products = bool(self._code.zinfer_has_products())  # not every processor has what those need
        for name, kinds in (ROW_KERNELS | (PRODUCTS if self.has_products else {})).items():
            function = getattr(self._code, name)
            function.argtypes, function.restype = kinds, None
        self.has_amx = self.has_products and bool(self._code.zinfer_has_amx())
        self._code.zinfer_play.argtypes, self._code.zinfer_play.restype = [POINTER, SIZE, THREADS], None

    def allow_amx(self, is_wanted: bool) -> None:
        """Whether products may use the matrix unit where there is one (`has_amx`): the vector unit, their slow twin,
        gives other bits.  For tests and timings."""
        if self.has_products:
            self._code.zinfer_allow_amx(is_wanted)

    def play(self, tape: int, num_steps: int) -> None:
        """Carry out the steps that lie at address `tape`, in their order."""
        self._code.zinfer_play(tape, num_steps, torch.get_num_threads())

    def _do(self, name: str, *arguments: int | float | None) -> None:
        note: Note | None = getattr(_noting, "note", None)
        if note is None:
            getattr(self._code, name)(*arguments, torch.get_num_threads())
        else:
            note(name, *arguments)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        self._do(
            "zinfer_norm",
            x.data_ptr(),
            weight.data_ptr(),
            y.data_ptr(),
            eps,
            x.numel() // width,
            width,
        )
        return y

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Layer norm over the last dimension."""
        x, width = x.contiguous(), x.shape[-1]
        y = torch.empty_like(x)
        parts = [None if part is None else part.contiguous() for part in (weight, bias)]
        self._do(
            "zinfer_layer_norm",
            x.data_ptr(),
            *(None if part is None else part.data_ptr() for part in parts),
            y.data_ptr(),
            eps,
            x.numel() // width,
            width,
        )
        return y

    def rotate(self, x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary positions, cos and sin [T, rotary_dim / 2]; heads and rows may be views with strides."""
        if x_THD.stride(2) != 1:
            x_THD = x_THD.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        y_THD = torch.empty(x_THD.shape, dtype=x_THD.dtype)
        self._do(
            "zinfer_rotate",
            x_THD.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            y_THD.data_ptr(),
            x_THD.stride(0),
            x_THD.stride(1),
            *x_THD.shape,
            cos.shape[1],
        )
        return y_THD

    def activated(self, x: Tensor, table: Tensor | None) -> Tensor:
        """What `table` [65536] has for the bits of each element; None: ReLU, which needs none."""
        x = x.contiguous()
        y = torch.empty_like(x)
        self._do(
            "zinfer_activate",
            x.data_ptr(),
            None if table is None else table.data_ptr(),
            y.data_ptr(),
            x.numel(),
        )
        return y

    def gated(self, gate_TF: Tensor, up_TF: Tensor, table: Tensor | None) -> Tensor:
        """`activated(gate)` * up; both may be columns of a wider matrix."""
        y_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype)
        self._do(
            "zinfer_gate",
            gate_TF.data_ptr(),
            up_TF.data_ptr(),
            None if table is None else table.data_ptr(),
            y_TF.data_ptr(),
            gate_TF.stride(0),
            up_TF.stride(0),
            *gate_TF.shape,
        )
        return y_TF

    def largest(self, x_SV: Tensor) -> tuple[Tensor, Tensor]:
        """Of every row of float32 numbers the largest and its place (int64), of equals the first; the first NaN."""
        x_SV, num_rows = x_SV.contiguous(), len(x_SV)
        tops_S, ids_S = torch.empty(num_rows), torch.empty(num_rows, dtype=torch.long)
        where = (x_SV.data_ptr(), ids_S.data_ptr(), tops_S.data_ptr())
        self._do("zinfer_largest", *where, num_rows, x_SV.shape[1])
        return tops_S, ids_S

    @staticmethod
    def attends(heads: int, kv_heads: int, dim: int) -> bool:
        """Whether `attend` takes heads of that kind."""
        group = heads // kv_heads
        is_few = group <= _MOST_QUERIES and group * dim <= _MOST_ELEMENTS
        return dim % _VECTOR == 0 and dim <= _MOST_DIM and is_few

    def tile_rows(self, heads: int, kv_heads: int, dim: int) -> int:
        """Rows of a sequence that `attend` wants in a tile: more are cut there, fewer leave a unit idle."""
        group = heads // kv_heads
        if self.has_amx and dim % _MATRIX_VECTOR == 0:
            return min(_MATRIX_QUERIES // group, _MATRIX_ELEMENTS // (group * dim))
        return min(_MOST_QUERIES // group, _MOST_ELEMENTS // (group * dim))

    def attend(
        self,
        q_SHD: Tensor,
        k_nKD: Tensor,
        v_nKD: Tensor,
        table: Tensor,
        lengths: Tensor,
        page_tokens: int,
        *,
        scale: float,
        window: int | None,
        cap: float,
        tiles: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Softmax over the keys that each row sees: token t of row s lies in slot t % page_tokens of page table[s, t //
        page_tokens]; it sees lengths[s] tokens, or the last `window` of them.  [S, H, D].

        With `tiles` (bounds [N + 1], lines [N], int32), rows bounds[i] to bounds[i + 1] - 1, best `tile_rows` of
        them, are of one sequence, whose pages stand in line lines[i] of the table.
        """
        q_SHD, table, lengths = q_SHD.contiguous(), table.contiguous(), lengths.contiguous()
        y_SHD = torch.empty_like(q_SHD)
        num_rows, heads, dim = q_SHD.shape
        where = [x.data_ptr() for x in (q_SHD, k_nKD, v_nKD, table, lengths)]
        name, num_tiles = "zinfer_attend", num_rows
        if tiles is not None:
            name, num_tiles = "zinfer_attend_tiles", len(tiles[1])
            where += [part.data_ptr() for part in tiles]
        sizes = (table.shape[1], num_tiles, heads, k_nKD.shape[1], dim, page_tokens)
        self._do(name, *where, y_SHD.data_ptr(), scale, cap, window or 0, *sizes)
        return y_SHD

    def dense(
        self,
        x_TI: Tensor,
        weight_OI: Tensor,
        bias: Tensor | None = None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        """x times the transposed weight, its rows one after the other, plus bias: [T, O].  I is at most MOST_INPUTS.

        In `into_TO` where that is given: columns of a wider matrix, also of one in float32.
        """
        (num_rows, inputs), outputs = x_TI.shape, weight_OI.shape[0]
        packed = packed_rows(num_rows, inputs)
        scratch = x_TI.new_empty(packed) if any(packed) else None
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(num_rows, outputs) if into_TO is None else into_TO
        where = [None if part is None else part.data_ptr() for part in (x_TI, weight_OI, bias, y_TO, scratch)]
        is_wide = y_TO.dtype == torch.float32
        self._do("zinfer_dense", *where, num_rows, outputs, inputs, y_TO.stride(0), is_wide)
        return y_TO

    def lossless(
        self,
        x_TI: Tensor,
        parts: Sequence[Tensor],
        outputs: int,
        bias: Tensor | None = None,
        into_TO: Tensor | None = None,
    ) -> Tensor:
        """`dense` with a weight that is packed without loss: its rest, codes and exponents (`zinfer.spec.lossless`)."""
        num_rows, inputs = x_TI.shape
        packed = packed_rows(num_rows, inputs)
        scratch = x_TI.new_empty(packed) if any(packed) else None
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(num_rows, outputs) if into_TO is None else into_TO
        tensors = (x_TI, *parts, bias, y_TO, scratch)
        where = [None if part is None else part.data_ptr() for part in tensors]
        is_wide = y_TO.dtype == torch.float32
        self._do("zinfer_lossless", *where, num_rows, outputs, inputs, y_TO.stride(0), is_wide)
        return y_TO

    def unpack(self, parts: Sequence[Tensor], outputs: int) -> Tensor:
        """Such a weight as it was: bf16 [O, I]."""
        inputs = parts[0].shape[-1]
        y_OI = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        where = [part.data_ptr() for part in parts]
        self._do("zinfer_unpack", *where, y_OI.data_ptr(), outputs, inputs)
        return y_OI

    def pack(self, matrix_OI: Tensor, parts: Sequence[Tensor]) -> int:
        """Fill `parts` with such a weight; returns how many exceptions the tile with most of them has."""
        outputs, inputs = matrix_OI.shape
        most, matrix_OI = torch.empty(1, dtype=torch.long), matrix_OI.contiguous()
        where = [part.data_ptr() for part in (matrix_OI, *parts, most)]
        self._do("zinfer_pack", *where, outputs, inputs)
        return int(most)

    def columns(self, x_TI: Tensor, weight_IO: Tensor, bias: Tensor | None = None) -> Tensor:
        """x times a weight that is published the other way round, plus bias: [T, O]."""
        num_rows, inputs = x_TI.shape
        x_TI = x_TI.contiguous()
        y_TO = x_TI.new_empty(num_rows, weight_IO.shape[1])
        where = [None if part is None else part.data_ptr() for part in (x_TI, weight_IO, bias, y_TO)]
        self._do("zinfer_columns", *where, num_rows, weight_IO.shape[1], inputs)
        return y_TO

    def quant(self, x_TI: Tensor, weight: QuantWeight) -> Tensor:
        """x times a quantised weight on its packed bytes: [T, O]."""
        num_rows, inputs = x_TI.shape
        x_TI, scales = x_TI.contiguous(), weight.scales.contiguous()
        y_TO = x_TI.new_empty(num_rows, weight.outputs)
        packed = torch.empty(num_rows * inputs * 2 + num_rows * inputs // GROUP * 4, dtype=torch.uint8)
        self._do(
            "zinfer_quant",
            x_TI.data_ptr(),
            weight.nibbles.data_ptr(),
            None if weight.low is None else weight.low.data_ptr(),
            scales.data_ptr(),
            y_TO.data_ptr(),
            packed.data_ptr(),
            num_rows,
            weight.outputs,
            inputs,
            weight.panel // 2,
            weight.nibbles.shape[0],
        )
        return y_TO


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    loaded = sorted({line.split(maxsplit=5)[-1] for line in lines if "/" in line})
    of_torch = [Path(name) for name in loaded if Path(name).name.startswith(_OPENMP)]
    beside_torch = [path for path in of_torch if "torch" in path.parts]
    return next(iter(beside_torch or of_torch), None)
