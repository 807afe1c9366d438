"""Doubles of what serving stands on: a model of letters, and a queue that a test opens and shuts."""

import signal
import socket
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager

import httpx2
import torch

from zinfer.config.schema import Serve
from zinfer.serving.app import make_app
from zinfer.serving.service import Service
from zinfer.students.scheduler import Overloaded, Served
from zinfer.students.tally import Tally
from zinfer.tokenizer import Encoded

LABELS = ("few", "many")
DIM = 4


class LetterModel:
    """Every character is a token, its code the id; texts are cut to 8.  `gate` shut, cutting into tokens waits."""

    name, labels, scoring, max_tokens = "letters", LABELS, "softmax", 8

    def __init__(self, num_students=3, labels=LABELS):
        self.num_students, self.labels = num_students, labels
        self.gate, self.at_gate = threading.Event(), threading.Event()
        self.gate.set()

    def encode(self, texts, direction):
        self.at_gate.set()
        assert self.gate.wait(30)
        found = []
        for text in texts:
            ids = [ord(letter) for letter in (text if isinstance(text, str) else "|".join(text))] or [0]
            kept = ids[:8] if direction == "right" else ids[-8:]
            found.append(Encoded(tuple(kept), (0,) * len(kept), is_cut=len(ids) > 8))
        return found

    def about(self):
        return {"double": True}


def expected_row(text):
    """What `HeldQueue` answers for a text's ids."""
    return [float(sum(text.ids)), float(len(text.ids)), 1.0, -1.0]


class HeldQueue:
    """A bounded queue without threads.  Open, it answers at once; shut, texts wait until `answer` is called."""

    def __init__(self, max_queue_tokens=100, num_students=3):
        self.is_open, self.is_closed = True, False
        self.max_queue_tokens, self.num_students = max_queue_tokens, num_students
        self.waiting, self.answered, self.cancelled = [], 0, 0
        self.error = None
        self.lock = threading.RLock()

    @property
    def tokens(self):
        return sum(len(text.ids) for text, _ in self.waiting)

    def submit(self, text):
        one, both = Future(), self.submit_all([text])

        def pass_on(found):
            if (error := found.exception()) is not None:
                one.set_exception(error)
            else:
                one.set_result(found.result()[0])

        both.add_done_callback(pass_on)
        return one

    def submit_all(self, texts):
        future = Future()
        with self.lock:
            if self.tokens + sum(len(text.ids) for text in texts) > self.max_queue_tokens:
                raise Overloaded(self.tokens, self.max_queue_tokens, 2.25)
            self.waiting += [(text, future) for text in texts]
            future.add_done_callback(self._gone)
            if self.is_open:
                self.answer()
        return future

    def _gone(self, future):
        with self.lock:
            before = len(self.waiting)
            self.waiting = [entry for entry in self.waiting if entry[1] is not future]
            if future.cancelled():
                self.cancelled += before - len(self.waiting)

    def answer(self):
        """Answer all that waits."""
        with self.lock:
            parcels = {}
            for text, future in self.waiting:
                parcels.setdefault(future, []).append(text)
            for future, texts in parcels.items():
                if future.set_running_or_notify_cancel():
                    self._end(texts, future)

    def _end(self, texts, future):
        if self.error is not None:
            future.set_exception(self.error)
            return
        self.answered += len(texts)
        future.set_result([self._served(text) for text in texts])

    def _served(self, text):
        logits_C = torch.tensor([0.0, float(len(text.ids))])
        return Served(torch.tensor(expected_row(text)), logits_C, self.num_students, 0.001, 0.002)

    def drain(self, timeout_s=None):
        return not self.waiting

    def close(self):
        self.is_closed = True
        for _, future in list(self.waiting):
            future.cancel()

    def stats(self):
        books = Tally(1, time.perf_counter, cancelled=self.cancelled, passes=self.answered)
        waiting = {"queue_texts": len(self.waiting), "queue_tokens": self.tokens}
        return books.stats(num_students=self.num_students, rejected=0, **waiting)


class Site:
    """A warm service of doubles, its application, and a client that speaks to it without a socket."""

    def __init__(self, **limits):
        self.model, self.queue = LetterModel(), HeldQueue()
        self.service = Service(self.model, self.queue, Serve.model_validate(limits))
        self.service.is_warm = True
        self.app = make_app(self.service)

    def client(self, **headers):
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx2.AsyncClient(transport=transport, base_url="http://here", headers=headers, timeout=30)


@contextmanager
def site(**limits):
    """A Site whose threads end with the block; nothing may be left in its queue or counted as in flight."""
    opened = Site(**limits)
    try:
        yield opened
        assert not opened.queue.waiting
        assert opened.service.in_flight == 0
    finally:
        opened.model.gate.set()
        opened.service.close()


class Listening:
    """A Site behind a real socket, its server in a thread; `said` are its lines, `about` what it said when ready."""

    def __init__(self, **limits):
        from zinfer.serving.access import bind
        from zinfer.serving.server import Server

        self.site = Site(**{"port": 0} | limits)
        self.site.service.is_warm = False
        self.said, self.about, self.is_ready = [], {}, threading.Event()
        self.socket = bind(self.site.service.limits)
        self.server = Server(self.site.app, self.site.service, say=self.said.append, ready=self._ready)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def _ready(self, about):
        self.about = about
        self.is_ready.set()

    def connect(self):
        """A connection of a client's own."""
        return socket.create_connection(("127.0.0.1", self.about["port"]), timeout=30)

    def end(self):
        """What SIGTERM does."""
        self.server.handle_exit(signal.SIGTERM, None)


@contextmanager
def listening(**limits):
    """A Listening that is ready; it has ended, with nothing left in its queue, when the block ends."""
    opened = Listening(**limits)
    opened.thread.start()
    try:
        assert opened.is_ready.wait(30)
        yield opened
    finally:
        opened.site.model.gate.set()
        opened.end()
        opened.thread.join(30)
        opened.site.service.close()
        opened.socket.close()
    assert not opened.thread.is_alive()
    assert not opened.site.queue.waiting
    assert not opened.server.server_state.connections
