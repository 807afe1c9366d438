"""Recorded passes give what ops one by one give, bit for bit; other shapes, slots and addresses are never confused.

The recorder is a double that bakes in whatever is not in a tensor (tests/graph_double.py); tests/gpu has CUDA's own.
"""

import logging
from dataclasses import replace

import pytest
import torch
from graph_double import DoubleRecorder
from tiny_models import CONFIGS, write_tiny

from zinfer import LLM, SamplingParams
from zinfer.errors import MachineError
from zinfer.kernels.native.tape import TapeRecorder
from zinfer.kvcache.cache import PagedKv
from zinfer.layers.on_device import device_work
from zinfer.layers.packed import Packed, Span
from zinfer.plan.cost import RECORDED_ROWS
from zinfer.plan.profile import graph_bytes
from zinfer.runtime.fixed import mapped, outline, tensors
from zinfer.runtime.graph import CudaRecorder, Graphs, graphs_for
from zinfer.runtime.stays import Together

pytestmark = pytest.mark.usefixtures("torch_kernels")  # the double sees what goes through torch alone
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
PROMPTS = [[5, 9, 200, 31, 7, 44], [17, 3, 9, 4, 4, 1], [3, 3, 8, 120, 77, 45]]
FIXED = {"machine": "sim-default", "max_rows": 24, "max_batch": 3, "threads": 1}
ROOMY = {"device": "1GiB", "host": "1GiB"}


def attach(llm, recorder=None, *, exact=True, most_bytes=2**30):
    """Open the engine with a short request, then let it record."""
    executor = llm._session._open().loop.executor
    executor.graphs = Graphs(llm.model.spec, recorder or DoubleRecorder(), exact=exact, most_bytes=most_bytes)
    return executor


def run(folder, *, records, recorder=None, prompts=PROMPTS, params=PARAMS, **options):
    """Tokens and log probabilities, and the engine's graphs."""
    options = FIXED | {"device": "sim", "memory": ROOMY} | options
    with LLM(folder, **options) as llm:
        llm.fit(prompts, params)
        graphs = attach(llm, recorder, exact=options.get("exact", True)).graphs if records else None
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        assert llm.stats.surprises == 0
        moved = llm.plan.placement.slots
        if graphs is not None:
            graphs.kinds = list(graphs._kinds.values())  # closing forgets them
        return [out.token_ids for out in outputs], [out.logprobs for out in outputs], graphs, moved


