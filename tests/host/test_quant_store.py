"""Quantised stores: what is in them, that interruptions leave no trace, and that harm is seen."""

import json

import pytest
import torch
from faulty_disk import StepDisk, disk_full
from safetensors.torch import load_file
from stores import contents, opened, rehash
from tiny_models import write_tiny

from zinfer import LLM, SamplingParams
from zinfer.api import DEMO
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.chunks.manifest import read_manifest
from zinfer.chunks.quality import check_quality
from zinfer.chunks.store import shard, silent, verify_store
from zinfer.errors import BudgetError, CheckpointError, IntegrityError, UsageError
from zinfer.kernels.panels import dequantise, quant_weight
from zinfer.kernels.quantise import Quantiser
from zinfer.spec.quant import FORMATS, PANELS
from zinfer.spec.stored import op_bytes

RUN = {"device": "cpu", "machine": "sim-default", "threads": 1, "max_rows": 24}


def tensors_of(folder):
    return {name: part for path in folder.glob("*.safetensors") for name, part in load_file(path).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
@pytest.mark.parametrize("weights", FORMATS)
def test_any_tool_finds_the_published_numbers_in_it(family, weights, tmp_path):
    folder = write_tiny(family, tmp_path / "model")
    shard(folder, tmp_path / "store", encoder=Quantiser(weights, "panels-64"))
    published, stored = tensors_of(folder), tensors_of(tmp_path / "store")
    spec, _ = opened(tmp_path / "store")
    assert spec.weights == weights
    quantised = {op.matrix.name: op for op in spec.program if op.stored}
    assert quantised
    tables = {lookup.name for lookup in spec.lookups}
    assert not quantised.keys() & tables, "embeddings, and heads tied to them, stay as published"
    for name, tensor in published.items():
        if name in quantised:
            op = quantised[name]
            parts = {part.role: stored[part.name] for part in op.stored if part.dtype}
            matrix = (tensor.t() if op.transposed else tensor).float()
            got = dequantise(quant_weight(parts, len(matrix)))
            assert (got - matrix).norm() / matrix.norm() < {"int8": 0.008, "int4": 0.13}[weights]
        elif name in stored:
            assert torch.equal(stored[name], tensor)
        else:
            assert name.endswith("lm_head.weight"), name


@pytest.mark.parametrize(("weights", "bits"), [("int8", 8.5), ("int4", 4.5)])
def test_bytes_are_those_that_the_plan_counts(weights, bits, tmp_path):
    shard(DEMO, tmp_path / "store", encoder=Quantiser(weights, "panels-64"))
    spec, source = opened(tmp_path / "store")
    numel = nbytes = 0
    for op in spec.program:
        if op.stored:
            numel += op.matrix.numel
            nbytes += sum(
                part.numel * (2 if part.role == "scales" else 1) for part in op.stored if part.dtype
            )
    assert 8 * nbytes / numel == bits
    held = {
        unit.op: sum(place.nbytes for place in unit.places) for unit in source.units if unit.op is not None
    }
    assert held == {op.index: op_bytes(spec, op) for op in spec.program if op.reads}


def test_an_interruption_leaves_no_trace(tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    encoder = Quantiser("int4", "panels-64")
    counting = StepDisk()
    shard(folder, tmp_path / "whole", encoder=encoder, disk=counting)
    for at in (3, 7, 12, 20, 28):
        out = tmp_path / f"out{at}"
        with pytest.raises(BudgetError):
            shard(folder, out, encoder=encoder, disk=StepDisk(at, disk_full, only=("write",)))
        shard(folder, out, encoder=encoder)
        assert contents(out) == contents(tmp_path / "whole")
    assert verify_store(tmp_path / "whole") == ()


@pytest.mark.parametrize("weights", FORMATS)
def test_one_groups_scale_fails_the_quality_report(weights, tmp_path):
    """Even where whoever changed it made the checksums fit."""
    store = tmp_path / "store"
    encoder = Quantiser(weights, "panels-64")
    shard(DEMO, store, encoder=encoder)
    report = check_quality(store, DEMO, encoder, silent)
    assert len(report) == 42
    assert all(row.is_same and row.is_close for row in report)
    manifest = read_manifest(store)
    piece = next(p for e in manifest.extents for p in e.slices if p.name.endswith("gate_proj.weight.scales"))
    path = store / manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[piece.offset] ^= 0x40  # half of the mantissa's precision: the scale changes by a quarter
    path.write_bytes(data)
    assert len(verify_store(store)) == 1, "the checksum sees it"
    rehash(store)
    assert verify_store(store) == ()
    harmed = [row.name for row in check_quality(store, DEMO, encoder, silent) if not row.is_same]
    assert harmed == [piece.name.removesuffix(".scales")]


def change(store, **changes):
    manifest = json.loads((store / "zinfer.json").read_bytes())
    manifest["quantised"] |= changes
    (store / "zinfer.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("lie", [{"layout": "amx-9"}, {"group": 32}])
def test_6006_an_unknown_kernel(lie, tmp_path):
    store = tmp_path / "store"
    shard(write_tiny("llama", tmp_path / "model"), store, encoder=Quantiser("int4", "panels-64"))
    change(store, **lie)
    with pytest.raises(IntegrityError, match=r"int4 weights") as caught:
        opened(store)
    assert caught.value.code == "ZI-6006"
    assert "--weights int4" in caught.value.remedy


def test_6002_another_layout_than_the_shapes_say(tmp_path):
    store = tmp_path / "store"
    shard(write_tiny("llama", tmp_path / "model"), store, encoder=Quantiser("int4", "panels-64"))
    change(store, layout="panels-32")
    with pytest.raises(IntegrityError) as caught:
        opened(store)
    assert caught.value.code in ("ZI-6002", "ZI-6003")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_4155_what_is_no_number_is_not_quantised(value, tmp_path):
    folder = write_tiny("llama", tmp_path / "model")
    index = CheckpointIndex.open(folder)
    entry = index.weights["model.layers.1.self_attn.o_proj.weight"]
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    octets = torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8).tolist()
    data[entry.offset + 20 : entry.offset + 22] = bytes(octets)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"o_proj") as caught:
        shard(folder, tmp_path / "store", encoder=Quantiser("int8", "panels-64"))
    assert caught.value.code == "ZI-4155"


@pytest.mark.parametrize("weights", FORMATS)
def test_text_is_the_same_in_every_layout(weights, tmp_path):
    """Panels that this processor's kernel cannot read are unpacked; arg-max tokens of the bundled model agree."""
    params = SamplingParams(max_tokens=8, temperature=0.0)
    texts = []
    for layout in PANELS:
        shard(DEMO, tmp_path / layout, encoder=Quantiser(weights, layout))
        with LLM(tmp_path / layout, **RUN, memory={"host": "1GiB"}) as llm:
            texts.append(llm.generate("import ", params)[0].outputs[0].text)
    assert texts[0] == texts[1]


@pytest.mark.parametrize("weights", FORMATS)
def test_a_store_is_laid_out_anew_for_another_kernel(weights, tmp_path):
    """Not rounded again: what comes out is what the published model gives for that kernel, byte for byte."""
    folder = write_tiny("llama", tmp_path / "model")
    for layout in PANELS:
        shard(folder, tmp_path / layout, encoder=Quantiser(weights, layout))
    for layout, other in [("panels-64", "panels-32"), ("panels-32", "panels-64")]:
        again = tmp_path / f"{layout}-again"
        shard(tmp_path / other, again, encoder=Quantiser(weights, layout))
        assert contents(again) == contents(tmp_path / layout)
        shard(tmp_path / other, again, encoder=Quantiser(weights, layout))  # it is there already
    plain = tmp_path / "plain"
    shard(folder, plain)
    shard(plain, tmp_path / "late", encoder=Quantiser(weights, "panels-64"))
    assert contents(tmp_path / "late") == contents(tmp_path / "panels-64")


def test_3004_what_was_rounded_is_not_rounded_again(tmp_path):
    shard(write_tiny("llama", tmp_path / "model"), tmp_path / "store", encoder=Quantiser("int8", "panels-64"))
    with pytest.raises(UsageError) as caught:
        shard(tmp_path / "store", tmp_path / "other", encoder=Quantiser("int4", "panels-64"))
    assert caught.value.code == "ZI-3004"
