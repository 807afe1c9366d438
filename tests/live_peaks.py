"""What passes really hold beside weights, and what each tier held at its peak, next to what was planned."""

from contextlib import contextmanager
from dataclasses import dataclass

from zinfer import LLM, SamplingParams
from zinfer.plan.profile import ROW_STAGING_BYTES
from zinfer.runtime.executor import Executor
from zinfer.runtime.live_bytes import LiveBytes


@dataclass
class Peak:
    """One tier.  The ledger charges activations as they were planned; `seen` has what was alive in their place."""

    planned: int
    ledger: int
    seen: int
    activations: int
    live: int


@contextmanager
def watched():
    """Live bytes and rows of every pass."""
    passes, plain = [], Executor.traverse

    def traverse(self, micros):
        with LiveBytes() as live:
            plain(self, micros)
        passes.append((live.peak, sum(micro.batch.num_rows for micro in micros)))

    Executor.traverse = traverse
    try:
        yield passes
    finally:
        Executor.traverse = plain


def peaks(folder, prompts, num_tokens, memory, *, device="cpu", **options):
    """({tier: Peak}, rows of the fullest pass, the plan) of a greedy run; windows for rows of embeddings are counted
    with what is alive, for they are no tensors."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    ids = [[3 + (7 * i + j) % 400 for j in range(length)] for i, length in enumerate(prompts)]
    options = {"machine": "sim-default", "threads": 1} | options
    with watched() as passes, LLM(folder, device=device, memory=memory, **options) as llm:
        llm.generate(ids, params)
        plan, found = llm.plan, {}
        tiers = llm._session._engine.manager._memory.tiers
        for use in plan.uses:
            ledger = tiers[use.tier].ledger
            live = use.activations
            if use.tier is plan.placement.compute_tier:
                live = max(peak for peak, _ in passes) + ROW_STAGING_BYTES
            seen = ledger.peak_bytes - ledger.reserved["activations"] + live
            planned = (
                use.activations - plan.reserve.recorded
            )  # what is recorded is no activation of a pass that is not
            found[str(use.tier)] = Peak(use.total, ledger.peak_bytes, seen, planned, live)
        return found, max(rows for _, rows in passes), plan