SCORED = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_recorded_resident_model_gives_the_same(family, tmp_path):
    folder = write_tiny(family, tmp_path / "model")
    want = run(folder, records=False, params=SCORED)
    got = run(folder, records=True, params=SCORED)
    assert got[:2] == want[:2]
    assert want[3] == 0, "everything stays"
    graphs = got[2]
    assert not graphs.is_off
    assert graphs._recorder.num_recorded > 0
    assert graphs.num_replays >= 5, "most decode passes were replayed"


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_so_does_one_that_is_not_exact(family, tmp_path, monkeypatch):
    """Keys are padded to steps, which rounds otherwise: the slow twin is the same pass, op by op."""
    folder = write_tiny(family, tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr("zinfer.runtime.graph.Kind._find", lambda *_: None)
        want = run(folder, records=True, params=SCORED, exact=False)
    got = run(folder, records=True, params=SCORED, exact=False)
    assert want[2].num_replays == 0 < got[2].num_replays
    assert got[:2] == want[:2]


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_a_recorded_streamed_model_gives_the_same(family, tmp_path):
    folder = write_tiny(family, tmp_path / "model", num_hidden_layers=8)
    with LLM(folder, **FIXED, device="sim", memory=ROOMY) as llm:
        plan = llm.fit(PROMPTS, PARAMS)
        least = plan.uses[0].total - sum(chunk.nbytes for chunk in plan.table.streamable) // 2
    memory = {"device": least, "host": "1GiB"}
    want = run(folder, records=False, memory=memory)
    got = run(folder, records=True, memory=memory)
    assert want[3] > 0, "something streams"
    assert got[0] == want[0]
    assert got[2].num_replays > 20, "chunks in slots were replayed too"
    places = {key[2] for kind in got[2].kinds for key in kind._recorded}
    assert any(isinstance(where[0], tuple) for where in places), "neighbours that stay were recorded together"


def test_a_lone_sequence_is_one_graph_a_pass(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    want = run(folder, records=False, prompts=PROMPTS[:1], params=params)
    got = run(folder, records=True, prompts=PROMPTS[:1], params=params)
    assert got[0] == want[0]
    graphs = got[2]
    whole = [kind for kind in graphs.kinds if kind._is_whole]
    assert whole
    assert all(len(kind._recorded) == 1 for kind in whole if kind._recorded), "the whole pass is one graph"


def test_lengths_that_grow_past_a_step_are_recorded_anew(tmp_path):
    """Blocks of keys grow: a graph for fewer must not be taken for more."""
    folder = write_tiny("llama", tmp_path / "model")
    params = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True)
    want = run(folder, records=False, prompts=PROMPTS[:2], params=params)
    got = run(folder, records=True, prompts=PROMPTS[:2], params=params)
    assert got[0] == want[0]
    assert len([kind for kind in got[2].kinds if kind._is_whole]) >= 2


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_angles_that_depend_on_length_are_not_baked_in(scaling, tmp_path):
    rope = {
        "dynamic": {"rope_type": "dynamic", "factor": 4.0},
        "longrope": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 8,
            "long_factor": [3.0] * 8,
            "original_max_position_embeddings": 16,
            "factor": 4.0,
        },
    }[scaling]
    extra = {"max_position_embeddings": 16} if scaling == "dynamic" else {}
    try:
        folder = write_tiny("llama", tmp_path / "model", rope_scaling=rope, **extra)
        params = SamplingParams(
            max_tokens=9 if scaling == "dynamic" else 30, temperature=0.0, ignore_eos=True
        )
        want = run(folder, records=False, prompts=PROMPTS[:1], params=params)
    except Exception as error:
        pytest.skip(f"this family does not take {scaling}: {error}")
    got = run(folder, records=True, prompts=PROMPTS[:1], params=params)
    assert got[0] == want[0]


def test_what_cannot_be_recorded_is_said_once_and_runs_one_by_one(tmp_path, caplog):
    folder = write_tiny("llama", tmp_path / "model")
    want = run(folder, records=False)
    with caplog.at_level(logging.WARNING, "zinfer"):
        got = run(folder, records=True, recorder=DoubleRecorder(refuse_after=0))
    assert got[0] == want[0]
    assert got[2].is_off
    assert got[2].num_replays == 0
    said = [record for record in caplog.records if "not recorded any more" in record.getMessage()]
    assert len(said) == 1


def test_memory_for_graphs_ends(tmp_path, caplog):
    folder = write_tiny("llama", tmp_path / "model")

    class Growing(DoubleRecorder):
        def record(self, run):
            self.nbytes += 2**29
            return super().record(run)

    want = run(folder, records=False)
    with caplog.at_level(logging.WARNING, "zinfer"):
        got = run(folder, records=True, recorder=Growing())
    assert got[0] == want[0]
    assert "ZI-2405" in caplog.text or got[2]._recorder.num_recorded <= 3


def test_another_plan_forgets_what_was_recorded(tmp_path):
    folder = write_tiny("llama", tmp_path / "model", num_hidden_layers=8)
    with LLM(folder, **FIXED, device="sim", memory=turning(folder)) as llm:
        llm.fit(PROMPTS, PARAMS)
        executor = attach(llm)
        want = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)]
        assert llm.plan.placement.slots > 0
        assert executor.graphs._kinds
        llm.set_memory(device="1GiB")
        assert not executor.graphs._kinds
        assert not executor._stays._leases
        assert llm.plan.placement.slots == 0
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)] == want
        assert executor.graphs._kinds
        assert executor._stays._leases, "what stays is leased for longer than a pass"
        llm._session._engine.manager.check()


