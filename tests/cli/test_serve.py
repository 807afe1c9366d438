"""`zinfer serve` as a process: where it listens, what it refuses to start with, overload, rude clients, its end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from student_groups import write_group_folder

from zinfer import Classifier
from zinfer.cli.main import run

ROOT = Path(__file__).resolve().parents[2]
QUIET = {"ZINFER_MACHINE": "sim-default", "ZINFER_DEVICE": "cpu", "ZINFER_RUNTIME_THREADS": "1"}
KEY = "open-sesame"
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "import",
    "json",
    "def",
    "class",
)


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    return write_group_folder(tmp_path_factory.mktemp("serve") / "group")


@pytest.fixture
def quiet(monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)


@contextmanager
def server(*arguments, **environment):
    """(process, what it said when it was ready) of a server that is killed where it has not ended."""
    command = [sys.executable, "-m", "zinfer", "serve", "--port", "0", "--json", *map(str, arguments)]
    known = os.environ | QUIET | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=known, **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.kill()


def refused(capsys, *argv):
    """(exit code, error code, everything on stderr)"""
    code = run(["serve", *map(str, argv)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return code, err.split()[1], err


def test_a_server_from_start_to_end(group):
    """A key, overload with right answers, clients that leave, and SIGTERM with a request on its way."""
    texts = [" ".join((WORDS + WORDS)[at % 13 :][:9] * 4) for at in range(40)]
    with Classifier(group, device="cpu", machine="sim-default", threads=1) as classifier:
        expected = classifier.embed(texts)
    sets = ["--set", "serve.queue_tokens=400", "--objective-ms", 5000, "--grace", 20]
    with server(group, *sets, ZINFER_SERVE_API_KEY=KEY) as (process, about):
        assert about.keys() >= {"ready", "url", "port", "pid", "model", "students"}
        assert (about["pid"], about["students"]) == (process.pid, 3)
        url = about["url"]
        assert httpx2.post(f"{url}/embed", json={"inputs": "a"}).status_code == 401
        assert httpx2.get(f"{url}/health").status_code == 200
        with httpx2.Client(base_url=url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as client:
            check_overload(client, texts, expected)
            before = handled(client)
            rude(about["port"], texts)
            wait_for(lambda: handled(client) == before + len(texts))
            check_empty(client)
            slow = half_a_request(about["port"])
            wait_for(lambda: gauge(client, "zinfer_in_flight") == 2)
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").status_code == 503)
            found = client.post("/embed", json={"inputs": "a"})
            assert (found.status_code, found.json()["code"]) == (503, "ZI-2212")
        with slow:
            slow.sendall(b'{"inputs": "fox"}')
            assert slow.recv(65536).startswith(b"HTTP/1.1 200"), "what was taken is answered"
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (0, "")
        # The one that is on its way, and the one whose answer said so where its end is not counted yet.
        assert re.search("SIGTERM: answering [12] requests", err)
        assert KEY not in err
        assert "Traceback" not in err


def check_overload(client, texts, expected):
    """Forty at once before a queue for a few: some are refused, with a time; the others get their own answers."""

    def one(at):
        body = {"inputs": [texts[at]] * 8, "normalize": False}
        return at, client.post("/embed", json=body)

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(one, range(40)))
    assert {answer.status_code for _, answer in found} == {200, 429}
    for at, answer in found:
        if answer.status_code == 429:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["code"] == "ZI-2210"
            continue
        students = int(answer.headers["x-students"])
        assert 1 <= students <= 3
        if students == 3:
            assert np.abs(np.array(answer.json()) - expected[at]).max() < 1e-4


def rude(port, texts):
    """Whole requests whose senders leave at once."""
    for text in texts:
        with half_a_request(port, {"inputs": text}):
            pass


def handled(client):
    """Requests for vectors that have ended, however they did."""
    lines = client.get("/metrics").text.splitlines()
    return sum(
        float(line.split()[1]) for line in lines if line.startswith('zinfer_requests_total{path="/embed"')
    )


def half_a_request(port, body=None):
    """A connection with a request on it, of `body`, or one whose body of 17 bytes is still to come."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    raw = b"" if body is None else json.dumps(body).encode()
    head = f"POST /embed HTTP/1.1\r\nhost: here\r\nauthorization: Bearer {KEY}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(raw) or 17}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def gauge(client, name):
    lines = client.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def check_empty(client):
    """Nothing of those who left is queued or handled."""
    wait_for(lambda: gauge(client, "zinfer_in_flight") == 1)
    wait_for(lambda: gauge(client, "zinfer_queue_texts") == gauge(client, "zinfer_queue_tokens") == 0)
    assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def wait_for(is_so):
    for _ in range(1000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to be")


def test_a_grace_that_does_not_suffice_is_said_and_has_its_exit_code(group):
    with (
        server(group, "--objective-ms", 5000, "--grace", 0.2) as (process, about),
        half_a_request(about["port"]),
        httpx2.Client(base_url=about["url"]) as client,
    ):
        wait_for(lambda: gauge(client, "zinfer_in_flight") == 2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 5
    assert "error ZI-5354" in err
    assert "Traceback" not in err


def test_what_it_does_not_start_with(group, tmp_path, capsys, monkeypatch, quiet):
    assert refused(capsys, group, "--host", "0.0.0.0")[:2] == (2, "ZI-1171")
    assert refused(capsys, group, "--port", 70_000)[:2] == (2, "ZI-1003")
    assert refused(capsys, group, "--set", "serve.prot=1")[:2] == (2, "ZI-1002")
    assert refused(capsys, group, "--port", 0, "--students", 9)[:2] == (2, "ZI-1159")
    assert refused(capsys, tmp_path, "--port", 0)[0] == 3
    code, name, err = refused(capsys, group, "--port", 0, "--objective-ms", 0.001)
    assert (code, name) == (4, "ZI-2207")
    assert "--objective-ms" in err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, name, err = refused(capsys, group, "--port", taken.getsockname()[1])
        assert (code, name) == (5, "ZI-5352")
        assert "--port 0" in err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, name, err = refused(capsys, group)
    assert (code, name) == (5, "ZI-5351")
    assert "pip install 'zinfer[serve]'" in err


def test_without_serving_nothing_of_it_is_imported():
    code = (
        "import sys, zinfer.cli.serve, zinfer.cli.main\n"
        "print([name for name in ('starlette', 'uvicorn', 'torch', 'prometheus_client') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
