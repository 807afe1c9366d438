"""Weights packed without loss: every bit comes back, products are those of the published weights, harm is seen."""

import ctypes
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from split_runs import assert_same, placements, run
from stores import contents, opened, rehash
from tiny_models import write_tiny

from zinfer.api import DEMO
from zinfer.chunks.manifest import read_manifest
from zinfer.chunks.quality import check_quality
from zinfer.chunks.store import shard, silent, verify_store
from zinfer.errors import CheckpointError, UsageError
from zinfer.kernels.exponents import (
    LosslessWeight,
    TooManyExponentsError,
    packed_without_loss,
    unpacked_by_torch,
)
from zinfer.kernels.lossless import lossless_linear, made_up, packed, unpacked
from zinfer.kernels.native import build, calls
from zinfer.kernels.native.signatures import FLAGS
from zinfer.kernels.native.tape import TapeRecorder
from zinfer.kernels.packer import Packer
from zinfer.kernels.products import linear
from zinfer.kernels.quantise import Quantiser
from zinfer.spec.lossless import HEAD, LISTED, SHARED, WEIGHT_BYTES, most_exceptions, slot_outputs

BF16 = torch.bfloat16
SHAPES = [(16, 64), (37, 192), (300, 1024)]  # outputs: a tile, a rest, many tiles


def gaussian(outputs, inputs, seed=0):
    return (0.02 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))).to(BF16)


def odd(outputs, inputs):
    """As trained, with exceptions wherever a tile has room for them: what is no number, infinite, denormal, or zero."""
    weight = gaussian(outputs, inputs)
    values = [torch.nan, -torch.inf, 1e-40, -0.0, 3e38, 1e-20, -1e-30]
    count = most_exceptions(inputs) - 2
    for first in range(0, outputs, SHARED):
        places = torch.linspace(0, min(SHARED, outputs - first) * inputs - 1, max(count, 1)).long()
        weight[first : first + SHARED].view(-1)[places] = torch.tensor(values)[
            torch.arange(len(places)) % len(values)
        ].to(BF16)
    return weight


def bits(weight):
    return weight.view(torch.int16)


def num_exceptions(packed):
    codes = torch.stack((packed.codes & 15, packed.codes >> 4))
    return int((codes == LISTED).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_comes_back_by_either_path(shape):
    weight = odd(*shape)
    packed = packed_without_loss(weight)
    assert num_exceptions(packed) > 2
    assert torch.equal(bits(unpacked_by_torch(packed)), bits(weight))
    assert torch.equal(bits(unpacked(packed)), bits(weight))


@pytest.mark.parametrize("shape", [*SHAPES, (1, 64), (48, 2048)])
def test_the_compiled_packer_writes_the_twins_bytes(shape):
    """Also of outputs that leave a rest, of ties, and of exceptions to the last place."""
    even = torch.exp2(torch.arange(shape[0] * shape[1]).view(shape) % 15 - 7.0).to(BF16)
    for weight in (odd(*shape), gaussian(*shape), even, torch.zeros(shape, dtype=BF16)):
        one, two = packed(weight), packed_without_loss(weight)
        for role in ("rest", "codes", "exponents"):
            assert torch.equal(getattr(one, role), getattr(two, role)), role
    wild = torch.exp2(torch.arange(shape[0] * shape[1]).view(shape) % 40 - 20.0).to(BF16)
    with pytest.raises(TooManyExponentsError) as told:
        packed(wild)
    with pytest.raises(TooManyExponentsError) as twins:
        packed_without_loss(wild)
    assert str(told.value) == str(twins.value)


def test_every_bfloat16_there_is_comes_back():
    """Rows of one sign and exponent: fifteen of them fill a list, one more is too many."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(512, 128).view(BF16)
    for first in range(0, 512, LISTED):
        rows = every[first : first + LISTED]
        assert torch.equal(bits(unpacked(packed_without_loss(rows))), bits(rows))
    with pytest.raises(TooManyExponentsError, match="there is room for 16"):
        packed_without_loss(every[:SHARED])


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 99), st.floats(0.2, 3))
@settings(max_examples=40, deadline=None)
def test_whatever_fits_comes_back(outputs, runs, seed, spread):
    """Rows of scales that lie up to 2 ** (8 * spread) apart."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.exp2(spread * torch.randn(outputs, 1, generator=draw))
    weight = (scales * torch.randn(outputs, 64 * runs, generator=draw)).to(BF16)
    try:
        packed = packed_without_loss(weight)
    except TooManyExponentsError:
        return
    assert torch.equal(bits(unpacked(packed)), bits(weight))
    assert torch.equal(bits(unpacked_by_torch(packed)), bits(weight))


def test_a_trained_matrix_takes_three_quarters_of_its_bytes():
    for weight in (gaussian(2048, 2048), torch.rand(256, 2048).sub(0.5).to(BF16)):
        packed = packed_without_loss(weight)
        assert packed.nbytes == pytest.approx(weight.numel() * WEIGHT_BYTES, rel=0.005)
        assert num_exceptions(packed) < most_exceptions(2048) * len(weight) / SHARED / 10, "room to spare"


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512f", "-mno-avx2", "-fno-tree-vectorize")])
def test_other_processors_unpack_the_same(flags, tmp_path):
    """AVX2, and plain C: the same source, compiled as for them."""
    command, source = build.compiler(), build.Path(build.__file__).parent / "lossless.c"
    made = tmp_path / "unpack.so"
    words = [
        *command,
        "-O2",
        "-march=native",
        *flags,
        *FLAGS,
        "-shared",
        "-fPIC",
        "-o",
        str(made),
        str(source),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert calls.kernels() is not None, "OpenMP's names come from there"
    code = ctypes.CDLL(str(made))
    weight = odd(37, 192)
    packed, y = packed_without_loss(weight), torch.empty(37, 192, dtype=BF16)
    where = [ctypes.c_void_p(part.data_ptr()) for part in (packed.rest, packed.codes, packed.exponents, y)]
    code.zinfer_unpack(*where, ctypes.c_size_t(37), ctypes.c_size_t(192), ctypes.c_uint(1))
    assert torch.equal(bits(y), bits(weight))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 33, 130, 256, 300])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_products_are_those_of_the_published_weights(shape, rows, unit):
    weight, draw = gaussian(*shape), torch.Generator().manual_seed(1)
    packed = packed_without_loss(weight)
    x = torch.randn(rows, shape[1], generator=draw).to(BF16)
    bias = torch.randn(shape[0], generator=draw).to(BF16)
    assert torch.equal(lossless_linear(x, packed, bias, exact=True), linear(x, weight, bias, exact=True))
    wide, want = (torch.zeros(rows, shape[0] + 7) for _ in range(2))
    lossless_linear(x, packed, exact=True, into_TO=wide[:, 3:-4])
    linear(x, weight, exact=True, into_TO=want[:, 3:-4])
    assert torch.equal(wide, want)