def test_an_error_in_a_pass_forgets_too(tmp_path, monkeypatch):
    folder = write_tiny("llama", tmp_path / "model")
    with LLM(folder, **FIXED, device="sim", memory=ROOMY) as llm:
        llm.fit(PROMPTS, PARAMS)
        executor = attach(llm)
        want = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)]
        monkeypatch.setattr(executor.manager, "rows", lambda *_: (_ for _ in ()).throw(ValueError("no rows")))
        with pytest.raises(ValueError, match="no rows"):
            llm.generate(PROMPTS, PARAMS)
        assert not executor.graphs._kinds
        monkeypatch.undo()
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)] == want


def test_a_graph_that_is_taken_for_another_is_seen(tmp_path, monkeypatch):
    """The mutation: keys without what attention's shapes and slots depend on must change what comes out, or fail."""
    folder = write_tiny("llama", tmp_path / "model")
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=2)
    want = run(folder, records=False, prompts=PROMPTS[:1], params=params)
    monkeypatch.setattr("zinfer.runtime.graph.PassBuffers.load", lambda self, batch, view: None)
    try:
        got = run(folder, records=True, prompts=PROMPTS[:1], params=params)
    except MachineError as error:
        assert "logits" in error.message
    else:
        assert got[:2] != want[:2]


