"""Layers alone: rows that do not feel their neighbours, activations, norms, and rope kinds by their own formulas."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zinfer.layers.mlp import ACTIVATIONS, LANES, SHARE, activate, whole_pieces
from zinfer.layers.norm import layer_norm, rms_norm
from zinfer.layers.packed import Packed
from zinfer.layers.rotary import inverse_frequencies, rotary_tables, rotate
from zinfer.spec.records import Rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 811  # odd, so that rows begin anywhere in a vector


def noise(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def positions(start, count, past=0):
    rows = torch.arange(start, start + count)
    return Packed(rows, rows, (0, count), (past,), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_exact_activations_do_not_depend_on_the_place(kind, dtype):
    x = noise(400, WIDTH, dtype=dtype)
    whole = activate(x, kind, exact=True)
    assert (whole - activate(x, kind, exact=False)).abs().max() < 1e-6
    for start, count in ((0, 1), (1, 1), (7, 3), (30, 41), (100, 173), (399, 1)):
        assert torch.equal(
            activate(x[start : start + count].clone(), kind, exact=True), whole[start : start + count]
        )


def test_inexact_activations_do_depend_on_the_place():
    """What the cut into whole shares is for; if torch ever changes this, it can go."""
    x = noise(400, WIDTH)
    whole = activate(x, "silu", exact=False)
    alone = torch.cat([activate(row.clone(), "silu", exact=False) for row in x.split(1)])
    if torch.equal(alone, whole):
        pytest.skip("this CPU's silu rounds alike everywhere")
    assert (alone - whole).abs().max() < 1e-6


@given(st.integers(0, 10**7), st.integers(1, 64))
def test_pieces_cover_everything_in_whole_shares(count, num_threads):
    pieces = list(whole_pieces(count, num_threads))
    assert sum(stop - start for start, stop in pieces) == count
    at = 0
    for start, stop in pieces:
        assert start == at
        at = stop
        size = stop - start
        assert size > 0
        assert size <= SHARE or (size % (num_threads * LANES) == 0 and size >= num_threads * SHARE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_rotation_do_not_depend_on_the_place(dtype):
    x, weight, bias = noise(300, WIDTH, dtype=dtype), noise(WIDTH, dtype=dtype), noise(WIDTH, dtype=dtype)
    rope = Rope("default", 10000.0, 6)

    def rotated(start, stop):
        heads = x[start:stop, :810].clone().view(-1, 81, 10)
        return rotate(heads, *rotary_tables(rope, positions(start, stop - start), dtype))

    def normed(start, stop):
        rows = x[start:stop].clone()
        return torch.cat((rms_norm(rows, weight, 1e-5), layer_norm(rows, weight, bias, 1e-5)), -1)

    for function in (rotated, normed):
        whole = function(0, 300)
        for start, stop in ((0, 1), (5, 6), (3, 10), (17, 190)):
            assert torch.equal(function(start, stop), whole[start:stop])


def test_norms_follow_their_formulas():
    x, weight, bias = noise(4, 16).double(), noise(16).double(), noise(16).double()
    rms = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert (rms_norm(x.float(), weight.float(), 1e-5) - rms).abs().max() < 1e-5
    centred = x - x.mean(-1, keepdim=True)
    layer = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    assert (layer_norm(x.float(), weight.float(), bias.float(), 1e-5) - layer).abs().max() < 1e-5


def test_rotation_turns_pairs_by_position_times_frequency():
    rope = Rope("default", 100.0, 4)
    x = noise(3, 2, 6)
    cos, sin = rotary_tables(rope, positions(5, 3), torch.float32)
    turned = rotate(x, cos, sin)
    assert torch.equal(turned[..., 4:], x[..., 4:])  # beyond rotary_dim nothing moves
    for row, position in enumerate((5, 6, 7)):
        for pair in range(2):
            angle = position * 100.0 ** (-pair / 2)
            left, right = x[row, :, pair], x[row, :, pair + 2]
            assert torch.allclose(
                turned[row, :, pair], left * math.cos(angle) - right * math.sin(angle), atol=1e-5
            )
            assert torch.allclose(
                turned[row, :, pair + 2], right * math.cos(angle) + left * math.sin(angle), atol=1e-5
            )


def test_frequencies_switch_on_length_where_they_should():
    host = torch.device("cpu")
    factors = {"short_factor": (1.0, 1.0), "long_factor": (2.0, 4.0)}
    longrope = Rope("longrope", 100.0, 4, factors | {"original_context": 16, "attention_factor": 1.5})
    short, long = (inverse_frequencies(longrope, length, host) for length in (16, 17))
    assert torch.allclose(short / long, torch.tensor([2.0, 4.0]))
    dynamic = Rope("dynamic", 100.0, 4, {"factor": 2.0, "max_context": 16})
    base = inverse_frequencies(dynamic, 3, host)
    assert torch.equal(base, inverse_frequencies(dynamic, 16, host))
    assert torch.equal(base, inverse_frequencies(Rope("default", 100.0, 4), 3, host))
    stretched = inverse_frequencies(dynamic, 32, host)
    assert stretched[1].item() == pytest.approx((100.0 * 3.0**2) ** -0.5)
    cos, _ = rotary_tables(longrope, positions(0, 1), torch.float32)
    assert torch.equal(cos, torch.full((1, 2), 1.5))
