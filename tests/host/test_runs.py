"""Work over neighbours in memory, shared among threads: each thing is done once, and nobody waits for a late thread."""

import ctypes
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zinfer.kernels.native import build, calls

HERE = Path(calls.__file__).parent
needs_kernels = pytest.mark.skipif(calls.kernels() is None, reason="no C compiler here")
pytestmark = needs_kernels

COUNTED = """
#include "common.h"
#include <time.h>

typedef struct {
    atomic_int *times;   /* how often each thing was done */
    int *by;             /* and by which thread */
    size_t things, then;
    atomic_size_t done;
    int moments;
} seen_t;

static void see(void *data, size_t start, size_t stop) {
    seen_t *seen = data;
    const struct timespec moment = {0, 1000000};
    for (size_t i = start; i < stop; i++) {
        atomic_fetch_add(&seen->times[i], 1);
        seen->by[i] = omp_get_thread_num();
    }
    atomic_fetch_add(&seen->done, stop - start);
    /* Whoever has the first piece is late: it goes on when all the rest is done, or after so many moments. */
    for (int i = 0; start == 0 && atomic_load(&seen->done) < seen->things && i < seen->moments; i++)
        nanosleep(&moment, NULL);
    if (start == 0) seen->then = atomic_load(&seen->done);
}

/* How many were done when the late one went on. */
size_t count(int *times, int *by, size_t things, size_t step, int moments, unsigned num_threads) {
    seen_t seen = {(atomic_int *)times, by, things, 0, 0, moments};
    share_runs(see, &seen, things, step, num_threads);
    return seen.then;
}
"""


def compiled(folder, right="", wrong=""):
    """`count`, with `wrong` for `right` in common.h."""
    header = (HERE / "common.h").read_text()
    assert right in header
    (folder / "common.h").write_text(header.replace(right, wrong) if right else header)
    (folder / "count.c").write_text(COUNTED)
    path = folder / "count.so"
    command = [*build.compiler(), "-std=gnu11", "-O2", "-shared", "-fPIC", "-I", str(folder)]
    subprocess.run([*command, "-o", str(path), str(folder / "count.c")], check=True, timeout=60)
    code = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    code.count.argtypes = [pointer, pointer, size, size, ctypes.c_int, ctypes.c_uint]
    code.count.restype = size
    return code


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("runs"))


def counted(code, things, step, threads, *, moments=0, room=0):
    """How often each thing was done, and `room` behind them; by whom; how many, when the first piece ended."""
    times, by = (ctypes.c_int * (things + room))(), (ctypes.c_int * (things + room))()
    then = code.count(times, by, things, step, moments, threads)
    return list(times), list(by), then


@given(things=st.integers(1, 500), step=st.integers(1, 60), threads=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_each_thing_is_done_once(code, things, step, threads):
    times, by, _ = counted(code, things, step, threads)
    assert times == [1] * things
    assert set(by) <= set(range(threads))


def test_more_threads_than_runs(code):
    times, by, _ = counted(code, 1000, 3, 67)
    assert times == [1] * 1000
    assert max(by) < 67


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("runs->count * (at + 1)", "runs->count * at"),
        ("(mine + i) % runs->num_runs", "(mine + i) % 2"),
        ("? stop : start + runs->step", "? stop + 1 : start + runs->step"),
        ("next, count * at / runs.num_runs", "next, 0"),
    ],
)
def test_work_that_is_shared_wrongly_is_seen(right, wrong, tmp_path):
    times, _, _ = counted(compiled(tmp_path, right, wrong), 100, 7, 3, room=1)
    assert times != [1] * 100 + [0]


def test_a_late_thread_holds_nobody_up(code):
    """Whoever has the first piece waits in it until all else is done: by the other, the rest of that run too."""
    times, by, then = counted(code, 90, 5, 2, moments=60_000)
    assert times == [1] * 90
    assert then == 90
    assert set(by[5:45]) == {1 - by[0]}


def test_threads_that_keep_to_their_own_would_be_waited_for(tmp_path):
    """The mutation: the late one's run is done only when it comes."""
    code = compiled(tmp_path, "i < runs->num_runs; i++", "i < 1; i++")
    times, by, then = counted(code, 90, 5, 2, moments=3)
    assert times == [1] * 90
    assert then < 90
    assert set(by[:45]) == {0} and set(by[45:]) == {1}
