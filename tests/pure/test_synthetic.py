"""Random checkpoints: right names and shapes, the same bytes for the same seed, numbers of a sane size."""

import json
from pathlib import Path

import make_checkpoint
import numpy as np
import pytest
from checkpoint_files import tiny_spec
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from zinfer.checkpoint.check import check_weights, published_shapes
from zinfer.checkpoint.describe import describe
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.checkpoint.synthetic import write_checkpoint
from zinfer.chunks.pack import assemble
from zinfer.chunks.source import imagined_source
from zinfer.chunks.store import shard
from zinfer.errors import UsageError
from zinfer.spec.read import read_spec

SHAPES = sorted(path.stem for path in make_checkpoint.SHAPES.glob("*.json"))
# As published (opt-175b: by hand, from its paper's sizes); OPT's positions have 2 rows more than its context.
PARAMETERS = {
    "gpt2": 124_439_808,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "opt-1.3b": 1_315_758_080,
    "opt-175b": 174_604_468_224,
    "opt-30b": 29_974_540_288,
    "opt-6.7b": 6_658_473_984,
    "phi-3-mini": 3_821_079_552,
    "pythia-1b": 1_011_781_632,
    "qwen3-8b": 8_190_735_360,
    "tinyllama-1.1b": 1_100_048_384,
}


