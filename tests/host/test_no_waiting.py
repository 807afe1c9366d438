"""The host never waits for the device inside a pass: every family's passes run on a device that refuses it."""

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from strict_device import META, WaitsError, strict
from text_models import CONFIGS as ENCODERS
from tiny_models import CONFIGS

from zinfer.kernels import products
from zinfer.kvcache.cache import PagedKv
from zinfer.layers import attention, on_device
from zinfer.layers.shapes import Shapes
from zinfer.memory.clock import HostClock
from zinfer.memory.lease import DTYPES
from zinfer.memory.upload import indices, upload
from zinfer.plan.records import Compute, FetchRows, Forecast, Schedule
from zinfer.runtime.batch import pack_rows
from zinfer.runtime.executor import Executor
from zinfer.runtime.request import Request
from zinfer.runtime.scheduler import Piece
from zinfer.runtime.stats import Stats
from zinfer.runtime.texts import pack_texts
from zinfer.runtime.trace import Recorder
from zinfer.sampling.params import SamplingParams
from zinfer.spec.read import read_spec
from zinfer.tokenizer.pairs import Encoded

PASSES = [[(0, 20), (0, 5)], [(20, 1), (5, 1)], [(21, 1), (6, 9), (0, 3)]]  # (past, new) of each sequence
MICROS = [[(0, 7)], [(7, 9)]]  # one sequence, cut


class MetaManager:
    """A chunk manager over weights without bytes; one chunk holds the whole program."""

    device = META

    def __init__(self, spec):
        self.spec = spec
        self.placement = SimpleNamespace(resident=lambda chunk: True)
        self.log = SimpleNamespace(num_bytes=Counter())
        self.transfer = SimpleNamespace(park=None, unpark=None, to_host=None, clock=HostClock())
        self.table = SimpleNamespace(
            chunks=[SimpleNamespace(id=0, ops=range(len(spec.program)), nbytes=1)],
            streamable=[SimpleNamespace(nbytes=1)],
        )

    @contextmanager
    def lease(self, chunk):
        views = {
            part.key: torch.empty(part.shape, dtype=DTYPES[self.spec.dtype], device=META)
            for op in self.spec.program
            for part in op.reads
        }
        yield SimpleNamespace(views=views, address=0)

    def rows(self, name, ids_T):
        assert ids_T.device.type == "cpu", "the host looks rows up"
        lookup = next(lookup for lookup in self.spec.lookups if lookup.name == name)
        return torch.empty(len(ids_T), lookup.width, dtype=DTYPES[self.spec.dtype], device=META)

    def stats(self):
        return SimpleNamespace(wait_s=0.0)

    def drop_streamed(self):
        pass


def agreed(kv_heads, group, head_dim, device, num_threads):
    return Shapes((1, 4, 16), (32, 64, 128, 256), True, kv_heads, group, head_dim)


@pytest.fixture
def engine(monkeypatch):
    """Makes an executor and a cache on the strict device; the self-tests, which run at opening, are answered."""
    monkeypatch.setattr(products, "row_sizes", lambda *case: products.SIZES)
    monkeypatch.setattr(attention, "agreeing_shapes", agreed)
    monkeypatch.setattr(on_device, "varlen_serves", lambda *case: False)

    def make(family, exact):
        spec = read_spec((CONFIGS | ENCODERS)[family] | {"torch_dtype": "bfloat16"}, None)
        kv = PagedKv(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            num_pages=40,
            dtype=spec.dtype,
            device=META,
        )
        manager = MetaManager(spec)
        schedule = Schedule((FetchRows(), Compute(0)), (FetchRows(), Compute(0)))
        forecast = Forecast(0, 0, 0, 0, 0, 0, "compute", {}, {})
        executor = Executor(
            spec,
            manager.table,
            manager,
            schedule,
            stats=Stats(forecast),
            exact=exact,
            recorder=Recorder(),
        )
        return executor, kv

    return make


def pieces_of(which):
    return [
        Piece(Request(number, list(range(2, 30)), SamplingParams(max_tokens=4), 1), [3] * new, past)
        for number, (past, new) in enumerate(which)
    ]


