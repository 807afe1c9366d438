"""The symbolic activation peak against a count of live bytes in a real pass."""

from itertools import product
from math import prod

import pytest
import torch
from fakes import DenseKv, op_weights
from published import gpt2, llama, neox, opt, phi3, qwen3

from zinfer.kernels.products import with_product_sizes
from zinfer.kernels.stored import layout_here
from zinfer.layers.packed import Packed
from zinfer.models.decoder import Flow, run_op
from zinfer.runtime.live_bytes import LiveBytes
from zinfer.spec.cost import activation_bytes, activation_peak_bytes, packed_rows
from zinfer.spec.lossless import LOSSLESS
from zinfer.spec.program import matrix_shape
from zinfer.spec.quant import FORMATS
from zinfer.spec.read import read_spec
from zinfer.spec.stored import as_stored, workspace_bytes

ROWS = 272
CONFIGS = {
    "llama": llama(256, 704, 2, 4, 2, 500),
    "qwen3": qwen3(256, 704, 2, 8, 500, head_dim=32),
    "phi3": phi3(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=500,
        sliding_window=None,
    ),
    "opt": opt(256, 1024, 2, 4, vocab_size=500),
    "opt-350m": opt(256, 1024, 2, 4, vocab_size=500, do_layer_norm_before=False, word_embed_proj_dim=128),
    "gpt2": gpt2(256, 2, 4) | {"vocab_size": 500},
    "neox": neox(256, 1024, 2, 4, 500),
    "neox-sequential": neox(256, 1024, 2, 4, 500, use_parallel_residual=False),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def measure(spec, tensors, num_logits, exact):
    """Live bytes per op kind, (most while it ran, left after it); what the cache keeps is taken off."""
    kv = DenseKv(spec.num_layers, 1)
    kv.begin([0], (0, ROWS))
    rows = torch.arange(ROWS)
    batch = Packed(rows, rows, (0, ROWS), (0,), rows[ROWS - num_logits :])
    result = {}
    flow = Flow()
    with torch.no_grad(), LiveBytes() as live:
        for lookup in spec.lookups:
            flow.rows[lookup.role] = torch.zeros(ROWS, lookup.width, dtype=dtype_of(spec))
        for op in spec.program:
            live.reset_peak()
            run_op(op, spec, flow, op_weights(op, tensors), batch, kv, exact=exact)
            batch.memo.clear()  # counted apart: arranged_bytes
            cached = sum(x.nbytes for pair in kv.staged.values() for x in pair)
            peak, held = result.get(op.kind, (0, 0))
            result[op.kind] = (max(peak, live.peak - cached), max(held, live.now - cached))
    return result


def packed_bytes(spec, kind):
    """What the plan adds for the rows of a product, once more."""
    return prod(packed_rows(ROWS, matrix_shape(spec, kind)[1])) * 2 if kind != "embed" else 0


def dtype_of(spec):
    return {"F32": torch.float32, "BF16": torch.bfloat16}[spec.dtype]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_activation_bytes_are_what_is_alive(name, dtype, exact, torch_kernels):
    # As the plan does it: which row counts agree, and so how rows are padded, is the library's on this processor.
    spec = with_product_sizes(read_spec(CONFIGS[name] | {"torch_dtype": dtype}), "cpu")
    shapes = {
        weight.name: weight.shape for op in spec.program for weight in op.weights
    }  # nothing is cut at this size
    tensors = {key: torch.full(shape, 0.01, dtype=dtype_of(spec)) for key, shape in shapes.items()}
    num_logits = ROWS if exact else 3
    measure(spec, tensors, num_logits, exact)  # exact products test themselves at their first use
    measured = measure(spec, tensors, num_logits, exact)
    stated = activation_bytes(spec, ROWS, num_logits, ROWS, exact=exact)
    for kind, (peak, held) in measured.items():
        assert stated[kind].held == pytest.approx(held, rel=0.05, abs=4096), kind
        assert peak <= stated[kind].peak, kind
        if kind not in ("v", "qkv"):  # attention's workspace is a bound for any mix of sequences
            # Torch packs no rows; where a compiled kernel could, a plan makes room for it.
            packed = 0 if exact or dtype == "float32" else packed_bytes(spec, kind)
            assert stated[kind].peak - packed <= peak * 1.05, kind
    assert activation_peak_bytes(spec, ROWS, num_logits, ROWS, exact=exact) == max(
        cost.peak for cost in stated.values()
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_kernels_stay_within_what_is_stated(name, exact):
    """Between products they need less than what torch needs, which the plan states; products pack their rows."""
    spec = with_product_sizes(read_spec(CONFIGS[name] | {"torch_dtype": "bfloat16"}), "cpu")
    shapes = {weight.name: weight.shape for op in spec.program for weight in op.weights}
    tensors = {key: torch.full(shape, 0.01, dtype=torch.bfloat16) for key, shape in shapes.items()}
    num_logits = ROWS if exact else 3
    measure(spec, tensors, num_logits, exact)
    stated = activation_bytes(spec, ROWS, num_logits, ROWS, exact=exact)
    for kind, (peak, held) in measure(spec, tensors, num_logits, exact).items():
        assert peak <= stated[kind].peak, kind
        assert held <= stated[kind].held + 4096, kind


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(
    ("name", "weights"), [*product(["llama", "gpt2"], FORMATS), ("llama", LOSSLESS), ("phi3", LOSSLESS)]
)
def test_stored_products_stay_within_what_is_stated(name, weights, is_compiled, exact, request):
    if not is_compiled:
        request.getfixturevalue("torch_kernels")
    spec = as_stored(read_spec(CONFIGS[name] | {"torch_dtype": "bfloat16"}), weights, layout_here(weights))
    parts = {part.name: part for op in spec.program for part in op.reads}
    dtypes = {"": torch.bfloat16, "BF16": torch.bfloat16, "U8": torch.uint8}
    tensors = {name: torch.ones(part.shape, dtype=dtypes[part.dtype]) for name, part in parts.items()}
    measure(spec, tensors, 3, exact)  # choices, and the slot that a thread keeps, are made at the first use
    slot = workspace_bytes(spec, "cpu") if weights == LOSSLESS else 0
    stated = activation_bytes(spec, ROWS, 3, ROWS, exact=exact)
    for kind, (peak, held) in measure(spec, tensors, 3, exact).items():
        assert stated[kind].held == pytest.approx(held, rel=0.05, abs=4096), kind
        assert peak <= stated[kind].peak + slot, kind


def test_live_bytes_count_storages_once_and_until_they_die():
    outside = torch.ones(100)
    with LiveBytes() as live:
        one = torch.ones(1000)
        view = one[10:].view(10, 99)
        assert live.now == 4000
        seen = outside[3:]
        assert live.now == 4000
        live.adopt([outside])
        assert live.now == 4400
        del one
        assert live.now == 4400
        del view
        assert (live.now, live.peak) == (400, 4400)
        assert live.reset_peak() == 4400
        assert live.peak == 400
        assert (torch.zeros(5) + seen[:5]).sum() == 5
        assert live.peak > 400
    assert live.now == 400