def turning(folder):
    """A budget under which a streamed chunk lies in another slot in the next pass."""
    with LLM(folder, **FIXED, device="sim", memory=ROOMY) as llm:
        plan = llm.fit(PROMPTS, SCORED)
        total, weights = plan.uses[0].total, sum(chunk.nbytes for chunk in plan.table.streamable)
    for share in range(40, 90, 3):
        memory = {"device": total - weights * share // 100, "host": "1GiB"}
        with LLM(folder, **FIXED, device="sim", memory=memory) as llm:
            placement = llm.fit(PROMPTS, SCORED).placement
            streamed = sum(not placement.resident(chunk.id) for chunk in llm.plan.table.streamable)
            if placement.slots > 1 and streamed % placement.slots:
                return memory
    raise AssertionError("no such budget")


def test_a_graph_of_another_slot_is_seen(tmp_path, monkeypatch):
    """The mutation: a key without the place of the weights."""
    folder = write_tiny("llama", tmp_path / "model", num_hidden_layers=6)
    memory = turning(folder)
    want = run(folder, records=False, memory=memory, params=SCORED)
    assert run(folder, records=True, memory=memory, params=SCORED)[:2] == want[:2]
    monkeypatch.setattr("zinfer.memory.lease.Lease.address", property(lambda self: 0))
    try:
        got = run(folder, records=True, memory=memory, params=SCORED)
    except MachineError as error:  # the slot was empty: 0xFF is no number
        assert "logits" in error.message
    else:
        assert got[1] != want[1]


def test_the_double_bakes_in_what_python_worked_out():
    recorder, x, scale = DoubleRecorder(), torch.ones(3), [2.0]
    out = []
    replay = recorder.record(lambda: out.append(x * scale[0]))
    assert bool(out[0].isnan().all()), "nothing was carried out yet"
    replay()
    assert out[0].tolist() == [2, 2, 2]
    scale[0] = 5.0
    x.fill_(3)
    replay()
    assert out[0].tolist() == [6, 6, 6]
    with pytest.raises(RuntimeError, match="captured"):
        recorder.record(lambda: x.sum().item())


def test_outlines_tell_shapes_and_numbers_apart_and_spans_together():
    a, b = torch.zeros(2), torch.zeros(3)
    assert outline([a, 1]) == outline([torch.ones(2), 1])
    assert outline([a]) != outline([b])
    assert outline([a]) != outline([a.double()])
    assert outline([1]) != outline([2])
    assert outline(slice(0, 4)) != outline(slice(0, 5))
    assert outline(Span(0, 1, 2)) == outline(Span(3, 4, 5))
    assert outline({"x": (a, None)}) == outline({"x": (a, None)})
    assert [x is y for x, y in zip(tensors({"x": [a, (b,)]}), (a, b), strict=True)] == [True, True]
    assert [x.shape for x in tensors(mapped([a, {"k": b}], torch.clone))] == [a.shape, b.shape]


def test_only_the_latest_kinds_are_remembered():
    graphs = Graphs(None, DoubleRecorder(), exact=True, most_bytes=1)
    assert [graphs._note("often") for _ in range(3)] == [1, 2, 3]
    for number in range(1000):
        assert graphs._note(number) == 1
        graphs._note("often")
    assert len(graphs._seen) <= 64
    assert graphs._note("often") > 1000
    assert graphs._note(5) == 1, "forgotten"


def test_what_is_neither_a_device_nor_a_host_records_nothing():
    assert graphs_for(None, torch.device("meta"), exact=True, most_bytes=1) is None
    assert graph_bytes(64 * 2**30) == 64 * 2**20
    assert graph_bytes(64 * 2**20) == 4 * 2**20
    assert CudaRecorder.most_rows == 64 < TapeRecorder.most_rows == RECORDED_ROWS == 256
    assert Together((1, 2)) == Together((1, 2))


def test_a_capture_asks_cuda_in_this_order(monkeypatch):
    """What the CUDA recorder does, written down: its own stream, thread-local, ended whatever happens."""
    calls = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    class Graph:
        def capture_begin(self, *, pool, capture_error_mode):
            calls.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")

    from contextlib import nullcontext

    for name, value in {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream("compute"),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: "pool",
        "stream": lambda stream: nullcontext(),
        "memory_reserved": lambda device: 1000 * len(calls),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder(torch.device("cuda:0"))
    replay = recorder.record(lambda: calls.append("ops"))
    replay()
    want = [
        "side waits for compute",
        "begin pool thread_local",
        "ops",
        "end",
        "compute waits for side",
        "replay",
    ]
    assert calls == want
    assert recorder.nbytes == 5000
    calls.clear()
    with pytest.raises(ValueError, match="in the middle"):
        recorder.record(lambda: (_ for _ in ()).throw(ValueError("in the middle")))
    assert calls[-1] == "end"


def test_page_tables_of_lengths_within_a_step_are_one_kind(monkeypatch):
    """A device's own decode kernel follows page tables: padded to a step they have the shapes of earlier passes."""
    monkeypatch.setattr("zinfer.kernels.served.serves", lambda device_type: True)
    monkeypatch.setattr("zinfer.layers.on_device.paged_serves", lambda *case: True)
    kv = PagedKv(num_layers=1, num_kv_heads=2, head_dim=16, num_pages=40, dtype="BF16")
    like = torch.empty(0, 4, 16, dtype=torch.bfloat16)
    outlines = []
    kv.open(0, 33)
    kv.tables[0].length = 33
    for past in range(33, 70):
        kv.grow(0, past + 1)
        batch = Packed(
            torch.zeros(1, dtype=torch.long),
            torch.tensor([past]),
            (0, 1),
            (past,),
            torch.zeros(1, dtype=torch.long),
            is_padded=True,
        )
        work = device_work(batch, kv.view([0], (0, 1), (past,)), like, 2, None)
        assert work.pages.lengths.tolist() == [past + 1]
        assert work.pages.longest >= past + 1
        outlines.append(outline(work))
    assert len(set(outlines)) == 2, "33 to 63 keys, and 64 on"
    exact = device_work(replace(batch, is_padded=False), kv.view([0], (0, 1), (69,)), like, 2, None)
    assert exact.pages.longest == 70
