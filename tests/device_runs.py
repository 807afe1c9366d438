"""What tests/gpu runs on a real device, as functions of the device's name.

tests/host/test_device_runs.py runs the same functions on the simulated device, so that they are known to work where
there is no GPU.
"""

import gc
import threading
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import torch

from zinfer import LLM, SamplingParams
from zinfer.runtime import engine as engines

PROMPTS = [[5, 9, 200, 31, 7, 44], [17], [3, 3, 8, 120, 77, 45, 90, 14, 2, 60, 333]]
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
FIXED = {"machine": "sim-default", "max_rows": 24, "max_batch": 3, "threads": 1}
ROOMY = {"device": "256MiB", "host": "1GiB"}
PLACEMENTS = ("resident", "host", "disk", "kv below")
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15, "float16": 0.03}  # of logits of a few: one pass's rounding


def options_for(placement, folder, device):
    """LLM options under which the folder's model lies as the placement says."""
    options = FIXED | {"device": device, "memory": ROOMY}
    if placement == "resident":
        return options
    if placement == "kv below":
        return options | {"kv": "host"}
    for _ in range(
        8
    ):  # what is set aside for graphs shrinks with the budget, at first by more than tiny weights take
        with LLM(folder, **options) as llm:
            plan = llm.fit(PROMPTS, PARAMS)
        if plan.placement.slots:
            break
        half = plan.uses[0].total - sum(chunk.nbytes for chunk in plan.table.streamable) // 2
        options["memory"] = {"device": half, "host": "1GiB"}
    assert plan.placement.slots, "everything stays: nothing would be streamed"
    if placement == "disk":
        with LLM(folder, **options) as llm:
            use = llm.fit(PROMPTS, PARAMS).uses[1]
        options["memory"]["host"] = use.total - use.resident
    return options


def answers(folder, **options):
    """Tokens of greedy generation, the logits of a prompt, and whether anything streamed."""
    with LLM(folder, **options) as llm:
        tokens = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]
        return tokens, llm.logits(PROMPTS[2]).cpu(), llm.plan.placement.slots > 0


def check_parity(folder, dtype, placement, device, *, is_same_engine=False):
    """The device's logits beside the CPU's; tokens agree wherever the CPU's first two are further apart than rounding.

    `is_same_engine`: the device computes as the CPU does, so every bit must be equal.
    """
    want_tokens, want, _ = answers(folder, **FIXED, device="cpu", memory={"host": "1GiB"})
    tokens, got, is_streamed = answers(folder, **options_for(placement, folder, device))
    assert is_streamed == (placement in ("host", "disk"))
    if is_same_engine:
        assert tokens == want_tokens
        assert torch.equal(got, want)
        return
    tolerance = TOLERANCE[dtype]
    assert (got - want).abs().max() <= tolerance, f"off by {(got - want).abs().max()}"
    top = want.topk(2, -1)
    is_clear = top.values[:, 0] - top.values[:, 1] > 2 * tolerance
    assert torch.equal(got.argmax(-1)[is_clear], top.indices[is_clear, 0])


def check_placements_agree(folder, device):
    """In exact mode where weights lie and whether passes are recorded changes no bit on one device."""
    wanted = None
    for placement in PLACEMENTS[:3]:
        options = options_for(placement, folder, device)
        for graphs in ("off", "auto"):
            tokens, logits, _ = answers(folder, **options, graphs=graphs)
            if wanted is None:
                wanted = (tokens, logits)
            assert tokens == wanted[0], (placement, graphs)
            assert torch.equal(logits, wanted[1]), (placement, graphs)


def check_recorded(folder, device, *, has_graphs):
    """A lone sequence's decode passes are replayed where the device can record."""
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    found = []
    for graphs in ("off", "auto"):
        with LLM(folder, **FIXED, device=device, memory=ROOMY, graphs=graphs) as llm:
            found.append(llm.generate(PROMPTS[:1], params)[0].outputs[0].token_ids)
            assert (llm.stats.graph_replays > 0) == (has_graphs and graphs == "auto")
    assert found[0] == found[1]


def check_pinned_is_planned(folder, device, *, has_pins):
    """Page-locked are exactly the bytes that the plan says copies start from or end in."""
    options = options_for("host", folder, device)
    with LLM(folder, **options) as llm:
        llm.generate(PROMPTS, PARAMS)
        use = llm.plan.uses[1]
        for lock in llm._session._engine.manager._memory.locks:
            lock.settle()
        locked = llm._session._engine.manager.stats().locked_bytes
    assert locked == use.locked <= use.total
    assert (locked > 0) == has_pins


@contextmanager
def full_device(device, holds):
    """Whatever `holds(size)` keeps is gone from the device within."""
    kept = holds()
    try:
        yield
    finally:
        del kept
        gc.collect()


def held_by_this_process():
    """Files, threads and page-locked memory (bytes) of this process."""
    status = Path("/proc/self/status").read_text()
    pinned = next((line.split()[1] for line in status.splitlines() if line.startswith("VmPin")), "0")
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("zinfer")]
    return len(list(Path("/proc/self/fd").iterdir())), names, 1024 * int(pinned)


def check_rounds_leave_nothing(folder, device, rounds, device_bytes):
    """Load, run, close: `device_bytes()` and what the process holds are after the last as after the second round."""
    options = options_for("disk", folder, device)
    for number in range(rounds):
        with LLM(folder, **options) as llm:
            llm.generate(PROMPTS[:1], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        if number == 1:
            gc.collect()
            before, before_device = held_by_this_process(), device_bytes()
    gc.collect()
    after, after_device = held_by_this_process(), device_bytes()
    assert after == before
    assert after_device <= before_device


def check_out_of_memory(folder, device, monkeypatch, raise_full):
    """A device that fills up at opening and within passes: one typed error, or the right answer."""
    options = options_for("host", folder, device)
    want, _, _ = answers(folder, **options)
    with LLM(folder, **options) as llm:
        with monkeypatch.context() as patch:
            patch.setattr(engines, "_open_cache", raise_full)
            try:
                llm.generate(PROMPTS, PARAMS)
            except Exception as error:
                assert getattr(error, "code", "") == "ZI-2403", error
            else:
                raise AssertionError("the cache found room")
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)] == want
        executor = llm._session._engine.loop.executor
        run_op, calls = executor._run_op, count()

        def full_now_and_then(op, *args, **kwargs):
            if op.kind == "down" and next(calls) in (1, 9):
                raise_full()
            run_op(op, *args, **kwargs)

        executor._run_op = full_now_and_then
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)] == want
        llm._session._engine.manager.check()
