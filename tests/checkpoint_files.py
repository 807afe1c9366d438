"""Small checkpoint folders for tests, written byte by byte: headers that lie are as easy as true ones."""

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np

from zinfer.spec.records import Op, RowLookup, WeightRef

WIDTHS = {"BF16": 2, "F16": 2, "F32": 4, "U8": 1}


def header_fields(shapes, dtype="BF16"):
    """What an honest header says of tensors that lie in this order."""
    fields, at = {}, 0
    for name, shape in shapes.items():
        end = at + math.prod(shape) * WIDTHS[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return fields


def safetensors_bytes(fields, data=None, pad=0):
    """A file: `fields` as its header (bytes are taken as they are), then the data, honest in length by default."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    text += b" " * pad
    if data is None:
        ends = [field["data_offsets"][1] for name, field in fields.items() if name != "__metadata__"]
        data = np.random.default_rng(len(text)).integers(0, 255, max(ends, default=0), np.uint8).tobytes()
    return len(text).to_bytes(8, "little") + text + data


def write_folder(folder, shards, config=None, weight_map=None, pad=0, dtype="BF16"):
    """A folder with one `shards` entry per file: name -> {tensor: shape}; an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "none"}))
    for name, shapes in shards.items():
        (folder / name).write_bytes(safetensors_bytes(header_fields(shapes, dtype), pad=pad))
    if weight_map is None and len(shards) > 1:
        weight_map = {tensor: name for name, shapes in shards.items() for tensor in shapes}
    if weight_map is not None:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cuts(num_rows, blocks):
    """Even row blocks."""
    return pairwise(num_rows * block // blocks for block in range(blocks + 1))


def tiny_spec(layers=2, width=24, mlp=40, vocab=50, blocks=2, tied=False, head_blocks=1):
    """A made-up decoder: odd sizes, norms and biases, one matrix cut into blocks, a head."""
    program, index = [], 0

    def op(kind, layer, *weights, block=0, count=1):
        nonlocal index
        program.append(Op(index, kind, layer, tuple(weights), block, count))
        index += 1

    def rows(name, start, stop, *rest, role="matrix"):
        return WeightRef(role, name, start, stop, (stop - start, *rest))

    op("embed", -1)
    for layer in range(layers):
        stem = f"layers.{layer}."
        op(
            "q",
            layer,
            rows(f"{stem}norm", 0, width, role="norm"),
            rows(f"{stem}q", 0, width, width),
            rows(f"{stem}q.bias", 0, width, role="bias"),
        )
        for block, (start, stop) in enumerate(cuts(mlp, blocks)):
            op("up", layer, rows(f"{stem}up", start, stop, width), block=block, count=blocks)
        op("down", layer, rows(f"{stem}down", 0, width, mlp))
    norms = [rows("norm", 0, width, role="norm")]
    for block, (start, stop) in enumerate(cuts(vocab, head_blocks)):
        head = rows("embed" if tied else "head", start, stop, width)
        op("head", layers, *norms, head, block=block, count=head_blocks)
        norms = []
    lookups = (RowLookup("tokens", "embed", vocab, width), RowLookup("positions", "positions", 9, width))
    return SimpleNamespace(
        program=tuple(program), lookups=lookups, tied_head=tied, transposed=False, unread=()
    )
