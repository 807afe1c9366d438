"""Layers of encoders by compiled code.  In: weights of models of one shape, embedded rows.  Out: rows behind them.

A whole pass is one call, during which Python runs other threads, and texts are handed to whatever core is free.  The
slow twin is the composition of torch's operations in `models.encoder`; callers compare the two before this one serves.

Shape legend: m models, T token rows, S texts, M model dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from zinfer.kernels.native.build import library
from zinfer.log import logger
from zinfer.spec.records import ModelSpec, Op
from zinfer.units import round_up

_PANEL, _VECTOR = 32, 16
_PIECE_ROWS = 96  # activations of so many stay in a core's cache
_LAYER = ("q", "k", "v", "o", "up", "down")
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class _Layer(ctypes.Structure):
    """layer_t of encoder.c."""

    _fields_ = tuple((f"part_{at}", _POINTER) for at in range(14))


class _Task(ctypes.Structure):
    """task_t of encoder.c."""

    _fields_ = (
        *((name, _POINTER) for name in ("layers", "x", "y", "bounds", "pieces")),
        *(
            (name, _SIZE)
            for name in ("num_models", "num_layers", "num_pieces", "dim", "mlp", "heads", "width")
        ),
        *((name, _SIZE) for name in ("most_rows", "most_text")),
        *((name, ctypes.c_int32) for name in ("activation", "first_only")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


def serves(spec: ModelSpec) -> bool:
    """Whether the layers of a model can be computed here: their composition is known, and there is a compiler."""
    kinds = [op.kind for op in spec.program if 0 <= op.layer < spec.num_layers]
    is_plain = all(
        op.blocks == 1 and not op.stored and not op.transposed and op.normed == _is_normed(op)
        for op in spec.program
    )
    return (
        is_plain
        and kinds == [*_LAYER] * spec.num_layers
        and spec.dtype == "F32"
        and not spec.transposed
        and spec.num_heads == spec.num_kv_heads
        and spec.model_dim % _VECTOR == 0
        and spec.activation in _ACTIVATIONS
        and _code() is not None
    )


def _is_normed(op: Op) -> bool:
    """Norms stand behind residuals: a section begins with the one behind the section before it."""
    return op.kind in ("embed", "up", "pool") or (op.kind == "q" and op.layer > 0)


class EncoderLayers:
    """The layers of models of one shape, packed.  Weights are copied: `nbytes`.  Safe to call from several threads."""

    def __init__(self, spec: ModelSpec, models: Sequence[Mapping[str, Tensor]]) -> None:
        self.spec, self.num_models = spec, len(models)
        parts = [list(_parts(spec, layer, weights)) for weights in models for layer in range(spec.num_layers)]
        self._kept = parts  # the structures below only point at them
        self._layers = (_Layer * len(parts))(*(_Layer(*(one.data_ptr() for one in some)) for some in parts))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(part.nbytes for some in self._kept for part in some)

    def run(
        self, x_TM: Tensor, bounds: Sequence[int], num_models: int, *, first_only: bool, lanes: int
    ) -> Tensor:
        """Rows behind the last layer and its norm, by the first `num_models` models: fp32 [m, T, M].

        With `first_only` [m, S, M]: each text's first row, and of the last layer no other is computed.  `x_TM` is what
        the embeddings give, texts lie at `bounds`, at most about `lanes` cores compute.  Raises MemoryError.
        """
        assert num_models <= self.num_models, "a prefix of what was packed"
        x_TM = x_TM.contiguous()
        pieces = _pieces(bounds)
        num_rows = len(bounds) - 1 if first_only else len(x_TM)
        y_mRM = torch.empty(num_models, num_rows, self.spec.model_dim)
        starts = (ctypes.c_int64 * len(bounds))(*bounds)
        begins = (ctypes.c_int64 * len(pieces))(*pieces)
        task = _Task(
            ctypes.addressof(self._layers),
            x_TM.data_ptr(),
            y_mRM.data_ptr(),
            ctypes.addressof(starts),
            ctypes.addressof(begins),
            num_models,
            self.spec.num_layers,
            len(pieces) - 1,
            self.spec.model_dim,
            self.spec.mlp_dim,
            self.spec.num_heads,
            round_up(self.spec.head_dim, _VECTOR),
            max(bounds[stop] - bounds[start] for start, stop in pairwise(pieces)),
            max(stop - start for start, stop in pairwise(bounds)),
            _ACTIVATIONS[self.spec.activation],
            first_only,
            self.spec.norm_eps,
            self.spec.head_dim**-0.5,
        )
        code = _code()
        assert code is not None, "whoever packs has asked `serves`"
        if code.zinfer_encoder_layers(ctypes.byref(task), lanes):
            raise MemoryError("no memory for the activations of a pass")
        return y_mRM


def packed_bytes(spec: ModelSpec) -> int:
    """About what `EncoderLayers` of one model will hold."""
    dim, mlp = round_up(spec.model_dim, _PANEL), round_up(spec.mlp_dim, _PANEL)
    inner = round_up(spec.num_heads * round_up(spec.head_dim, _VECTOR), _PANEL)
    return 4 * spec.num_layers * (4 * dim * inner + 2 * dim * mlp + 6 * dim + 3 * inner + mlp)


def _pieces(bounds: Sequence[int]) -> list[int]:
    """Numbers of the texts with which pieces begin, and the number of texts."""
    found = [0]
    for text in range(1, len(bounds) - 1):
        if bounds[text + 1] - bounds[found[-1]] > _PIECE_ROWS:
            found.append(text)
    return [*found, len(bounds) - 1]


def _parts(spec: ModelSpec, layer: int, weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The fields of layer_t, in order."""
    ops = {op.kind: op for op in spec.program if op.layer == layer}
    after = next(op for op in spec.program if op.layer == layer + 1)

    def part(op: Op, role: str) -> Tensor | None:
        return next((weights[one.name].float() for one in op.weights if one.role == role), None)

    def product(*kinds: str) -> Iterator[Tensor]:
        matrices = [one for kind in kinds if (one := part(ops[kind], "matrix")) is not None]
        found = [part(ops[kind], "bias") for kind in kinds]
        biases = [one.new_zeros(len(one)) if b is None else b for one, b in zip(matrices, found, strict=True)]
        if kinds[0] in ("q", "k"):
            matrices, biases = ([_heads(one, spec) for one in some] for some in (matrices, biases))
        if kinds == ("o",):
            matrices = [_heads(one.t(), spec).t() for one in matrices]
        yield _panels(torch.cat(matrices))
        yield _padded(torch.cat(biases))

    def norm(op: Op) -> Iterator[Tensor]:
        yield from (one.clone() for role in ("norm", "norm_bias") if (one := part(op, role)) is not None)

    for kinds in (("q",), ("k", "v"), ("o",)):
        yield from product(*kinds)
    yield from norm(ops["up"])
    for kind in ("up", "down"):
        yield from product(kind)
    yield from norm(after)


