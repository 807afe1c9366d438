"""Perplexity of quantised stores: the bundled model's limits, the figure against its logits, and what is refused."""

import math

import pytest
import torch
from tiny_models import write_tiny

from zinfer import LLM
from zinfer.api import DEMO
from zinfer.chunks.quality import check_quality
from zinfer.chunks.store import shard, silent
from zinfer.errors import UsageError
from zinfer.jobs.perplexity import Perplexity, compare_perplexity, perplexity, text_beside
from zinfer.kernels.quant import native_layout
from zinfer.kernels.quantise import Quantiser
from zinfer.spec.quant import FORMATS, PERPLEXITY_LIMITS, RMS_LIMITS

FIXED = {"device": "cpu", "machine": "sim-default", "threads": 1, "memory": {"host": "1GiB"}}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """An eighth of the held-out text: enough for a figure within some tenths of a percent."""
    path = tmp_path_factory.mktemp("text") / "part.txt"
    path.write_text((DEMO / "heldout.txt").read_text(encoding="utf-8")[: 65536 // 8], encoding="utf-8")
    return path


def test_the_limits_are_those_that_were_promised():
    assert (RMS_LIMITS, PERPLEXITY_LIMITS) == ({"int8": 0.006, "int4": 0.11}, {"int8": 0.01, "int4": 0.06})


@pytest.mark.parametrize("weights", FORMATS)
def test_the_bundled_model_keeps_its_limits(weights, text, tmp_path):
    encoder = Quantiser(weights, native_layout())
    shard(DEMO, tmp_path / "store", encoder=encoder)
    report = check_quality(tmp_path / "store", DEMO, encoder, silent)
    assert max(row.found.rms for row in report) <= RMS_LIMITS[weights]
    measured = compare_perplexity(tmp_path / "store", DEMO, text, **FIXED)
    assert measured.limit == PERPLEXITY_LIMITS[weights]
    assert measured.is_close
    assert measured.stored != measured.published, "the store's own weights were run"
    assert 10 < measured.published < 25, "a model that was trained"
    if weights == "int4":
        assert measured.rise > PERPLEXITY_LIMITS["int8"], "int4 would not pass for int8"


def test_it_is_that_of_the_logits(text, tmp_path):
    """The slow twin: the cross entropy of all logits; a target off by one place would be seen."""
    short = tmp_path / "short.txt"
    short.write_text(text.read_text(encoding="utf-8")[:1500], encoding="utf-8")
    found, num_tokens = perplexity(DEMO, short, **FIXED, context=100)
    with LLM(DEMO, **FIXED) as llm:
        first, *ids = llm.tokenizer.encode(short.read_text(encoding="utf-8"))
        windows = [[first, *ids[at : at + 99]] for at in range(0, len(ids), 99)]
        assert len(windows) > 3
        nats, shifted = 0.0, 0.0
        for window in windows:
            logprobs = torch.log_softmax(llm.logits(window), -1)
            nats -= sum(float(logprobs[at, token]) for at, token in enumerate(window[1:]))
            shifted -= sum(float(logprobs[at, token]) for at, token in enumerate(window[:-1]))
    assert num_tokens == len(ids)
    assert found == pytest.approx(math.exp(nats / len(ids)), rel=1e-4)
    assert found != pytest.approx(math.exp(shifted / len(ids)), rel=1e-2), "the mutation is noticed"


@pytest.mark.parametrize(
    ("stored", "is_close"), [(10.0, True), (10.5, True), (10.7, False), (math.nan, False)]
)
def test_what_rises_further_or_is_no_number_is_not_close(stored, is_close):
    measured = Perplexity("t", 9, 10.0, stored, 0.06)
    assert measured.is_close is is_close
    assert set(measured.to_dict()) == {"text", "num_tokens", "published", "stored", "limit", "rise"}


def test_which_text_is_read(tmp_path):
    assert text_beside(DEMO, None) == DEMO / "heldout.txt"
    assert text_beside(DEMO, tmp_path / "mine") == tmp_path / "mine"
    assert text_beside(tmp_path, None) is None


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\xfa"])
def test_1118_a_text_that_is_none(content, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="ZI-1118"):
        perplexity(DEMO, path, **FIXED)


def test_a_model_without_a_tokenizer_cannot_read_a_text(text, tmp_path):
    with pytest.raises(Exception, match="ZI-4601"):
        perplexity(write_tiny("llama", tmp_path / "m"), text, **FIXED)
