"""A watched pass: what it shows, and a peak that nobody planned, met before its moment from then on."""

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.models import decoder
from zinfer.plan.records import Tier

PROMPT = [5, 9, 200, 31, 7, 44, 60, 61]
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
FIXED = {"machine": "sim-default", "device": "cpu", "threads": 1, "max_rows": 8, "max_batch": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny("llama", tmp_path_factory.mktemp("tiny"))


def tight_budget(tiny):
    """Everything stays and not a page is left, and the bytes planned for activations."""
    with LLM(tiny, **FIXED, memory={"host": "1GiB"}) as llm:
        plan = llm.fit([PROMPT], PARAMS)
        return plan.uses[0].total - plan.reserve.recorded, plan.reserve.activations


class Injected:
    """run_op, with a tensor that lives while one op of a middle layer runs; notes when that is."""

    def __init__(self, nbytes, monkeypatch, events):
        self.nbytes, self.plain, self.events = nbytes, decoder.run_op, events
        monkeypatch.setattr(decoder, "run_op", self)

    def __call__(self, op, *args, **kwargs):
        if (op.layer, op.kind) == (1, "gate"):
            extra = torch.ones(self.nbytes, dtype=torch.uint8)
            self.events.append("peak")
            assert extra[-1] == 1
        self.plain(op, *args, **kwargs)


def run(tiny, budget, monkeypatch, injected=0, *, watch=True):
    """Tokens, what happened in order, the moments, and the engine's manager (checked, still open: closed by LLM)."""
    events = []
    with (
        monkeypatch.context() as patch,
        LLM(tiny, **FIXED, memory={"host": budget}, watch_moments=watch) as llm,
    ):
        if injected:
            Injected(injected, patch, events)
        llm.generate([PROMPT], PARAMS)
        engine = llm._session._engine
        manager = engine.manager
        ledger = manager._memory.tiers[Tier.HOST].ledger
        give_back, reserve = ledger.give_back, ledger.reserve
        patch.setattr(ledger, "give_back", lambda key: (events.append("evict"), give_back(key)))
        patch.setattr(
            ledger, "reserve", lambda name, n: (reserve(name, n), n and events.append(f"{name} {n}"))
        )
        events.clear()
        tokens = llm.generate([PROMPT], PARAMS)[0].outputs[0].token_ids
        manager.check()
        assert ledger.peak_bytes <= budget
        moments = engine.loop.executor.moments
        return tokens, list(events), moments, manager.surprises


def test_a_watched_pass_shows_order_and_bytes(tiny, monkeypatch):
    budget, planned = tight_budget(tiny)
    _, events, moments, surprises = run(tiny, budget, monkeypatch)
    assert moments.order == sorted(moments.order)
    assert len(moments.order) == len(moments.needs) > 1
    assert 0 < max(moments.needs) <= planned
    assert events == []
    assert surprises == 0


def test_a_peak_that_was_seen_evicts_before_its_moment(tiny, monkeypatch):
    budget, planned = tight_budget(tiny)
    expected = run(tiny, budget, monkeypatch)[0]
    tokens, events, moments, _ = run(tiny, budget, monkeypatch, planned + 64 * 1024)
    assert tokens == expected
    extra = max(moments.needs) - planned
    assert extra >= 64 * 1024
    peaks = [at for at, event in enumerate(events) if event == "peak"]
    assert len(peaks) == PARAMS.max_tokens
    begin = 0
    for (
        peak
    ) in peaks:  # in each pass: somebody goes, the bytes are there, the peak comes; nobody goes after that
        before = events[begin:peak]
        assert before[-1] == f"moment {extra}"
        assert before.count("evict") == before.index(f"moment {extra}") >= 1
        begin = peak + 1


def test_without_watching_nobody_goes(tiny, monkeypatch):
    """The mutation: the same peak, and no room is made."""
    budget, planned = tight_budget(tiny)
    _, events, _, _ = run(tiny, budget, monkeypatch, planned + 64 * 1024, watch=False)
    assert set(events) == {"peak"}