def _heads(rows: Tensor, spec: ModelSpec) -> Tensor:
    """Rows of all heads, those of each filled up with zeros to whole vectors."""
    missing = -spec.head_dim % _VECTOR
    by_head = rows.reshape(spec.num_heads, spec.head_dim, *rows.shape[1:])
    fill = by_head.new_zeros(spec.num_heads, missing, *rows.shape[1:])
    return torch.cat((by_head, fill), 1).flatten(0, 1)


def _panels(matrix_OI: Tensor) -> Tensor:
    """[O / 32, I, 32], zeros behind the last output."""
    outputs, inputs = matrix_OI.shape
    whole = matrix_OI.new_zeros(round_up(outputs, _PANEL), inputs)
    whole[:outputs] = matrix_OI
    return whole.view(-1, _PANEL, inputs).transpose(1, 2).contiguous()


def _padded(bias_O: Tensor) -> Tensor:
    whole = bias_O.new_zeros(round_up(len(bias_O), _PANEL))
    whole[: len(bias_O)] = bias_O
    return whole


@cache
def _code() -> ctypes.CDLL | None:
    """Compiled and loaded once per process."""
    path = library(("encoder.c",), ("-ffp-contract=fast",))
    if path is None:
        return None
    try:
        code = ctypes.CDLL(str(path))
        code.zinfer_encoder_layers.argtypes = [_POINTER, _SIZE]
        code.zinfer_encoder_layers.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        logger.warning("the compiled encoder does not load (%s): slower torch code replaces it", error)
        return None
    return code
