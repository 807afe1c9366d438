"""How a distillation's texts are split: by themselves, or by what they are from.

Enters: small tables whose rows say what they are from.  Leaves: splits, refusals, a group.
"""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import WORDS, write_encoder

from zinfer.config.load import load_settings
from zinfer.errors import CheckpointError
from zinfer.runtime.model import open_model
from zinfer.students.corpus import read_corpus
from zinfer.students.job import distill
from zinfer.students.settings import DistillSettings

ENGINE = {"device": "cpu", "machine": "sim-default", "memory.host": "1GiB", "runtime.threads": 1}
QUICK = DistillSettings(students=2, layers=1, epochs=1, polish=1, batch=16, lr=1e-3, least_gain=0.0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_encoder("bert", tmp_path_factory.mktemp("teacher") / "model")


@pytest.fixture(scope="module")
def tokenizer(teacher):
    return open_model(teacher, load_settings(None, flags=ENGINE).settings).need_tokenizer()


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(num_files, per_file):
    """Texts of so many files, no two alike."""
    draw = random.Random(5)
    return [
        {"text": " ".join([*draw.choices(WORDS, k=5), str(file), str(at)]), "file": f"{file}.py"}
        for at in range(per_file)
        for file in range(num_files)
    ]


def read(path, tokenizer, **more):
    return read_corpus(path, tokenizer, 32, [], **({"seed": 1} | more))


def files_of(corpus, rows):
    return [{rows[at]["file"] for at in part} for part in (corpus.train, corpus.held, corpus.dev)]


def test_texts_of_a_file_are_in_one_split(tokenizer, tmp_path):
    rows = rows_of(60, 8)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    corpus = read(path, tokenizer, split_column="file")
    train, held, dev = files_of(corpus, rows)
    assert not train & held and not train & dev and not held & dev
    assert len(train | held | dev) == 60
    assert len(corpus.train) + len(corpus.held) + len(corpus.dev) == len(rows)
    alone = read(path, tokenizer)
    assert alone.digest != corpus.digest, "another split does not resume"
    train, held, _ = files_of(alone, rows)
    assert held < train, "split by themselves, every file that is held is also learnt from"


def test_without_the_column_nothing_changes(tokenizer, tmp_path):
    """Rows that say what they are from are split and remembered as rows that do not."""
    rows = rows_of(20, 8)
    bare = [{"text": row["text"]} for row in rows]
    one = read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    other = read(write_rows(tmp_path / "bare.jsonl", bare), tokenizer)
    assert (one.train, one.held, one.dev, one.digest) == (other.train, other.held, other.dev, other.digest)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_a_file_has_its_split_whatever_the_order(tokenizer, tmp_path_factory, seed, draw):
    rows = rows_of(300, 2)
    shuffled = draw.sample(rows, len(rows))
    folder = tmp_path_factory.mktemp("order")
    found = [
        read(write_rows(folder / f"{name}.jsonl", own), tokenizer, seed=seed, split_column="file")
        for name, own in (("one", rows), ("other", shuffled))
    ]
    assert files_of(found[0], rows) == files_of(found[1], shuffled)


def test_another_origin_is_another_corpus(tokenizer, tmp_path):
    rows = rows_of(60, 4)
    changed = [rows[0] | {"file": "elsewhere.py"}, *rows[1:]]
    digests = {
        read(write_rows(tmp_path / f"{at}.jsonl", own), tokenizer, split_column="file").digest
        for at, own in enumerate((rows, changed))
    }
    assert len(digests) == 2


def test_origins_may_be_numbers(tokenizer, tmp_path):
    rows = [row | {"file": int(row["file"].removesuffix(".py"))} for row in rows_of(60, 4)]
    corpus = read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, split_column="file")
    train, held, dev = files_of(corpus, rows)
    assert len(train) + len(held) + len(dev) == 60


@pytest.mark.parametrize("value", ["", None, 1.5, ["a.py"]])
def test_a_row_that_does_not_say_what_it_is_from(tokenizer, tmp_path, value):
    rows = rows_of(60, 4)
    rows[7]["file"] = value
    with pytest.raises(CheckpointError, match="ZI-4940") as caught:
        read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, split_column="file")
    assert "line 8" in caught.value.message


def test_a_column_that_no_row_has(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="ZI-4940"):
        read(write_rows(tmp_path / "rows.jsonl", rows_of(60, 4)), tokenizer, split_column="author")


def test_all_texts_of_one_file_cannot_be_split(tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match="ZI-4938") as caught:
        read(write_rows(tmp_path / "rows.jsonl", rows_of(1, 200)), tokenizer, split_column="file")
    assert "--split-column" in caught.value.remedy


def test_a_distillation_that_holds_out_files(teacher, tmp_path):
    """Parts are whole files, and the report says how large they are."""
    rows = rows_of(60, 4)
    path = write_rows(tmp_path / "rows.jsonl", rows)
    done = distill(
        teacher,
        path,
        tmp_path / "group",
        settings=QUICK,
        engine=load_settings(None, flags=ENGINE).settings,
        split_column="file",
        progress=lambda *_: None,
    )
    held = done.notes["texts"]
    assert sum(held.values()) == len(rows)
    assert all(count % 4 == 0 for count in held.values()), "whole files"
    assert [one.students for one in done.figures] == [1, 2]
