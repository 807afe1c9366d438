"""Placement invariance (G4): where weights live and when they move changes no bit of what comes out."""

import pytest
import torch
from split_runs import FIXED, PROMPTS, assert_same, placements, run
from tiny_models import CONFIGS, write_tiny

from zinfer import LLM
from zinfer.api import DEMO
from zinfer.chunks.store import shard
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.quant import native_layout
from zinfer.kernels.quantise import Quantiser
from zinfer.spec.quant import FORMATS


@pytest.mark.parametrize("family", CONFIGS)
def test_every_placement_gives_the_same_bits(family, tmp_path):
    folder = write_tiny(family, tmp_path / "model")
    store = tmp_path / "store"
    shard(folder, store)
    reference = run(folder, device="cpu", memory={"host": "1GiB"})
    assert reference[3] == 0, "the reference must be resident"
    for options in placements(folder, store):
        for source in (folder, store):
            other = run(source, **options)
            assert other[3] > 0, f"nothing was streamed with {options}"
            assert_same(reference, other)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_placement_of_a_quantised_store_gives_the_same_bits(family, weights, tmp_path):
    store = tmp_path / "store"
    shard(write_tiny(family, tmp_path / "model"), store, encoder=Quantiser(weights, native_layout()))
    reference = run(store, device="cpu", memory={"host": "1GiB"})
    assert reference[3] == 0, "the reference must be resident"
    streamed = 0
    for options in list(placements(store))[1::2]:
        other = run(store, **options)
        streamed += other[3] > 0
        assert_same(reference, other)
    assert streamed >= 2, "weights so small beside the activations may stay now and then"


def test_the_bundled_model(tmp_path):
    reference = run(DEMO, device="cpu", memory={"host": "1GiB"})
    for options in placements(DEMO):
        other = run(DEMO, **options)
        assert other[3] > 0
        assert_same(reference, other)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), ("cpu", "float32"), ("sim", "bfloat16")])
def test_a_processor_reads_weights_where_they_land_unless_a_library_would_see_it(device, dtype, tmp_path):
    """No moves in memory, and still the same numbers as far as another order of adding allows."""
    folder = write_tiny("llama", tmp_path / "model", dtype)
    tables, logits = {}, {}
    for exact in (True, False):
        with LLM(folder, **FIXED, device=device, memory={"host": "1GiB"}, exact=exact) as llm:
            tables[exact], logits[exact] = llm.plan.table, llm.logits(PROMPTS[2])
            llm.plan.save(tmp_path / "plan.json")
            assert llm.plan.load(tmp_path / "plan.json", llm.model.source).table == tables[exact]
    moved = {exact: sum(len(chunk.moves) for chunk in table.chunks) for exact, table in tables.items()}
    has_products = kernels() is not None and kernels().has_products
    is_ours = device == "cpu" and dtype == "bfloat16" and has_products
    assert is_ours == (not moved[True]), "the file was to lie askew"
    assert moved[False] == (0 if device == "cpu" else moved[True])
    assert torch.allclose(logits[True], logits[False], atol=0.06)  # bf16, logits of order 1


def test_a_changed_bit_is_seen(tmp_path):
    """The mutation: one flipped weight bit in place must change what comes out."""
    folder = write_tiny("llama", tmp_path / "model")
    reference = run(folder, device="cpu", memory={"host": "1GiB"})
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1002] ^= 0x20  # a mantissa bit: the weight changes by a quarter at most
    file.write_bytes(data)
    with pytest.raises(AssertionError, match=r"logits|tokens"):
        assert_same(reference, run(folder, device="cpu", memory={"host": "1GiB"}))
