"""What holds for the composition besides parity: cuts, rows, micro-batches, autograd, and nothing left behind."""

from dataclasses import fields

import oracle
import pytest
import torch
from fakes import DenseKv, begin_flow, op_weights, run_pass

from zinfer.layers.packed import Packed
from zinfer.models import decoder
from zinfer.models.decoder import run_op
from zinfer.spec import program
from zinfer.spec.read import read_spec

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def load(name, dtype=torch.float32):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            oracle.make(name, made[name])
        config, tensors, model = oracle.load(made[name], dtype)
        published = {key: {4: "F32", 2: "BF16"}[tensor.itemsize] for key, tensor in tensors.items()}
        return read_spec(config, None, published), tensors, model

    return load


def tokens(count, seed=3):
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))


def packed(ids, past=0):
    rows = torch.arange(len(ids))
    return Packed(ids, rows + past, (0, len(ids)), (past,), rows)


def fresh(spec, num_sequences=1):
    return DenseKv(spec.num_layers, num_sequences)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_a_prompt_may_be_cut_where_rope_switches_on_length(saved, name):
    spec, tensors, _ = saved(name)
    ids = tokens(23)
    whole = run_pass(spec, tensors, fresh(spec), [ids])

    def in_pieces(lengths):
        kv = fresh(spec)
        return torch.cat(
            [run_pass(spec, tensors, kv, [piece], lengths=lengths) for piece in (ids[:9], ids[9:])]
        )

    assert torch.equal(in_pieces((23,)), whole)
    assert (in_pieces(None) - whole).abs().max() > 0.01  # the first piece cannot know how long the prompt is


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_a_batch_mate_does_not_change_the_rope(saved, name):
    spec, tensors, _ = saved(name)
    short, long = tokens(6), tokens(23)
    alone = run_pass(spec, tensors, fresh(spec), [short])
    assert torch.equal(run_pass(spec, tensors, fresh(spec, 2), [short, long])[:6], alone)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-mha", "opt-350m", "neox-parallel"])
def test_only_wanted_rows_reach_the_head(saved, name):
    spec, tensors, _ = saved(name, torch.bfloat16)
    pieces = [tokens(5, 1), tokens(7, 2)]
    everything = run_pass(spec, tensors, fresh(spec, 2), pieces)
    wanted = run_pass(spec, tensors, fresh(spec, 2), pieces, logit_rows=[4, 11])
    assert torch.equal(wanted, everything[[4, 11]])
    kv = fresh(spec, 2)
    assert run_pass(spec, tensors, kv, pieces, logit_rows=[]).shape == (0, spec.vocab_size)
    after = run_pass(spec, tensors, kv, [tokens(1, 3), tokens(1, 4)])
    assert after.shape == (2, spec.vocab_size)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-mha", "opt-350m", "gpt2", "neox-parallel", "phi3-window"])
def test_behind_the_last_attention_only_wanted_rows_are_multiplied(saved, name, monkeypatch):
    spec, tensors, _ = saved(name, torch.bfloat16)
    rows = {}

    def counted(op, spec, flow, weights, *, exact):
        rows.setdefault((op.layer == spec.num_layers - 1, op.kind), set()).add(len(flow.input))
        return product(op, spec, flow, weights, exact=exact)

    product = decoder._product
    monkeypatch.setattr(decoder, "_product", counted)
    pieces = [tokens(5, 1), tokens(7, 2)]
    wanted = run_pass(spec, tensors, fresh(spec, 2), pieces, logit_rows=[3, 11])
    behind = {"o", "gate", "up", "gate_up", "down"}
    assert {kind for is_last, kind in rows if is_last} & behind
    for (is_last, kind), counts in rows.items():
        is_few = (is_last and kind in behind) or kind in ("head", "project_out")
        assert counts == {2 if is_few else 12}, kind
    # Another row of the last attention would be seen.
    select = torch.Tensor.index_select
    monkeypatch.setattr(
        torch.Tensor, "index_select", lambda x, dim, at: select(x, dim, (at - 1).clamp(min=0))
    )
    assert not torch.equal(run_pass(spec, tensors, fresh(spec, 2), pieces, logit_rows=[3, 11]), wanted)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llama-gqa-biased-tied", "qwen3", "phi3-window", "opt-350m", "neox-parallel"]
)
def test_matrices_cut_into_row_blocks_give_the_same_logits(saved, name, monkeypatch):
    spec, tensors, model = saved(name)
    ids = tokens(9)
    whole = run_pass(spec, tensors, fresh(spec), [ids])
    monkeypatch.setattr(program, "BLOCK_BYTES", 16 * 48 * 4)
    monkeypatch.setattr(program, "BLOCK_ROWS", 8)
    cut = read_spec(model.config.to_dict() | {"architectures": [spec.architecture], "dtype": "float32"})
    assert max(op.blocks for op in cut.program) > 3
    assert cut.num_parameters == spec.num_parameters
    assert (run_pass(cut, tensors, fresh(spec), [ids]) - whole).abs().max() < 2e-5


