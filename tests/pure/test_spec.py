"""Configs of published models and of strangers: parameter counts, programs, both dialects, refusals."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import PUBLISHED, llama, llama31, mistral, opt, phi3, phi3_long, qwen2

from zinfer.errors import CheckpointError
from zinfer.spec import cost, program
from zinfer.spec.families import FAMILIES
from zinfer.spec.read import read_spec
from zinfer.spec.records import DTYPE_BYTES

TINY = llama(64, 128, 2, 4, 2, 101)
WIDE = llama(2**20, 2**22, 4096, 2**10, 2, 101)


def refused(code, config, *words, generation=None):
    with pytest.raises(CheckpointError) as info:
        read_spec(config, generation)
    assert info.value.code == code
    assert info.value.remedy
    for word in words:
        assert word in info.value.message


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name):
    config, num_parameters = PUBLISHED[name]
    assert read_spec(config).num_parameters == num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_program_is_whole_and_in_order(name):
    spec = read_spec(PUBLISHED[name][0])
    assert [op.index for op in spec.program] == list(range(len(spec.program)))
    assert [op.layer for op in spec.program] == sorted(op.layer for op in spec.program)
    keys = [weight.key for op in spec.program for weight in op.weights]
    assert len(set(keys)) == len(keys)
    ends = {}
    for op in spec.program:
        for weight in op.weights:
            assert weight.start == ends.get(weight.name, 0)
            assert weight.shape[0] == weight.stop - weight.start
            ends[weight.name] = weight.stop
    for op in spec.program:
        if op.matrix and not spec.transposed:
            assert op.matrix.numel * DTYPE_BYTES[spec.dtype] <= program.BLOCK_BYTES
            assert op.matrix.start % program.BLOCK_ROWS == 0
        rows, columns = program.matrix_shape(spec, op.kind)
        if op.matrix:
            assert ends[op.matrix.name] in (rows, columns)


def test_blocks_of_a_tied_head_are_rows_of_the_embedding():
    spec = read_spec(PUBLISHED["Llama-3.2-1B"][0])
    head = [op for op in spec.program if op.kind == "head"]
    assert len(head) == head[0].blocks > 1
    assert {op.matrix.name for op in head} == {"model.embed_tokens.weight"} == {spec.lookups[0].name}
    assert [weight.role for weight in head[0].weights] == ["norm", "matrix"]


def test_a_post_norm_is_read_by_the_next_product():
    spec = read_spec(PUBLISHED["opt-350m"][0])
    norms = {
        (op.layer, op.kind): weight.name
        for op in spec.program
        for weight in op.weights
        if weight.role == "norm"
    }
    assert (0, "q") not in norms
    assert norms[0, "up"] == "model.decoder.layers.0.self_attn_layer_norm.weight"
    assert norms[1, "q"] == "model.decoder.layers.0.final_layer_norm.weight"
    assert norms[24, "project_out"] == "model.decoder.layers.23.final_layer_norm.weight"


def test_the_largest_model_is_read_in_a_moment():
    spec = read_spec(PUBLISHED["Llama-3.1-405B"][0])
    assert cost.activation_peak_bytes(spec, 2048, 64, 8192) > 0
    assert len(spec.program) < 20_000


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_row_blocks_cover_all_rows_evenly(num_rows, row_bytes):
    blocks = program.row_blocks(num_rows, row_bytes)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == num_rows
    assert all(one[1] == other[0] for one, other in pairwise(blocks))
    sizes = [stop - start for start, stop in blocks]
    assert all(size % program.BLOCK_ROWS == 0 for size in sizes[:-1])
    assert max(sizes) * row_bytes <= program.BLOCK_BYTES or max(sizes) <= program.BLOCK_ROWS
    assert min(sizes) > 0


def test_published_names_settle_prefix_head_and_dtype():
    gpt2 = PUBLISHED["gpt2"][0]
    assert read_spec(gpt2).lookups[0].name == "transformer.wte.weight"
    assert read_spec(gpt2).dtype == "F32"
    bare = read_spec(gpt2, None, {"wte.weight": "BF16"})
    assert (bare.lookups[0].name, bare.dtype) == ("wte.weight", "BF16")
    neox = PUBLISHED["pythia-1b"][0]
    assert read_spec(neox).program[-1].matrix.name == "embed_out.weight"
    assert read_spec(neox, None, {"lm_head.weight": "F16"}).program[-1].matrix.name == "lm_head.weight"


def test_eos_and_bos_ids_come_from_the_generation_config_first():
    config = TINY | {"eos_token_id": 2, "bos_token_id": 1}
    assert (read_spec(config).eos_ids, read_spec(config).bos_id) == ((2,), 1)
    spec = read_spec(config, {"eos_token_id": [7, 8], "bos_token_id": None})
    assert (spec.eos_ids, spec.bos_id) == ((7, 8), 1)
    assert read_spec(TINY).eos_ids == ()
    refused("ZI-4203", TINY, "eos_token_id", generation={"eos_token_id": ["</s>"]})


def test_sliding_windows():
    assert read_spec(PUBLISHED["Mistral-7B-v0.1"][0]).sliding_window == 4096
    assert read_spec(mistral(32000, sliding_window=None)).sliding_window is None
    assert read_spec(mistral(32000)).sliding_window == 4096  # transformers' default where the key is absent
    small = {"vocab_size": 100, "use_sliding_window": True, "sliding_window": 9}
    flagged = qwen2(64, 128, 4, 4, 2, 100) | small
    assert read_spec(flagged | {"max_window_layers": 3}).window_layers == (False, False, False, True)
    assert read_spec(flagged | {"use_sliding_window": False}).sliding_window is None
    types = ["sliding_attention", "full_attention"] * 2
    assert read_spec(flagged | {"layer_types": types}).window_layers == (True, False, True, False)
    refused("ZI-4203", flagged | {"layer_types": types[1:]}, "layer_types")


def test_rope_of_published_models():
    rope = read_spec(PUBLISHED["Llama-3.1-8B"][0]).rope
    assert (rope.kind, rope.theta, rope.rotary_dim) == ("llama3", 500000.0, 128)
    assert read_spec(PUBLISHED["gpt-neox-20b"][0]).rope.rotary_dim == 24
    assert read_spec(PUBLISHED["gpt2"][0]).rope is None
    old, new = (read_spec(phi3_long(kind)).rope for kind in ("su", "longrope"))
    assert old == new
    assert old.parameters["attention_factor"] == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    spec = read_spec(PUBLISHED["Qwen2-7B"][0] | {"rope_scaling": yarn})
    assert spec.rope.parameters["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)


def test_the_two_dialects_agree():
    old = llama31(64, 128, 2, 4, 2, 101)
    new = {
        key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    new |= {"rope_parameters": old["rope_scaling"] | {"rope_theta": 500000.0}, "dtype": "bfloat16"}
    assert read_spec(old) == read_spec(new)


def test_unknown_architectures_list_the_known_ones():
    for value in (["MambaForCausalLM"], [], None, "LlamaForCausalLM", [3], ["LlamaForCausalLM", "X"]):
        refused("ZI-4201", TINY | {"architectures": value}, *FAMILIES)


def test_quantised_checkpoints_are_refused():
    refused("ZI-4205", TINY | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_missing_and_ill_typed_keys_are_named(key):
    refused("ZI-4202", {name: value for name, value in TINY.items() if name != key}, key)
    refused("ZI-4202", TINY | {key: None}, key)
    for value in ("64", 64.0, True, [64], {"a": 1}):
        refused("ZI-4203", TINY | {key: value}, key)
    for value in (0, -4, 10**12, 2**70):
        refused("ZI-4204", TINY | {key: value}, key)


@pytest.mark.parametrize(
    ("code", "change", "word"),
    [
        ("ZI-4204", {"num_key_value_heads": 3}, "3 key-value heads"),
        ("ZI-4204", {"hidden_size": 66}, "not a multiple"),
        ("ZI-4204", WIDE, "parameters"),
        ("ZI-4204", {"head_dim": 15}, "even number"),
        ("ZI-4203", {"rms_norm_eps": "small"}, "rms_norm_eps"),
        ("ZI-4204", {"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ("ZI-4204", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("ZI-4203", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("ZI-4203", {"attention_bias": 1}, "attention_bias"),
        ("ZI-4205", {"hidden_act": "xielu"}, "hidden_act"),
        ("ZI-4205", {"torch_dtype": "int8"}, "torch_dtype"),
        ("ZI-4203", {"torch_dtype": 16}, "torch_dtype"),
        ("ZI-4203", {"rope_scaling": "linear"}, "rope_scaling"),
        ("ZI-4205", {"rope_scaling": {"type": "mrope", "factor": 2.0}}, "rope_scaling.type"),
        ("ZI-4202", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ("ZI-4204", {"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ("ZI-4204", {"rope_theta": 0.0}, "rope_theta"),
        ("ZI-4205", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer to layer"),
        (
            "ZI-4204",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 4,
                }
            },
            "high_freq_factor",
        ),
        (
            "ZI-4203",
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
        ),
    ],
)
def test_hostile_values_are_refused(code, change, word):
    refused(code, TINY | change, word)


def test_options_that_change_the_mathematics_are_refused():
    config = PUBLISHED["gpt2"][0]
    refused("ZI-4205", config | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx")
    refused("ZI-4205", phi3(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type")


def test_families_without_grouped_heads_ignore_those_keys():
    for name in ("gpt2", "opt-125m", "pythia-1b"):
        spec = read_spec(PUBLISHED[name][0])
        assert read_spec(PUBLISHED[name][0] | {"num_key_value_heads": 1, "head_dim": 6}) == spec
    refused("ZI-4203", TINY | {"head_dim": "64"}, "head_dim")
    refused("ZI-4204", TINY | {"head_dim": -64}, "head_dim")


def test_messages_stay_on_one_short_line():
    refused("ZI-4203", TINY | {"hidden_size": "x\x1b[2J\n" * 10_000})
    with pytest.raises(CheckpointError) as info:
        read_spec(TINY | {"hidden_size": "x\x1b[2J\n" * 10_000})
    assert len(info.value.message) < 200
    assert "\x1b" not in info.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
CONFIGS = [TINY, opt(64, 128, 2, 4), phi3_long("longrope"), PUBLISHED["gpt2"][0], PUBLISHED["pythia-1b"][0]]


@given(st.sampled_from(CONFIGS), st.data())
def test_any_value_of_any_key_gives_a_spec_or_a_refusal(config, data):
    keys = [*config, "rope_parameters", "rope_scaling", "head_dim", "partial_rotary_factor", "layer_types"]
    changes = data.draw(st.dictionaries(st.sampled_from(keys), JSON, max_size=3))
    try:
        spec = read_spec(config | changes)
    except CheckpointError as error:
        assert error.code.startswith("ZI-42")
    else:
        assert spec.num_parameters > 0


def test_costs_grow_as_they_should():
    spec = read_spec(TINY)
    peaks = [cost.activation_peak_bytes(spec, rows, 1, 1024) for rows in (1, 64, 512, 1024)]
    assert peaks == sorted(peaks)
    assert set(cost.activation_bytes(spec, 8, 1, 8)) == {op.kind for op in spec.program}
    wide = replace(spec, dtype="F32")
    assert cost.activation_peak_bytes(wide, 512, 1, 512) > cost.activation_peak_bytes(spec, 512, 1, 512)