@pytest.mark.parametrize("exact", [True, False])
def test_the_slot_gives_what_the_kernel_gives(exact, torch_kernels):
    """More outputs than one slot takes; nothing is compiled, so pieces of the matrix are libraries' products."""
    outputs = slot_outputs(512, "cpu") + 40
    weight = gaussian(outputs, 512)
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(2)).to(BF16)
    got = lossless_linear(x, packed_without_loss(weight), exact=exact)
    want = x.double() @ weight.double().t()
    assert float((got.double() - want).norm() / want.norm()) < 0.006
    if exact:
        alone = lossless_linear(x[3:4], packed_without_loss(weight), exact=True)
        assert torch.equal(alone[0], got[3]), "a row depends on the row alone"


def test_a_code_of_another_exponent_would_be_seen():
    weight = gaussian(37, 192)
    packed = packed_without_loss(weight)
    packed.codes[1, 3, 5] ^= 1
    for path in (unpacked, unpacked_by_torch):
        assert int((bits(path(packed)) != bits(weight)).sum()) == 1


def test_a_tile_that_lies_about_its_exceptions_reads_nothing_beyond_them():
    """Every weight an exception, and those of the last output far behind the end: zeros, in either path, no crash."""
    packed = packed_without_loss(gaussian(16, 64))
    codes = torch.full_like(packed.codes, 0xFF)
    exponents = packed.exponents.clone()
    exponents[:, SHARED:HEAD] = 0xFF
    told = LosslessWeight(packed.rest, codes, exponents, 16)
    assert unpacked(told).float().abs().max() < 2.0**-126
    assert unpacked_by_torch(told).shape == (16, 64)


def test_made_up_weights_have_memory_of_their_own():
    one, two = made_up(40, 100), made_up(40, 100)
    assert one.shape == (40, 64)
    assert one.rest.data_ptr() != two.rest.data_ptr()
    assert torch.isfinite(unpacked(one).float()).all()


@pytest.mark.skipif(
    calls.kernels() is None or not calls.kernels().has_products, reason="no compiled products here"
)
def test_a_tape_plays_it():
    weight, x = packed_without_loss(gaussian(37, 192)), torch.randn(3, 192).to(BF16)
    want, out = lossless_linear(x, weight, exact=True), []
    replay = TapeRecorder(calls.kernels(), 2**24).record(
        lambda: out.append(lossless_linear(x, weight, exact=True))
    )
    assert replay is not None
    out[0].zero_()
    replay()
    assert torch.equal(out[0], want)


