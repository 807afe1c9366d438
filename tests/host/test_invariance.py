"""Placement invariance (G4): where weights live and when they move changes no bit of what comes out."""

import pytest
import torch
from tiny_models import CONFIGS, write_tiny

from zinfer import LLM, SamplingParams
from zinfer.api import DEMO
from zinfer.chunks.pack import assemble
from zinfer.chunks.store import shard
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.quant import native_layout
from zinfer.kernels.quantise import Quantiser
from zinfer.plan.place import smallest_budget
from zinfer.plan.records import Tier
from zinfer.spec.quant import FORMATS

PROMPTS = [[5, 9, 200, 31, 7, 44], [17], [3, 3, 8, 120, 77, 45, 90, 14, 2, 60, 333]]
PARAMS = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
FIXED = {"machine": "sim-default", "max_rows": 24, "max_batch": 3, "threads": 1}  # only placement differs
LOOKAHEADS = (0, 1, 3)
SAMPLED = SamplingParams(max_tokens=6, temperature=0.9, top_p=0.95, seed=11, ignore_eos=True)


def run(folder, **options):
    """Tokens of greedy and sampled generation, logits, whether weights streamed, and fetches nobody had planned."""
    with LLM(folder, **FIXED, **options) as llm:
        greedy = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        is_streamed = llm.plan.placement.slots > 0
        moved = sum(llm.stats.bytes_per_pass.values())
        sampled = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, SAMPLED)]
        logits = llm.logits(PROMPTS[2][: len(PROMPTS)])  # as many rows of logits as the budget was made for
        assert llm.stats.surprises == 0, "the schedule fetches every chunk before it is needed"
        return greedy, sampled, logits, moved if is_streamed else 0


def budgets(folder):
    """Bytes: the smallest budget on the CPU by look-ahead, that of a device, and one in which everything stays."""
    with LLM(folder, **FIXED, device="cpu", memory={"host": "1GiB"}) as llm:
        reserve = llm.fit(PROMPTS, PARAMS).reserve
        table = assemble(llm.model.source, 1)
        least = [
            smallest_budget(table, compute_tier=Tier.HOST, reserve=reserve, lookahead=lookahead).host
            for lookahead in LOOKAHEADS
        ]
        device = smallest_budget(table, compute_tier=Tier.DEVICE, reserve=reserve, lookahead=1).device
        return *least, device, reserve.total + table.total_bytes


def placements(*sources):
    """Options under which every source streams: a store pads its chunks otherwise than a checkpoint in place."""
    *least, device, full = map(max, zip(*(budgets(source) for source in sources), strict=True))
    for lookahead, host in zip(LOOKAHEADS, least, strict=True):
        yield {"device": "cpu", "memory": {"host": host}, "lookahead": lookahead}
    yield {"device": "cpu", "memory": {"host": (least[0] + full) // 2}}
    for device_mem in (device, (device + full) // 2):
        for host_mem in (device, 2 * full):
            yield {"device": "sim", "memory": {"device": device_mem, "host": host_mem}}


def assert_same(reference, other):
    assert other[0] == reference[0]
    assert other[1] == reference[1]
    assert torch.equal(other[2], reference[2])


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
    with pytest.raises(AssertionError, match=r"."):
        assert_same(reference, run(folder, device="cpu", memory={"host": "1GiB"}))
