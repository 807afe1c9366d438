"""Passes written down as steps of compiled code: what they give, what is refused, and what memory they use."""

import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parity import pages_case, quant_case
from tiny_models import CONFIGS, write_tiny

from zinfer import LLM, SamplingParams
from zinfer.kernels.native import calls, tape
from zinfer.kernels.native.tape import NotRecordableError, Pool, TapeRecorder
from zinfer.layers.mlp import table
from zinfer.plan.records import Budget
from zinfer.plan.revise import rebudget
from zinfer.runtime import graph
from zinfer.runtime.fixed import tensors
from zinfer.runtime.graph import graphs_for

BF16 = torch.bfloat16
PARAMS = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True, logprobs=3)
PROMPTS = [[5, 9, 200, 31, 7, 44], [17, 3, 9, 4, 4, 1], [3, 3, 8, 120, 77, 45]]

pytestmark = [
    pytest.mark.skipif(
        calls.kernels() is None or not calls.kernels().has_products, reason="no compiled products here"
    ),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(autouse=True)
def compiled_products(monkeypatch):
    """Which product is fastest is measured: here the answer is always the same."""
    monkeypatch.setattr("zinfer.kernels.products.few_rows", lambda *case: 32)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def recorder(most_bytes=2**24):
    return TapeRecorder(calls.kernels(), most_bytes)


def recorded(run, *inputs, most_bytes=2**24):
    """What `run(*inputs)` gives at once, and what a tape of it gives after the inputs have changed and come back."""
    want = run(*inputs).clone()
    out = []
    replay = recorder(most_bytes).record(lambda: out.append(run(*inputs)))
    kept = [x.clone() for x in inputs]
    for x in inputs:
        x.zero_()
    replay()
    zeroed = out[0].clone()
    for x, was in zip(inputs, kept, strict=True):
        x.copy_(was)
    replay()
    assert not torch.equal(zeroed, want), "a replay reads what the inputs hold by then"
    return out[0], want


def kernel_runs():
    k = calls.kernels()
    x, gate, octets = noise(5, 96, seed=1), noise(5, 96, seed=2), noise(3, 2, 64, seed=3)
    q, planes, pages = pages_case("cpu", BF16, [3, 40])
    rows, weight = quant_case("cpu", BF16, "int8", 3, 64, 128)
    bias, scale = noise(5), gate[0].contiguous()
    turned_gate = gate.t().contiguous()
    turned = octets[:, 0, :32].contiguous(), octets[:, 1, :32].contiguous()
    return {
        "norm": (lambda x: k.norm(x, scale, 1e-5), x),
        "rotate": (lambda x: k.rotate(x, *turned), octets),
        "layer norm": (lambda x: k.layer_norm(x, scale, None, 1e-5), x),
        "activation": (lambda x: k.activated(x, table("gelu")), x),
        "relu": (lambda x: k.activated(x, None), x),
        "gate": (lambda x: k.gated(gate, x, table("silu")), x),
        "attend": (
            lambda q: k.attend(
                q, *planes[0].unbind(), pages.table, pages.lengths, 16, scale=0.3, window=9, cap=2.0
            ),
            q,
        ),
        "product": (lambda x: k.dense(x, gate, bias), x),
        "columns": (lambda x: k.columns(x, turned_gate, bias), x),
        "quantised": (lambda x: k.quant(x, weight), rows),
    }


@pytest.mark.parametrize(
    "name",
    [
        "norm",
        "layer norm",
        "rotate",
        "activation",
        "relu",
        "gate",
        "attend",
        "product",
        "columns",
        "quantised",
    ],
)
def test_a_kernel_on_a_tape_gives_its_bits(name):
    run, x = kernel_runs()[name]
    found, want = recorded(run, x)
    assert torch.equal(found, want)


@given(rows=st.integers(1, 9), width=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_what_torch_does_between_kernels_gives_its_bits(rows, width, seed):
    x, z = noise(rows, width, seed=seed), noise(rows, width, seed=seed + 1)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    def inside(x):
        wide = x.new_empty(rows, 2 * width)
        wide[:, width:] = x
        wide[:, :width] = x
        return wide

    def inside_of_floats(x):
        wide = x.new_empty(rows, 2 * width, dtype=torch.float32)
        wide[:, width:] = x
        wide[:, :width] = x
        return wide

    for run in (
        lambda x: x + z,
        lambda x: x.float(),
        inside_of_floats,
        lambda x: x.index_select(0, order),
        lambda x: torch.empty_like(x).index_copy_(0, order, x),
        lambda x: torch.empty_like(x).copy_(x),
        lambda x: (x + z).view(rows, 1, width).index_select(0, order).float(),
        lambda x: x.clone(),
        lambda x: x[:, width // 2 :].contiguous(),
        inside,
    ):
        found, want = recorded(run, x)
        assert torch.equal(found, want)


@pytest.mark.parametrize(("heads", "width", "part"), [(3, 8, 1), (1, 16, 2), (5, 1, 0)])
def test_parts_of_a_fused_product_are_put_together(heads, width, part):
    """Heads that lie apart: one of three, as GPT-NeoX has them, copied or written to a cache."""
    slots, x = torch.tensor([4, 0]), noise(2, heads * 3 * width)

    def copied(x):
        return x.view(2, heads, 3, width).unbind(2)[part].clone(memory_format=torch.contiguous_format)

    def written(x):
        wide = x.new_empty(5, heads, width).index_copy_(0, slots, x.view(2, heads, 3, width).unbind(2)[part])
        return wide.index_select(0, slots)

    for run in (copied, written):
        found, want = recorded(run, x)
        assert torch.equal(found, want)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x * x,
        lambda x: x.t().clone(memory_format=torch.contiguous_format),
        lambda x: x.view(3, 2, 4).transpose(1, 2).contiguous(),
        lambda x: x.view(3, 2, 2, 2)[:, :, 0].view(3, 2, 2)[:2, :1].contiguous(),
        lambda x: x[:, 0].contiguous(),
        lambda x: x[0, 0].clone(),
        lambda x: x.double(),
        lambda x: x + 1,
        lambda x: x.t() + x.t(),
        lambda x: x + x[:1],
        lambda x: x.sum(),
        lambda x: x.index_select(1, torch.tensor([0])),
        lambda x: torch.empty(1, x.shape[1], dtype=BF16).copy_(x[0]),
        lambda x: torch.empty(x.shape).copy_(x),
        lambda x: torch.nn.functional.linear(x, x),
    ],
)
def test_what_is_no_step_is_refused(run):
    with pytest.raises(NotRecordableError):
        recorder().record(lambda: run(noise(3, 8)))
    assert not calls.is_noting()


def test_a_tape_of_steps_in_another_order_is_seen(monkeypatch):
    """The mutations: steps that change places, one that is left out, arguments that do."""
    x, weight = noise(4, 64), noise(64, seed=1)

    def run(x):
        return calls.kernels().norm(x + x, weight, 1e-5)

    found, want = recorded(run, x)
    assert torch.equal(found, want)
    steps = tape.Tape.steps
    for wrong in (
        lambda rows: rows[::-1],
        lambda rows: rows[:1],
        lambda rows: rows[:, [0, 2, 1, *range(3, 16)]],
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tape.Tape, "steps", lambda self, wrong=wrong: wrong(steps(self)).copy())
            found, want = recorded(run, x.clone())
            assert not torch.equal(found, want)


def test_other_threads_compute_while_one_records():
    x, weight, found = noise(4, 64), noise(64, seed=1), []
    want = calls.kernels().norm(x, weight, 1e-5)

    def other():
        found.append(calls.kernels().norm(x, weight, 1e-5))

    def run():
        assert calls.is_noting()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    recorder().record(run)
    assert torch.equal(found[0], want)


@given(takes=st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_what_is_alive_never_shares_memory(takes):
    """Tensors of random sizes, each of which dies some takes later."""
    pool, alive = Pool(2**24), []
    for at, (size, life) in enumerate(takes):
        alive = [(end, x) for end, x in alive if end > at]
        x = pool.take((size,), torch.uint8)
        assert x.data_ptr() % 64 == 0
        places = sorted((y.data_ptr(), y.data_ptr() + y.nbytes) for y in (x, *(y for _, y in alive)))
        assert all(stop <= start for (_, stop), (start, _) in pairwise(places))
        alive.append((at + 1 + life, x))
    del alive, x
    before = pool.nbytes
    pool.take((takes[0][0],), torch.uint8)
    assert pool.nbytes == before, "what has died makes room"


def test_memory_of_recorded_passes_ends():
    x = noise(64, 64)
    with pytest.raises(NotRecordableError, match="more are wanted"):
        recorder(most_bytes=4000).record(lambda: x + x)
    made = recorder(most_bytes=20_000)
    out = []
    for _ in range(20):  # each one's result dies before the next
        out[:] = []
        made.record(lambda: out.append(x + x))
    assert 0 < made.nbytes <= 20_000
    made.forget()
    assert made.nbytes == 0


def test_steps_that_nobody_plays_any_more_take_no_memory():
    made, x = recorder(), noise(4, 64)
    made.record(lambda: x + x)
    blocks = made.nbytes
    assert blocks == 4 * 64 * 2 + 64, "a sum and what aligns it"
    replays = [made.record(lambda: x + x) for _ in range(5)]
    assert made.nbytes == blocks + 5 * 16 * 8
    del replays
    assert made.nbytes == blocks
    recorder(most_bytes=blocks + 16 * 8).record(lambda: x + x)
    with pytest.raises(NotRecordableError, match="128 more are wanted"):
        recorder(most_bytes=blocks + 16 * 8 - 1).record(lambda: x + x)


def sums(steps, make):
    """Sums of earlier ones, recorded and played one by one; each result takes the turn of one that is dropped."""
    alive = [noise(2, 96, seed=seed) for seed in range(3)]
    want = [x.clone() for x in alive]
    for left, right, dropped in steps:
        made = []
        with make.holding(alive):
            replay = make.record(lambda i=left, j=right, out=made: out.append(alive[i] + alive[j]))
        want[dropped] = want[left] + want[right]
        lent = make.lent(made.pop())
        replay()
        alive[dropped] = lent
        yield all(torch.equal(x, y) for x, y in zip(alive, want, strict=True))


@given(steps=st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_what_is_lent_keeps_its_numbers_until_it_is_dropped(steps):
    """However many recordings follow each other, they need the memory of what is alive at once, and one result more."""
    made = recorder()
    assert all(sums(steps, made))
    assert made.nbytes <= 4 * (2 * 96 * 2 + 64)


def test_a_place_that_nobody_holds_is_overwritten(monkeypatch):
    """The mutation of the test before: what is lent is not said to be alive."""
    steps = [(0, 1, 0), (1, 2, 1), (2, 0, 2), (0, 1, 2)]
    assert all(sums(steps, recorder()))
    monkeypatch.setattr(Pool, "holding", lambda self, alive: nullcontext())
    assert not all(sums(steps, recorder()))


def test_what_is_lent_has_its_shape_and_lies_where_it_did():
    pool = Pool(2**16)
    x = pool.take((4, 6), BF16)
    x.copy_(noise(4, 6))
    for part in (x, x.t(), x[1:], x[:, 2:5], x.view(2, 2, 6)[:, 1]):
        lent = pool.lent(part)
        assert (lent.data_ptr(), lent.stride()) == (part.data_ptr(), part.stride())
        assert torch.equal(lent, part)
    elsewhere = noise(3)
    assert pool.lent(elsewhere) is elsewhere
    del x, part
    assert pool.take((4, 6), BF16).data_ptr() == pool.lent(lent).data_ptr() - 12, "its place is another's"


def test_what_moves_to_a_place_where_another_lies_arrives():
    places = noise(4, 3)
    a, b, c, d = places.unbind()
    want = [x.clone() for x in (b, a, d)]
    graph._bring([a, b, c], [b, a, d])
    assert all(torch.equal(x, y) for x, y in zip((a, b, c), want, strict=True))
    graph._bring([a, b], [a, b])
    assert torch.equal(a, want[0])


def test_recording_does_not_import_torchs_compiler():
    """That takes two seconds, which the first recorded pass would wait for."""
    code = """
import sys, torch
from zinfer.kernels.native.calls import kernels
from zinfer.kernels.native.tape import TapeRecorder
from zinfer.runtime.live_bytes import LiveBytes
x = torch.ones(3, 8, dtype=torch.bfloat16)
replay = TapeRecorder(kernels(), 2**20).record(lambda: (x + x).view(-1).float())
replay()
with LiveBytes():
    x + x
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def run(folder, *, records, prompts=PROMPTS, params=PARAMS, memory="64MiB", exact=False, **options):
    """Tokens, log probabilities and stats; `records` as runtime.graphs says."""
    config = {"graphs": "auto" if records else "off"}
    options = {"machine": "sim-default", "threads": 1, "max_batch": 3, "max_rows": 24} | options
    with LLM(folder, device="cpu", exact=exact, memory={"host": memory}, **config, **options) as llm:
        outputs = [output.outputs[0] for output in llm.generate(prompts, params)]
        graphs = llm._session._engine.loop.executor.graphs
        kinds = [] if graphs is None else list(graphs._kinds.values())
        llm._session._engine.manager.check()
        return [out.token_ids for out in outputs], [out.logprobs for out in outputs], llm.stats, kinds


def difference(found, want):
    """Largest difference of log probabilities at equal places."""
    pairs = [
        (one, other[token])
        for mine, theirs in zip(found, want, strict=True)
        for here, other in zip(mine, theirs, strict=True)
        for token, one in here.items()
        if token in other
    ]
    assert len(pairs) > 50
    return max(abs(getattr(a, "logprob", a) - getattr(b, "logprob", b)) for a, b in pairs)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        family: write_tiny(family, tmp_path_factory.mktemp(family) / "m", torch_dtype="bfloat16")
        for family in CONFIGS
    }


@pytest.fixture
def native_rows(monkeypatch):
    """Rows op by op by the same kernels as on a tape: both round alike."""
    from zinfer.kernels import products

    monkeypatch.setattr(products, "row_kernel", lambda *case: "native")


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("prompts", "exact"),
    [(PROMPTS, False), (PROMPTS[:1], False), (PROMPTS, True)],
    ids=["three", "one", "exact"],
)
def test_recorded_passes_give_what_ops_one_by_one_give(models, family, prompts, exact, native_rows):
    want, found = (
        run(models[family], records=records, prompts=prompts, exact=exact) for records in (False, True)
    )
    assert want[2].graph_replays == 0
    assert found[2].graph_replays >= PARAMS.max_tokens - 4, "most decode passes were replayed"
    whole = [kind for kind in found[3] if kind._is_whole and kind._recorded]
    assert whole
    assert all(len(kind._recorded) == 1 for kind in whole), "a resident model's pass is one tape"
    assert all(None not in kind._recorded.values() for kind in found[3]), "nothing was refused"
    assert found[:2] == want[:2]


def test_many_logits_are_no_part_of_what_is_recorded(models, monkeypatch, native_rows):
    """A head is one op, and what it gives more memory than all else of a pass; few logits stay on the tape."""
    want = run(models["llama"], records=False)
    assert want[2].passes[-1].sequences == len(PROMPTS)
    nbytes = len(PROMPTS) * 515 * 4
    for most in (nbytes, nbytes - 1):
        monkeypatch.setattr(TapeRecorder, "most_logit_bytes", most)
        found = run(models["llama"], records=True)
        whole = [kind for kind in found[3] if kind._is_whole and kind._recorded]
        has_head = {key[1] == num_ops(models["llama"]) for kind in whole for key in kind._recorded}
        assert has_head == {most == nbytes}
        assert found[:2] == want[:2]


def test_passes_of_many_rows_are_recorded_once_they_have_come_often(models, monkeypatch, native_rows):
    """Recording takes as long as ten replays of them spare."""
    want = run(models["llama"], records=False)
    monkeypatch.setattr(graph, "FEW_ROWS", len(PROMPTS) - 1)
    replays = []
    for often in (4, 10**6):
        monkeypatch.setattr(graph, "_OFTEN", often)
        found = run(models["llama"], records=True)
        assert found[:2] == want[:2]
        replays.append(found[2].graph_replays)
    assert 0 < replays[0] <= PARAMS.max_tokens - 1 - 4
    assert replays[1] == 0
    monkeypatch.setattr(TapeRecorder, "most_rows", len(PROMPTS) - 1)
    monkeypatch.setattr(graph, "_OFTEN", 1)
    assert run(models["llama"], records=True)[2].graph_replays == 0


def num_ops(folder):
    with LLM(folder, device="cpu", memory={"host": "64MiB"}) as llm:
        return len(llm._session.model.spec.program)


VARIANTS = {
    "opt before its projections": ("opt", {"word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "opt without norm weights": ("opt", {"layer_norm_elementwise_affine": False}),
    "neox one after the other": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt2 by quick gelu": ("gpt2", {"activation_function": "quick_gelu"}),
    "a gate of another kind": ("llama", {"hidden_act": "gelu_pytorch_tanh", "attention_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_variants_are_recorded_too(variant, tmp_path, native_rows):
    family, changes = VARIANTS[variant]
    folder = write_tiny(family, tmp_path / "m", torch_dtype="bfloat16", **changes)
    want, found = (run(folder, records=records, prompts=PROMPTS[:2]) for records in (False, True))
    whole = [kind for kind in found[3] if kind._is_whole and kind._recorded]
    assert found[2].graph_replays >= PARAMS.max_tokens - 4
    assert whole
    assert all(len(kind._recorded) == 1 and None not in kind._recorded.values() for kind in whole)
    assert found[:2] == want[:2]


def test_a_streamed_model_is_replayed_where_its_chunks_lie(tmp_path, native_rows):
    folder = write_tiny("llama", tmp_path / "m", torch_dtype="bfloat16", num_hidden_layers=8, hidden_size=256)
    with LLM(folder, device="cpu", exact=False, memory={"host": "64MiB"}, max_batch=3, max_rows=24) as llm:
        plan = llm.fit(PROMPTS, PARAMS)
        least = plan.uses[0].total - sum(chunk.nbytes for chunk in plan.table.streamable) // 3
    want = run(folder, records=False, memory=least)
    found = run(folder, records=True, memory=least)
    assert found[2].bytes_per_pass["disk"] > 0, "something streams"
    assert found[2].graph_replays > 0
    assert found[:2] == want[:2]


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    """A model of eight layers, and a budget under which a third of it streams."""
    folder = tmp_path_factory.mktemp("tape") / "streams"
    write_tiny("llama", folder, torch_dtype="bfloat16", num_hidden_layers=8, hidden_size=256)
    with LLM(folder, device="cpu", exact=False, memory={"host": "64MiB"}, max_batch=3, max_rows=24) as llm:
        plan = llm.fit(PROMPTS, PARAMS)
        return folder, plan.uses[0].total - sum(chunk.nbytes for chunk in plan.table.streamable) // 3


def run_streamed(streams, monkeypatch, *, records, room=2**20):
    """Tokens and log probabilities, and the graphs, with so much memory for recorded passes."""
    folder, least = streams
    monkeypatch.setattr("zinfer.runtime.engine.graphs_for", roomy(room))
    monkeypatch.setattr("zinfer.plan.choose._MOST_RECORDED_BYTES", 0)
    found = run(folder, records=records, memory=least)
    assert found[2].bytes_per_pass["disk"] > 0, "something streams"
    return found


def roomy(room):
    def make(spec, device, *, exact, most_bytes):
        return graphs_for(spec, device, exact=exact, most_bytes=room)

    return make


def test_streamed_chunks_in_all_their_slots_need_one_passs_memory(streams, monkeypatch, native_rows):
    """Recordings by chunk and slot are many; what they hand on to each other lies in the same few places."""
    want = run_streamed(streams, monkeypatch, records=False)
    found = run_streamed(streams, monkeypatch, records=True)
    assert found[:2] == want[:2]
    (whole,) = [kind for kind in found[3] if kind._is_whole]
    recorded = whole._recorded
    slots = {key[2][1] for key in recorded if not isinstance(key[2][0], tuple)}
    assert len(slots) > 1 and None not in recorded.values(), "more than one slot, and nothing runs op by op"
    places = {x.data_ptr() for each in recorded.values() for x in tensors(each.outputs)}
    assert len(places) < len(recorded), "outputs of one lie where those of others do"
    held = sum(x.nbytes for each in recorded.values() for x in tensors(each.outputs))
    assert sum(block.nbytes for block in whole._graphs._recorder._pool._blocks) < held / 3


def given_away(pool, alive):
    """In place of `holding`: what is alive goes first."""
    places = list(alive)
    pool._free.sort(key=lambda block: not any(tape._lies_in(block, x) for x in places))
    return nullcontext()


@pytest.mark.parametrize("wrong", ["nobody is alive", "nothing is brought"])
def test_places_that_are_taken_too_soon_are_seen(streams, monkeypatch, native_rows, wrong):
    """The mutations: recordings write over what is still wanted; or read what was never brought to them."""
    want = run_streamed(streams, monkeypatch, records=True)
    if wrong == "nobody is alive":
        monkeypatch.setattr(Pool, "holding", given_away)
    else:
        monkeypatch.setattr(graph, "_bring", lambda targets, sources: None)
    found = run_streamed(streams, monkeypatch, records=True)
    assert found[:2] != want[:2]


@pytest.mark.parametrize("most_bytes", [1, 300, 1000, 3000, 10_000, 30_000, 100_000])
def test_however_little_memory_there_is_for_recordings(models, monkeypatch, caplog, native_rows, most_bytes):
    """What does not fit runs op by op, be it a buffer, a part of a pass or a whole one; nobody was promised more."""
    want = run(models["llama"], records=False)
    monkeypatch.setattr("zinfer.plan.choose._MOST_RECORDED_BYTES", most_bytes)
    found = run(models["llama"], records=True)
    assert found[:2] == want[:2]
    assert all(kind._graphs._recorder.nbytes <= most_bytes for kind in found[3])
    assert not any(kind._graphs.is_off for kind in found[3])
    assert "recorded any more" not in caplog.text


def test_a_tape_over_old_tables_is_seen(models, monkeypatch, native_rows):
    """The mutation: a pass's own slots, tables and positions are not brought to where the tape reads them."""
    want = run(models["llama"], records=False)
    monkeypatch.setattr(graph.PassBuffers, "load", lambda self, batch, view: None)
    found = run(models["llama"], records=True)
    assert found[:2] != want[:2]


def logits_of(folder, monkeypatch, *, records):
    """The tensors that every pass hands out, looked at after all of them."""
    config = {"graphs": "auto" if records else "off", "threads": 1}
    with LLM(folder, device="cpu", exact=False, memory={"host": "64MiB"}, **config) as llm:
        executor, handed_out = llm._session._open().loop.executor, []
        plain = executor.run

        def run_and_keep(batches):
            handed_out.extend(outputs := plain(batches))
            return outputs

        monkeypatch.setattr(executor, "run", run_and_keep)
        llm.generate(PROMPTS[:1], PARAMS)
        assert bool(llm.stats.to_dict()["passes"])
        return handed_out


def test_logits_that_are_handed_out_stay(models, monkeypatch, native_rows):
    """A later replay writes where the earlier one's logits lay: callers get copies."""
    want = logits_of(models["llama"], monkeypatch, records=False)
    found = logits_of(models["llama"], monkeypatch, records=True)
    assert len(found) == len(want) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    with monkeypatch.context() as patch:  # the mutation: the tape's own memory is handed out
        patch.setattr(torch.Tensor, "clone", lambda self, **_: self)
        shared = logits_of(models["llama"], patch, records=True)
    assert not all(torch.equal(a, b) for a, b in zip(shared, want, strict=True))


def test_a_replayed_pass_tells_no_group_its_seconds(models):
    """Of half a pass nobody learns how fast a whole one is."""
    found = run(models["llama"], records=True)[2]
    replayed = [done for done in found.decode_passes if not done.group_s]
    assert len(replayed) >= PARAMS.max_tokens - 5
    assert found.passes[0].group_s


def test_another_budget_between_passes_forgets_and_records_again(models):
    options = {"machine": "sim-default", "threads": 1, "max_batch": 3, "max_rows": 24}
    with LLM(models["llama"], device="cpu", exact=False, memory={"host": "64MiB"}, **options) as llm:
        want = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)]
        graphs = llm._session._engine.loop.executor.graphs
        assert graphs.nbytes > 0
        before = graphs.num_replays
        llm.set_memory(host="32MiB")
        assert graphs._recorder.nbytes == 0
        assert [out.outputs[0].token_ids for out in llm.generate(PROMPTS, PARAMS)] == want
        assert graphs.num_replays > before
        ledger = llm._session._engine.manager.ledger()
        assert graphs._recorder.nbytes <= ledger.reserved["recorded"] == llm.plan.reserve.recorded


def test_who_records_on_a_host(models):
    with LLM(models["llama"], device="cpu", exact=False, memory={"host": "64MiB"}) as llm:
        spec, plan = llm.model.spec, llm.fit(PROMPTS, PARAMS)
    host = torch.device("cpu")
    assert graphs_for(spec, host, exact=False, most_bytes=1) is not None
    assert graphs_for(spec, host, exact=True, most_bytes=1) is not None
    assert graphs_for(replace(spec, dtype="F32"), host, exact=False, most_bytes=1) is None
    assert plan.reserve.recorded == 2**20, "1/64 of the budget"
    rest = plan.uses[0].total - plan.reserve.recorded
    for spare in (0, 5, 4096):
        again = rebudget(spec, plan, Budget(host=rest + spare))
        assert again.reserve.recorded == spare, "what weights leave, and no weight makes way"
        assert again.uses[0].total == rest + spare
