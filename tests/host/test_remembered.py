"""Choices are found once per machine; a file that is damaged, foreign or unwritable costs only the time again."""

import json

import pytest

from zinfer.kernels import remembered


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "cache_folder", lambda: tmp_path)
    remembered._answers.cache_clear()
    yield tmp_path / "kernels.json"
    remembered._answers.cache_clear()


def ask(found, answer=4):
    def find():
        found.append(answer)
        return answer

    return remembered.remembered("question", lambda known: isinstance(known, int), find)


def new_process():
    remembered._answers.cache_clear()


def test_an_answer_outlives_the_process(file):
    found = []
    assert [ask(found), ask(found)] == [4, 4]
    new_process()
    assert ask(found) == 4
    assert found == [4]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"machine": "another", "answers": {"question": 9}}'])
def test_a_file_of_another_machine_or_none_is_not_believed(file, text):
    file.write_text(text)
    found = []
    assert ask(found) == 4
    assert found == [4]


def test_an_answer_that_makes_no_sense_is_not_believed(file):
    ask([])
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"answers": {"question": "rm -r"}}))
    new_process()
    found = []
    assert ask(found) == 4
    assert found == [4]


def test_a_folder_that_cannot_be_written_does_no_harm(file, monkeypatch):
    monkeypatch.setattr(remembered, "cache_folder", lambda: file.parent / "gone" / "\0")
    found = []
    assert [ask(found), ask(found)] == [4, 4]
    assert found == [4]