def run(executor, kv, micros):
    """One pass; all rows are committed."""
    batches = []
    for which in micros:
        pieces = pieces_of(which)
        for number, (past, new) in enumerate(which):
            if number in kv.tables:
                kv.grow(number, past + new)
            else:
                kv.open(number, past + new)
        batch = pack_rows(pieces)
        batches.append((batch, kv.view(range(len(which)), batch.bounds, batch.past)))
    logits = executor.run(batches)
    for _, view in batches:
        view.commit()
    return logits


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_pass_waits_for_nothing(family, exact, engine):
    executor, kv = engine(family, exact)
    with strict() as device:
        for which in PASSES:
            (logits,) = run(executor, kv, [which])
            assert logits.device == META
            assert logits.shape[1] == executor.spec.vocab_size
    assert device.num_uploads > 0, "indices did go up"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("family", ENCODERS)
def test_a_pass_over_texts_waits_for_nothing(family, exact, engine):
    executor, _ = engine(family, exact)
    texts = [Encoded([2] * length, [0] * length, False) for length in (5, 9, 5)]
    with strict() as device:
        for part in (texts, texts[:1]):
            (logits,) = executor.run([(pack_texts(part), None)])
            assert logits.device == META
            assert len(logits) == len(part)
    assert device.num_uploads > 0 or exact


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_neither_do_micro_batches_nor_eight_bit_pages(family, engine):
    executor, kv = engine(family, True)
    kv = PagedKv(num_layers=3, num_kv_heads=2, head_dim=16, num_pages=40, dtype="INT8", device=META)
    with strict():
        assert len(run(executor, kv, MICROS)) == 2


@pytest.mark.parametrize(
    "name, run_it",
    [
        ("item", lambda x: x.sum().item()),
        ("tolist", lambda x: x.tolist()),
        ("cpu", lambda x: x.cpu()),
        ("to", lambda x: torch.ones(3).to(META)),
        ("tensor", lambda x: torch.tensor([1, 2], device=META)),
        ("index of the host", lambda x: x[torch.tensor([0, 1])]),
        ("mask", lambda x: x[x > 0]),
        ("nonzero", lambda x: (x > 0).nonzero()),
        ("__bool__", lambda x: bool((x > 0).any())),
        ("__bool__", lambda x: 1 if x.sum() > 0 else 0),
        ("__int__", lambda x: int(x[0])),
        ("copy_", lambda x: x.copy_(torch.zeros(3))),
        ("index_put", lambda x: x.__setitem__(torch.tensor([0]), 1.0)),
    ],
)
def test_the_strict_device_refuses(name, run_it):
    with strict(), pytest.raises((WaitsError, RuntimeError, NotImplementedError)):
        run_it(torch.empty(3, device=META))


@pytest.mark.parametrize(
    "where, what",
    [
        ("zinfer.layers.stacks.indices", lambda values, device: torch.tensor(values, device=device)),
        ("zinfer.layers.packed.upload", lambda x, device: x),  # positions stay with the host
        ("zinfer.kvcache.cache.upload", lambda x, device: x),
    ],
)
def test_a_pass_that_waits_is_caught(where, what, engine, monkeypatch):
    """The mutations: what this file is for, put back."""
    monkeypatch.setattr(where, what)
    executor, kv = engine("llama", True)
    with strict(), pytest.raises((WaitsError, RuntimeError)):
        for which in PASSES:
            run(executor, kv, [which])


def test_what_is_there_is_not_copied():
    here = torch.arange(3)
    assert upload(here, here.device) is here
    assert indices([[1, 2], [3, 4]], here.device).tolist() == [[1, 2], [3, 4]]
    assert indices([], META).shape == (0,)


def test_an_upload_to_cuda_goes_through_page_locked_memory(monkeypatch):
    """From there the copy is asynchronous; what `.to` alone does waits for the stream."""
    asked = []

    class Host(torch.Tensor):
        def pin_memory(self):
            asked.append("pinned")
            return self

        def to(self, device, *, non_blocking=False):
            asked.append((str(device), non_blocking))
            return self

    upload(torch.arange(3).as_subclass(Host), torch.device("cuda:0"))
    assert asked == ["pinned", ("cuda:0", True)]
