"""The journal: what was appended is there again after any crash, and nothing else is."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zinfer.chunks.disk import Disk
from zinfer.chunks.journal import Journal
from zinfer.errors import UsageError

RECORDS = st.lists(
    st.fixed_dictionaries({"extent": st.integers(0, 9), "blocks": st.lists(st.text("0af\n {", max_size=4))}),
    min_size=1,
    max_size=3,
)


class NoSync(Disk):
    """Tests do not wait for the real disk."""

    def sync(self, fd):
        pass

    def sync_folder(self, folder):
        pass


class Torn(NoSync):
    """Takes a part of one write and fails."""

    def __init__(self, keep):
        self.keep = keep

    def write(self, fd, data, offset):
        super().write(fd, data[: self.keep], offset)
        raise OSError(28, "No space left on device")


class JournalMachine(RuleBasedStateMachine):
    """Append, crash in the middle of an append, lose or gain bytes behind the last durable one, open again."""

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "zinfer.journal"
        self.expected = []
        self.journal = Journal(self.path, "me", NoSync())

    def reopen(self):
        self.journal.close()
        self.journal = Journal(self.path, "me", NoSync())

    @rule(records=RECORDS)
    def append(self, records):
        self.journal.append(*records)
        self.expected += records

    @rule(records=RECORDS, keep=st.integers(0, 200))
    def crash_while_appending(self, records, keep):
        durable = self.path.stat().st_size
        self.journal.disk = Torn(keep)
        with pytest.raises(OSError, match="No space"):
            self.journal.append(*records)
        # Whole lines that arrived count, for what they speak of was on disk before they were written.
        arrived = self.path.read_bytes()[durable:].count(b"\n")
        self.expected += records[:arrived]
        self.reopen()

    @rule(garbage=st.binary(min_size=1, max_size=40))
    def garbage_at_the_end(self, garbage):
        self.journal.close()
        with self.path.open("ab") as file:
            file.write(garbage)
        self.journal = Journal(self.path, "me", NoSync())

    @rule(data=st.data())
    @precondition(lambda self: self.expected)
    def a_line_is_harmed(self, data):
        lines = self.path.read_bytes().splitlines(keepends=True)
        number = data.draw(st.integers(1, len(lines) - 1))
        line = bytearray(lines[number])
        line[data.draw(st.integers(0, len(line) - 1))] ^= 1
        self.journal.close()
        self.path.write_bytes(b"".join([*lines[:number], line, *lines[number + 1 :]]))
        self.journal = Journal(self.path, "me", NoSync())
        self.expected = self.expected[: number - 1]

    @rule()
    def somebody_else_comes(self):
        with pytest.raises(UsageError) as caught:
            Journal(self.path, "me", NoSync())
        assert caught.value.code == "ZI-3003"

    @invariant()
    def records_are_those_appended(self):
        assert self.journal.records == self.expected

    @invariant()
    def a_reader_after_a_crash_sees_the_same(self):
        lines = self.path.read_bytes().splitlines()
        assert [json.loads(line[17:]) for line in lines[1:]] == self.expected

    def teardown(self):
        self.journal.close()
        self.folder.cleanup()


TestJournal = JournalMachine.TestCase


def test_a_journal_of_another_store_is_left_alone(tmp_path):
    Journal(tmp_path / "j", "me", NoSync()).close()
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(UsageError) as caught:
        Journal(tmp_path / "j", "you", NoSync())
    assert caught.value.code == "ZI-3001"
    assert (tmp_path / "j").read_bytes() == before
    Journal(tmp_path / "j", "me", NoSync()).close()  # and its lock is free again
