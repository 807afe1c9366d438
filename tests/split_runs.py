"""One model in every split of the tiers: runs of it, and what must be the same in all of them."""

import torch

from zinfer import LLM, SamplingParams
from zinfer.chunks.pack import assemble
from zinfer.plan.place import smallest_budget
from zinfer.plan.records import Tier

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
    assert other[0] == reference[0], "greedy tokens"
    assert other[1] == reference[1], "sampled tokens"
    assert torch.equal(other[2], reference[2]), "logits"
