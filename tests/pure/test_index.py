"""A model folder from a stranger: what is accepted, and one test for every number of a refusal."""

import errno
import json
import os
import socket
from pathlib import Path

import pytest
from checkpoint_files import header_fields, safetensors_bytes, tiny_spec, write_folder
from hypothesis import given
from hypothesis import strategies as st

from zinfer.checkpoint.check import check_weights, published_shapes
from zinfer.checkpoint.folder import is_plain_name
from zinfer.checkpoint.index import CheckpointIndex
from zinfer.errors import CheckpointError, IntegrityError, MachineError

SHARDS = {
    "model-00001-of-00002.safetensors": {"a": (3, 4), "b": (5,)},
    "model-00002-of-00002.safetensors": {"c": (2, 2)},
}
FIRST, SECOND = SHARDS
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", SHARDS)


def refused(path, error=CheckpointError):
    with pytest.raises(error) as caught:
        CheckpointIndex.open(path)
    assert caught.value.remedy
    assert "\n" not in caught.value.message
    return caught.value


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined_and_ranges_are_the_files_own(folder):
    index = CheckpointIndex.open(str(folder))
    assert index.has_weights
    assert not index.is_store
    assert index.file_names == tuple(SHARDS)
    assert {name: entry.shape for name, entry in index.weights.items()} == SHARDS[FIRST] | SHARDS[SECOND]
    assert index.dtypes == {"a": "BF16", "b": "BF16", "c": "BF16"}
    entry = index.weights["c"]
    assert index.files[entry.file].name == SECOND
    assert entry.offset + entry.nbytes == index.file_sizes[entry.file]
    assert index.weight_bytes == 2 * (12 + 5 + 4)


def test_a_single_file_goes_before_an_index(folder):
    (folder / "model.safetensors").write_bytes(safetensors_bytes(header_fields({"z": (1,)})))
    assert list(CheckpointIndex.open(folder).weights) == ["z"]


def test_side_files_are_found_and_defaults_read(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "tokenizer.json").write_text("{}")
    index = CheckpointIndex.open(folder)
    assert index.generation_config == {"eos_token_id": [1, 2]}
    assert index.side_files["tokenizer.json"].read_text() == "{}"


@pytest.mark.parametrize("given_path", ["config.json", "elsewhere.json"])
def test_a_lone_config_can_be_planned(tmp_path, given_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "elsewhere.json").symlink_to(tmp_path / "config.json")
    for path in (tmp_path / given_path, tmp_path):
        index = CheckpointIndex.open(path)
        assert index.config == {"model_type": "llama"}
        assert not index.has_weights


def test_a_hugging_face_cache_entry_works(tmp_path):
    entry = tmp_path / "models--org--name"
    write_folder(entry / "plain", SHARDS)
    snapshot = entry / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    for number, file in enumerate(sorted((entry / "plain").iterdir())):
        file.rename(entry / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert set(CheckpointIndex.open(snapshot).weights) == {"a", "b", "c"}
    (tmp_path / "link").symlink_to(snapshot)
    assert set(CheckpointIndex.open(tmp_path / "link").weights) == {"a", "b", "c"}


def test_4018_a_cache_entry_names_its_snapshot(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--name" / "blobs").mkdir()
    error = refused(tmp_path / "models--org--name")
    assert (error.code, error.remedy) == ("ZI-4018", f"zinfer inspect {snapshot}")


def test_4001_a_wrong_path_names_what_is_near(folder):
    error = refused(folder.with_name("modle"))
    assert (error.code, "model" in error.message) == ("ZI-4001", True)
    assert refused(folder / "no" / "such").remedy == f"ls {folder}"
    assert refused("meta-llama/Llama-9").remedy.startswith("hf download meta-llama/Llama-9 ")


def test_4002_a_file_instead_of_the_folder(folder):
    error = refused(folder / FIRST)
    assert (error.code, error.remedy) == ("ZI-4002", f"zinfer inspect {folder}")


def test_4003_a_lora_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors_bytes({}))
    assert refused(tmp_path).code == "ZI-4003"


def test_4004_pickles_are_not_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pytorch_model.bin")  # opening it would hang
    assert refused(tmp_path).code == "ZI-4004"


def test_4005_gguf_as_folder_or_file(tmp_path):
    (tmp_path / "x-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path).code == "ZI-4005"
    assert refused(tmp_path / "x-Q4_K_M.gguf").code == "ZI-4005"


def test_4006_nothing_there(tmp_path):
    assert refused(tmp_path).code == "ZI-4006"
    (tmp_path / "readme.md").write_text("hello")
    assert refused(tmp_path).code == "ZI-4006"


def test_4007_weights_without_a_config(folder):
    (folder / "config.json").unlink()
    assert refused(folder).code == "ZI-4007"


JSON_LIES = {
    "cut": b'{"a": 1',
    "a list": b"[]",
    "NaN": b'{"a": NaN}',
    "bytes": b'{"a": "\xff"}',
    "deep": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "too large": b'{"a": "' + b" " * (16 * 2**20) + b'"}',
    "empty": b"",
}


@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
@pytest.mark.parametrize("text", JSON_LIES.values(), ids=list(JSON_LIES))
def test_4008_json_that_is_none(folder, name, text):
    (folder / name).write_bytes(text)
    error = refused(folder)
    assert (error.code, name in error.message) == ("ZI-4008", True)


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {f"t{i}": f"f{i}" for i in range(10_001)}])
def test_4009_a_weight_map_that_is_none(folder, weight_map):
    write_index(folder, weight_map)
    assert refused(folder).code == "ZI-4009"