@torch.no_grad()
def test_micro_batches_interleave_op_by_op(saved):
    spec, tensors, _ = saved("llama-gqa-biased-tied", torch.bfloat16)
    prompts = [tokens(5, 1), tokens(8, 2)]
    apart = [run_pass(spec, tensors, fresh(spec), [ids]) for ids in prompts]
    batches = [packed(ids) for ids in prompts]
    caches = [fresh(spec), fresh(spec)]
    for kv, batch in zip(caches, batches, strict=True):
        kv.begin([0], batch.bounds)
    flows = [begin_flow(spec, tensors, batch) for batch in batches]
    for op in spec.program:
        for flow, batch, kv in zip(flows, batches, caches, strict=True):
            run_op(op, spec, flow, op_weights(op, tensors), batch, kv, exact=True)
    for flow, logits in zip(flows, apart, strict=True):
        assert torch.equal(flow.take_logits(), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", oracle.VARIANTS)
def test_nothing_is_left_and_nothing_is_overwritten(saved, name):
    spec, tensors, _ = saved(name)
    batch = packed(tokens(7))
    kv = fresh(spec)
    kv.begin([0], batch.bounds)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    flow = begin_flow(spec, tensors, batch)
    given = {role: (rows, rows.clone()) for role, rows in flow.rows.items()}
    for op in spec.program:
        run_op(op, spec, flow, op_weights(op, tensors), batch, kv, exact=False)
    assert flow.rows == {}
    assert [f.name for f in fields(flow) if f.name != "rows" and getattr(flow, f.name) is not None] == [
        "logits"
    ]
    assert all(torch.equal(tensors[key], tensor) for key, tensor in before.items())
    assert all(torch.equal(rows, copy) for rows, copy in given.values())


@pytest.mark.parametrize("name", ["llama-gqa-biased-tied", "qwen3", "opt-350m", "gpt2", "neox-parallel"])
def test_gradients_equal_those_of_transformers(saved, name):
    spec, tensors, model = saved(name)
    ids = tokens(9)
    model(ids[None]).logits.pow(2).mean().backward()
    leaves = {key: tensor.requires_grad_() for key, tensor in tensors.items()}
    run_pass(spec, leaves, fresh(spec), [ids], exact=False).pow(2).mean().backward()
    wanted = dict(model.named_parameters())
    for key, leaf in leaves.items():
        grad = wanted[key if key in wanted else "lm_head.weight"].grad
        assert (leaf.grad - grad).abs().max() < 1e-4 * max(1.0, grad.abs().max()), key


@torch.no_grad()
def test_a_checkpoint_of_mixed_dtypes_computes_in_the_models(saved):
    spec, tensors, _ = saved("llama-gqa-biased-tied", torch.bfloat16)
    ids = tokens(9)
    mixed = {key: tensor.float() if tensor.dim() == 1 else tensor for key, tensor in tensors.items()}
    assert torch.equal(run_pass(spec, mixed, fresh(spec), [ids]), run_pass(spec, tensors, fresh(spec), [ids]))


def test_ops_out_of_order_are_noticed(saved):
    spec, tensors, _ = saved("llama-mha")
    batch = packed(tokens(3))
    kv = fresh(spec)
    kv.begin([0], batch.bounds)
    flow = begin_flow(spec, tensors, batch)
    with pytest.raises(AssertionError, match="out of order"):
        run_op(spec.program[1], spec, flow, op_weights(spec.program[1], tensors), batch, kv, exact=True)