def values(folder, name):
    """A BF16 tensor as float32, read by hand."""
    entry = CheckpointIndex.open(folder).weights[name]
    data = (folder / "model.safetensors").read_bytes()[entry.offset :][: entry.nbytes]
    words = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
    return words.view(np.float32).reshape(entry.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shipped_shape_is_read_planned_and_as_large_as_published(shape):
    config = make_checkpoint.shape_config(shape)
    spec = read_spec(config)
    assert spec.num_parameters == PARAMETERS[shape]
    table = assemble(imagined_source(spec.program, spec.lookups, spec.dtype), 2**30)
    width = 2 if spec.dtype in {"BF16", "F16"} else 4
    assert sum(chunk.weight_bytes for chunk in table.chunks) == spec.num_parameters * width


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_shards_fit_the_spec_and_depend_on_the_seed_alone(tmp_path, dtype):
    spec = tiny_spec()
    for name, seed, shard_bytes in (("a", 1, 4000), ("b", 1, 4000), ("c", 2, 4000), ("d", 1, 10**9)):
        write_checkpoint(spec, {"a": 1}, tmp_path / name, seed, dtype, shard_bytes)
        check_weights(CheckpointIndex.open(tmp_path / name), spec)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abcd"]
    assert files[0] == files[1]
    assert files[0] != files[2]
    assert len(files[0]) > 3
    assert set(files[3]) == {"config.json", "model.safetensors"}
    index, whole = CheckpointIndex.open(tmp_path / "a"), CheckpointIndex.open(tmp_path / "d")
    for name, entry in whole.weights.items():
        part = index.weights[name]
        data = index.files[part.file].read_bytes()[part.offset :][: part.nbytes]
        assert data == files[3]["model.safetensors"][entry.offset :][: entry.nbytes]


def test_the_header_is_the_upstream_librarys(tmp_path):
    write_checkpoint(tiny_spec(), {}, tmp_path / "ours", dtype="F32")
    ours = (tmp_path / "ours" / "model.safetensors").read_bytes()
    save_file(load_file(tmp_path / "ours" / "model.safetensors"), tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "theirs").read_bytes() == ours
    with safe_open(tmp_path / "theirs", "np") as file:
        assert {name: file.get_tensor(name).shape for name in file.keys()} == published_shapes(tiny_spec())  # noqa: SIM118


def test_numbers_have_the_size_that_keeps_logits_of_order_1(tmp_path):
    spec = tiny_spec(width=1024, mlp=1536, vocab=600, layers=1)
    write_checkpoint(spec, {}, tmp_path)
    matrix = values(tmp_path, "layers.0.up")
    assert matrix.std() == pytest.approx(1024**-0.5, rel=0.01)
    # Larger than what is drawn at once: no row comes twice.
    assert matrix.size > 2**20
    assert len(np.unique(matrix[:, :4], axis=0)) == len(matrix)
    assert values(tmp_path, "layers.0.down").std() == pytest.approx(1536**-0.5, rel=0.01)
    assert values(tmp_path, "embed").std() == pytest.approx(1024**-0.5, rel=0.01)
    norm = values(tmp_path, "layers.0.norm")
    assert abs(norm.mean() - 1) < 0.01
    assert 0 < norm.std() < 0.1
    assert 0 < values(tmp_path, "layers.0.q.bias").std() < 0.05


def test_bf16_is_rounded_to_nearest(tmp_path):
    for dtype in ("F32", "BF16"):
        write_checkpoint(tiny_spec(), {}, tmp_path / dtype, dtype=dtype)
    exact = load_file(tmp_path / "F32" / "model.safetensors")["layers.0.q"]
    assert np.all(np.abs(values(tmp_path / "BF16", "layers.0.q") - exact) <= np.abs(exact) * 2**-8)


def test_a_folder_with_weights_is_not_mixed_with_others(tmp_path):
    write_checkpoint(tiny_spec(), {}, tmp_path)
    with pytest.raises(UsageError) as caught:
        write_checkpoint(tiny_spec(), {}, tmp_path, shard_bytes=4000)
    assert caught.value.code == "ZI-1051"


def test_the_tool_writes_what_was_asked_for(tmp_path, monkeypatch, capsys):
    small = {"vocab_size": 64, "n_embd": 8, "n_head": 2, "n_positions": 16, "n_layer": 12}
    (tmp_path / "toy.json").write_text(
        json.dumps(json.loads((make_checkpoint.SHAPES / "gpt2.json").read_text()) | small)
    )
    monkeypatch.setattr(make_checkpoint, "SHAPES", Path(tmp_path))
    out = str(tmp_path / "out")
    command = ["make_checkpoint.py", "--shape", "toy", "--out", out, "--layers", "3", "--dtype", "f16"]
    monkeypatch.setattr("sys.argv", command)
    make_checkpoint.main()
    index = CheckpointIndex.open(out)
    spec = read_spec(index.config, published=index.dtypes)
    assert (spec.num_layers, spec.dtype, spec.transposed) == (3, "F16", True)
    check_weights(index, spec)
    assert out in capsys.readouterr().out


def test_inspect_describes_what_is_there(tmp_path):
    config = make_checkpoint.shape_config("gpt2") | {"vocab_size": 64, "n_embd": 8, "n_head": 2, "n_layer": 2}
    spec = read_spec(config)
    write_checkpoint(spec, config, tmp_path / "model", shard_bytes=4000)
    index = CheckpointIndex.open(tmp_path / "model")
    told = json.loads(json.dumps(describe(index, spec, tensors=True)))
    assert (told["kind"], told["architecture"], told["num_layers"]) == ("checkpoint", "GPT2LMHeadModel", 2)
    assert told["side_files"] == ["config.json"]
    assert told["files"] == sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert told["weight_file_bytes"] > sum(row["nbytes"] for row in told["tensors"]) == index.weight_bytes
    assert {row["name"] for row in told["tensors"]} == set(index.weights)
    shard(tmp_path / "model", tmp_path / "store")
    store = describe(CheckpointIndex.open(tmp_path / "store"), spec)
    assert (store["kind"], store["files"]) == ("store", ["weights-00001-of-00001.safetensors"])
    assert store["num_tensors"] == told["num_tensors"]
    lone = describe(CheckpointIndex.open(tmp_path / "model" / "config.json"), spec, tensors=True)
    assert (lone["kind"], lone["files"], lone["tensors"]) == ("config", [], [])