@pytest.mark.parametrize("family", ["llama", "opt", "phi3", "qwen3"])
def test_every_placement_of_a_store_gives_the_published_bits(family, tmp_path):
    """Tokens, sampled tokens and logits of the published folder, wherever the store's weights lie."""
    folder, store = write_tiny(family, tmp_path / "model"), tmp_path / "store"
    shard(folder, store, encoder=Packer())
    spec, _ = opened(store)
    assert sum(bool(op.stored) for op in spec.program) >= len(spec.program) // 2
    reference = run(folder, device="cpu", memory={"host": "1GiB"})
    resident = run(store, device="cpu", memory={"host": "1GiB"})
    assert (reference[3], resident[3]) == (0, 0), "both are resident"
    assert_same(reference, resident)
    streamed = 0
    for options in placements(store):
        other = run(store, **options)
        streamed += other[3] > 0
        assert_same(reference, other)
    assert streamed >= 2


def test_other_weights_would_give_other_logits(tmp_path, monkeypatch):
    """What the test above rests on: one exponent read wrongly in each tile's list is enough."""
    folder, store = write_tiny("llama", tmp_path / "model"), tmp_path / "store"

    def shifted(matrix_OI):
        packed = packed_without_loss(matrix_OI)
        packed.exponents[:, 0] += 1
        return packed

    monkeypatch.setattr("zinfer.kernels.packer.packed", shifted)
    shard(folder, store, encoder=Packer())
    reference, other = (run(at, device="cpu", memory={"host": "1GiB"}) for at in (folder, store))
    assert not torch.equal(reference[2], other[2])
    harmed = check_quality(store, folder, Packer(), silent)
    assert harmed
    assert not any(row.is_close for row in harmed)


def test_a_store_is_made_once_again_byte_by_byte_and_harm_is_seen(tmp_path):
    for name in ("one", "two"):
        shard(DEMO, tmp_path / name, encoder=Packer())
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    store = tmp_path / "one"
    report = check_quality(store, DEMO, Packer(), silent)
    assert len(report) == 42
    assert all(row.is_same and row.is_close and row.found.rms == 0 for row in report)
    manifest = read_manifest(store)
    piece = next(p for e in manifest.extents for p in e.slices if p.name.endswith("gate_proj.weight.codes"))
    path = store / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[piece.offset + 100] ^= 0x10
    path.write_bytes(data)
    assert len(verify_store(store)) == 1, "the checksum sees it"
    rehash(store)
    assert verify_store(store) == ()
    harmed = [row.name for row in check_quality(store, DEMO, Packer(), silent) if not row.is_same]
    assert harmed == [piece.name.removesuffix(".codes")]


def test_a_store_of_published_weights_can_be_packed_and_a_packed_one_not_rounded(tmp_path):
    plain, store, again = (tmp_path / name for name in ("plain", "store", "again"))
    shard(write_tiny("llama", tmp_path / "model"), plain)
    shard(plain, store, encoder=Packer())
    shard(store, again, encoder=Packer())
    one, two = (contents(folder) for folder in (store, again))
    assert one.keys() == two.keys()
    assert all(one[name] == two[name] for name in one if name.endswith(".safetensors"))
    with pytest.raises(UsageError, match="holds lossless weights") as caught:
        shard(store, tmp_path / "no", encoder=Quantiser("int8", "panels-64"))
    assert caught.value.code == "ZI-3004"


def test_4156_weights_of_too_many_exponents_and_3006_of_another_dtype(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_tiny("llama", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    wild = tensors["model.layers.1.mlp.up_proj.weight"]
    wild.copy_(torch.exp2(torch.arange(wild.numel()).view(wild.shape) % 100 - 50.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*there is room for 8") as caught:
        shard(folder, tmp_path / "store", encoder=Packer())
    assert caught.value.code == "ZI-4156"
    assert "--out DIR   # as published" in caught.value.remedy
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(wild.shape, dtype=torch.bfloat16)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(wild.shape, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as mixed:
        shard(folder, tmp_path / "mixed", encoder=Packer())
    assert mixed.value.code in ("ZI-4154", "ZI-4156")
    with pytest.raises(UsageError, match="F32") as refused:
        shard(write_tiny("llama", tmp_path / "wide", "float32"), tmp_path / "no", encoder=Packer())
    assert refused.value.code == "ZI-3006"
