"""Every encoder family against transformers on random models: ragged packed texts, pairs, heads, pooling."""

from dataclasses import replace

import encoder_oracle
import pytest
import torch

from zinfer.models.encoder import EncoderFlow, run_op

TOLERANCE = 1e-4
LENGTHS = (5, 17, 1, 9, 17, 40)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=encoder_oracle.VARIANTS)
def case(request):
    config, tensors, model = encoder_oracle.make(request.param)
    return request.param, encoder_oracle.spec_of(config, tensors), tensors, model


def texts():
    draw = torch.Generator().manual_seed(5)
    return [torch.randint(3, 97, (length,), generator=draw).tolist() for length in LENGTHS]


def types(spec):
    """Token types as a text pair has them, where the family knows more than one."""
    if spec.encoder.num_segments < 2:
        return None
    return [[0] * (length // 2) + [1] * (length - length // 2) for length in LENGTHS]


def distance(case, spec, tensors, *, exact=False):
    """The largest difference in what the model is for: logits, or every pooling of the token rows."""
    _, own, _, model = case
    given, kinds = texts(), types(own)
    hidden, logits, _ = encoder_oracle.reference(model, given, kinds)
    flow = encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack(given, kinds), exact=exact)
    pooled = torch.stack([torch.cat((rows[0], rows.amax(0), rows.mean(0))) for rows in hidden])
    assert 0.3 < pooled.std() < 5, "activations should be of order 1"
    far = (flow.pooled - pooled).abs().max().item()
    return far if logits is None else max(far, (flow.logits - logits).abs().max().item())


def all_modes(spec):
    return replace(spec, encoder=replace(spec.encoder, pooling=("cls", "max", "mean")))


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_parity(case, exact):
    _, spec, tensors, _ = case
    assert distance(case, all_modes(spec), tensors, exact=exact) <= TOLERANCE


@torch.no_grad()
def test_a_mutation_is_noticed(case):
    name, spec, tensors, _ = case
    spoiled = encoder_oracle.VARIANTS[name].spoil(all_modes(spec), tensors)
    assert distance(case, *spoiled) > 10 * TOLERANCE


@torch.no_grad()
def test_layers_are_those_of_transformers(case):
    _, spec, tensors, model = case
    given, kinds = texts(), types(spec)
    layers = []
    encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack(given, kinds), layers=layers)
    theirs = encoder_oracle.reference(model, given, kinds)[2][1:]
    assert len(layers) == len(theirs) == spec.num_layers
    for ours, padded in zip(layers, theirs, strict=True):
        rows = torch.cat([padded[s, :length] for s, length in enumerate(LENGTHS)])
        assert (ours - rows).abs().max() <= TOLERANCE


def test_program_reads_every_tensor_it_should(case):
    _, spec, tensors, _ = case
    read = {weight.name for op in spec.program for weight in op.weights} | {row.name for row in spec.lookups}
    assert read <= set(tensors)
    left = [
        name for name in set(tensors) - read if "position_ids" not in name and "token_type_ids" not in name
    ]
    assert all(any(f".{stem}" in f".{name}" for stem in spec.unread) for name in left), left
    assert spec.num_parameters == sum(tensors[name].numel() for name in read)


@torch.no_grad()
def test_packed_equals_one_by_one_whatever_the_batch(case):
    """Exact: the same bits alone, in a batch, and in another order.  Else within rounding."""
    _, spec, tensors, _ = case
    given = texts()
    whole = encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack(given), exact=True)
    turned = encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack(given[::-1]), exact=True)
    alone = [
        encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack([text]), exact=True) for text in given
    ]
    assert torch.equal(torch.cat([flow.pooled for flow in alone]), whole.pooled)
    assert torch.equal(turned.pooled.flip(0), whole.pooled)
    if whole.logits is not None:
        assert torch.equal(torch.cat([flow.logits for flow in alone]), whole.logits)
    fast = encoder_oracle.run_packed(spec, tensors, encoder_oracle.pack(given), exact=False)
    assert (fast.pooled - whole.pooled).abs().max() <= 1e-5
    assert not torch.equal(whole.pooled[1], whole.pooled[4]), (
        "texts of equal length must differ to prove anything"
    )


def test_gradients_reach_every_weight(case):
    _, spec, tensors, _ = case
    names = {weight.name for op in spec.program for weight in op.weights} | {row.name for row in spec.lookups}
    leaves = {name: tensors[name].clone().requires_grad_() for name in names}
    flow = encoder_oracle.run_packed(spec, leaves, encoder_oracle.pack(texts(), types(spec)))
    result = flow.pooled if flow.logits is None else flow.logits
    result.pow(2).sum().backward()
    # A key's bias moves all scores of a row alike, which softmax does not see.
    assert [name for name, leaf in leaves.items() if leaf.grad is None] == []
    dead = [name for name, leaf in leaves.items() if not leaf.grad.abs().max() > 0]
    assert all(name.endswith(("key.bias", "k_lin.bias")) for name in dead)


@torch.no_grad()
def test_a_flow_may_be_carried_away_between_any_two_ops(case):
    """Another micro-batch's turn: what waits is copied, and the stream that is also the input stays one tensor."""
    _, spec, tensors, _ = case
    batch = encoder_oracle.pack(texts())
    flow = EncoderFlow()
    for lookup in spec.lookups:
        flow.rows[lookup.role] = tensors[lookup.name][batch.ids(lookup.role) + lookup.offset]
    for op in spec.program:
        views = {weight.role: tensors[weight.name][weight.start : weight.stop] for weight in op.weights}
        run_op(op, spec, flow, views, batch, exact=True)
        is_both = flow.stream is not None and flow.input is flow.stream
        flow.move(torch.clone)
        assert not is_both or flow.input is flow.stream
    whole = encoder_oracle.run_packed(spec, tensors, batch, exact=True)
    assert torch.equal(flow.pooled, whole.pooled)
    assert whole.logits is None or torch.equal(flow.logits, whole.logits)