ESCAPES = [
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "x" * 300,
    "\u202egpj",
    "a\ud800",
]


@pytest.mark.parametrize("name", ESCAPES)
def test_4010_an_index_cannot_lead_out_of_the_folder(folder, name):
    assert not is_plain_name(name)
    write_index(folder, {"a": name})
    assert refused(folder).code == ("ZI-4008" if name.endswith("\ud800") else "ZI-4010")


@pytest.mark.parametrize("name", [FIRST, "config.json", "tokenizer.json"])
def test_4011_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to("../secret")
    assert refused(folder).code == "ZI-4011"


def test_4011_blobs_of_another_entry_are_outside(tmp_path):
    snapshot = write_folder(tmp_path / "models--a--b" / "snapshots" / "x", {})
    (tmp_path / "models--c--d" / "blobs").mkdir(parents=True)
    (tmp_path / "models--c--d" / "blobs" / "0").write_text("{}")
    (snapshot / "model.safetensors").symlink_to(tmp_path / "models--c--d" / "blobs" / "0")
    assert refused(snapshot).code == "ZI-4011"


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


IRREGULAR = {
    "fifo": os.mkfifo,
    "folder": os.mkdir,
    "socket": make_socket,
    "link to a fifo": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    "link to itself": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("name", [FIRST, "model.safetensors", "config.json", INDEX])
@pytest.mark.parametrize("make", IRREGULAR.values(), ids=list(IRREGULAR))
def test_4012_only_regular_files_are_opened(folder, name, make):
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert refused(folder).code == "ZI-4012"


def test_4012_a_device_is_not_opened(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert refused(folder).code == "ZI-4011"
    assert refused("/dev/zero").code == "ZI-4012"


def test_4013_a_shard_is_missing(folder):
    (folder / SECOND).unlink()
    error = refused(folder)
    assert (error.code, SECOND in error.message) == ("ZI-4013", True)


def test_4014_the_index_promises_what_no_header_has(folder):
    write_index(folder, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert refused(folder).code == "ZI-4014"
    write_index(folder, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert refused(folder).code == "ZI-4014"


def test_4015_a_header_has_what_the_index_does_not_list(folder):
    write_index(folder, {"a": FIRST, "c": SECOND})
    assert refused(folder).code == "ZI-4015"


def test_4016_a_tensor_in_two_shards(folder):
    (folder / SECOND).write_bytes(safetensors_bytes(header_fields({"c": (2, 2), "a": (3, 4)})))
    assert refused(folder).code == "ZI-4016"


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_4017_duplicate_keys(folder, name):
    (folder / name).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert refused(folder).code == "ZI-4017"


def test_4019_shards_without_their_index(folder):
    (folder / INDEX).unlink()
    assert refused(folder).code == "ZI-4019"


@pytest.mark.parametrize("call", ["open", "preadv", "listdir"])
def test_5041_what_the_system_will_not_let_be_read(folder, monkeypatch, call):
    def fail(*_args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    error = refused(folder, MachineError)
    assert (error.code, "Input/output error" in error.message) == ("ZI-5041", True)


def test_4101_a_file_that_shrinks_while_it_is_read(folder, monkeypatch):
    monkeypatch.setattr(os, "preadv", lambda *_args: 0)
    assert refused(folder).code == "ZI-4101"


def test_4105_many_large_headers_are_not_all_parsed(folder):
    names = [f"m{number}.safetensors" for number in range(4)]
    text = safetensors_bytes(b"{}" + b" " * (12 * 2**20), b"")
    for name in names:
        (folder / name).write_bytes(text)
    write_index(folder, {name: name for name in names})
    assert refused(folder).code == "ZI-4105"


def test_6001_an_unfinished_store_is_not_a_model(folder):
    (folder / "zinfer.journal").touch()
    assert refused(folder, IntegrityError).code == "ZI-6001"


def test_a_finished_store_is_recognised(folder):
    (folder / "zinfer.json").write_text('{"dtypes": {"a": "BF16"}}')
    index = CheckpointIndex.open(folder)
    assert index.is_store
    assert index.has_weights
    assert not index.weights
    assert index.dtypes == {"a": "BF16"}


@given(st.binary(max_size=300))
def test_an_arbitrary_index_is_refused_or_read(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("index")
    (folder / "config.json").write_text("{}")
    (folder / INDEX).write_bytes(text)
    refused(folder)


def checked(tmp_path, shapes, dtype="BF16", **changes):
    spec = tiny_spec(**changes)
    folder = write_folder(tmp_path / "model", {"model.safetensors": shapes}, dtype=dtype)
    check_weights(CheckpointIndex.open(folder), spec)


def test_a_fitting_checkpoint_passes_and_leftovers_are_ignored(tmp_path):
    leftovers = [
        "layers.0.self_attn.rotary_emb.inv_freq",
        "h.1.attn.bias",
        "transformer.h.0.attn.masked_bias",
    ]
    leftovers += ["gpt_neox.layers.3.attention.bias", "gpt_neox.layers.3.attention.masked_bias"]
    checked(tmp_path, published_shapes(tiny_spec()) | dict.fromkeys(leftovers, (2, 2)))
    checked(tmp_path, published_shapes(tiny_spec(tied=True)) | {"lm_head.weight": (50, 24)}, tied=True)


def test_4151_and_4152_missing_and_unexpected_are_listed(tmp_path):
    shapes = published_shapes(tiny_spec())
    del shapes["layers.1.down"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors: 'layers\.1\.down'\n") as caught:
        checked(tmp_path, shapes)
    assert caught.value.code == "ZI-4151"
    with pytest.raises(CheckpointError, match=r"unexpected: 'lora'") as caught:
        checked(tmp_path, shapes | {"lora": (1,)})
    assert caught.value.code == "ZI-4151"
    with pytest.raises(CheckpointError, match=r"20 unexpected tensors: .* and 12 more") as caught:
        checked(tmp_path, published_shapes(tiny_spec()) | {f"lora.{i}": (1,) for i in range(20)})
    assert caught.value.code == "ZI-4152"
    with pytest.raises(CheckpointError) as caught:  # an untied model's head is no leftover
        checked(tmp_path, published_shapes(tiny_spec()) | {"lm_head.weight": (50, 24)})
    assert caught.value.code == "ZI-4152"


def test_4153_both_shapes_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"'head' is \(51, 24\) instead of \(50, 24\)") as caught:
        checked(tmp_path, published_shapes(tiny_spec()) | {"head": (51, 24)})
    assert caught.value.code == "ZI-4153"


def test_4154_weights_that_we_do_not_compute_in(tmp_path):
    with pytest.raises(CheckpointError, match="U8") as caught:
        checked(tmp_path, published_shapes(tiny_spec()), dtype="U8")
    assert caught.value.code == "ZI-4154"
