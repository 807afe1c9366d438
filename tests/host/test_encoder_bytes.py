"""The symbolic activation bytes of an encoder against a count of live bytes in a real pass."""

from dataclasses import replace

import encoder_oracle
import pytest
import torch
from text_models import CONFIGS

from zinfer.kernels.products import with_product_sizes
from zinfer.models.encoder import EncoderFlow, run_op
from zinfer.runtime.live_bytes import LiveBytes
from zinfer.spec.encoder_cost import encoder_activation_bytes, encoder_peak_bytes
from zinfer.spec.read import read_spec

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 514}
BATCHES = {"one": (330,), "even": (60,) * 6, "ragged": (250, 30, 30, 20, 5, 1)}


pytestmark = pytest.mark.usefixtures("one_thread")


def measure(spec, lengths, exact):
    """Most live bytes while each kind of op ran."""
    batch = encoder_oracle.pack([[5] * length for length in lengths])
    weights = {weight.name: weight.shape for op in spec.program for weight in op.weights}
    tensors = {name: torch.full(shape, 0.01) for name, shape in weights.items()}
    result = {}
    flow = EncoderFlow()
    with torch.no_grad(), LiveBytes() as live:
        for lookup in spec.lookups:
            flow.rows[lookup.role] = torch.zeros(batch.num_rows, lookup.width)
        for op in spec.program:
            views = {weight.role: tensors[weight.name] for weight in op.weights}
            live.reset_peak()
            run_op(op, spec, flow, views, batch, exact=exact)
            result[op.kind] = max(result.get(op.kind, 0), live.peak)
    return result


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("family", ["bert", "electra"])
def test_stated_bytes_bound_what_is_alive(family, lengths, exact):
    wide = WIDE | ({"embedding_size": 128} if family == "electra" else {})
    spec = with_product_sizes(read_spec(CONFIGS[family] | wide), "cpu")
    measure(spec, lengths, exact)  # exact products test themselves at their first use
    measured = measure(spec, lengths, exact)
    stated = encoder_activation_bytes(spec, sum(lengths), len(lengths), max(lengths), exact=exact)
    assert set(stated) == set(measured)
    for kind, peak in measured.items():
        assert stated[kind] >= peak - 4096, kind
    whole = encoder_peak_bytes(spec, sum(lengths), len(lengths), max(lengths), exact=exact)
    assert whole <= 1.6 * max(measured.values()), (
        "a bound far above what is needed refuses budgets that suffice"
    )


@pytest.mark.parametrize(("sizes", "filled"), [((), 0), ((1, 16), 0), ((16, 32), 16), ((64,), 64)])
def test_a_heads_one_row_is_counted_as_it_is_filled_up(sizes, filled):
    plain = replace(read_spec(CONFIGS["bert"] | WIDE), product_sizes=(("dense", ()),))
    spec = replace(plain, product_sizes=(("dense", sizes),))
    more = [encoder_activation_bytes(each, 330, 1, 330, exact=True)["dense"] for each in (spec, plain)]
    assert more[0] - more[1] == filled * 2 * 256 * 4
