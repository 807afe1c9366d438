"""Files that appear whole or not at all, whatever ends the writing; a place that takes none is found at once."""

import errno
import os
import stat
import threading

import pytest

from zinfer.errors import MachineError, UsageError
from zinfer.whole import refuse_input_as_output, refuse_unwritable, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_there_when_the_block_has_ended(tmp_path):
    path = tmp_path / "results"
    path.write_text("old")
    with written_whole(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["results"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, UsageError("ZI-1101", "x", remedy="y")])
def test_whatever_ends_the_block_nothing_is_left(tmp_path, error):
    path = tmp_path / "results"
    path.write_text("old")
    with pytest.raises(error if isinstance(error, type) else UsageError), written_whole(path) as file:
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["results"]


def test_a_full_disk_is_one_typed_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("zinfer.whole.os.fsync", full)
    with (
        pytest.raises(MachineError, match=r"ZI-5931.*No space left") as caught,
        written_whole(tmp_path / "a"),
    ):
        pass
    assert f"df -h {tmp_path}" in caught.value.remedy
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", ["folder", "missing/file", "file/below", "x" * 300])
def test_a_place_that_takes_no_file_is_found_before_any_work(tmp_path, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    with pytest.raises(MachineError, match="ZI-5931"):
        refuse_unwritable(tmp_path / place)
    with pytest.raises(MachineError, match="ZI-5931"), written_whole(tmp_path / place):
        raise AssertionError("the work began")
    assert names(tmp_path) == before


def test_looking_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "there").write_text("old")
    for path in (None, tmp_path / "there", tmp_path / "new"):
        refuse_unwritable(path)
    assert names(tmp_path) == ["there"]
    assert (tmp_path / "there").read_text() == "old"


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for text in (b"one", b"two"):
        with written_whole(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == text


def test_a_pipe_gets_the_bytes_and_stays_a_pipe(tmp_path):
    """As /dev/null must stay what it is when root writes there."""
    path, found = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()))
    reader.start()
    refuse_unwritable(path)
    with written_whole(path) as file:
        file.write(b"through")
    reader.join(30)
    assert found == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_results_do_not_take_the_place_of_their_input(tmp_path):
    source = tmp_path / "lines.jsonl"
    source.touch()
    (tmp_path / "again").symlink_to(source)
    for target in (source, tmp_path / "again", tmp_path / "." / "lines.jsonl"):
        with pytest.raises(UsageError, match="ZI-1118"):
            refuse_input_as_output(source, target)
    for pair in ((source, None), (None, source), (source, tmp_path / "new"), (tmp_path / "no", source)):
        refuse_input_as_output(*pair)
