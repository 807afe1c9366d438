"""The cache of a real device: resident, brought up, or attended by the host; bf16 and int8 pages."""

import chunk_files
import pytest
import torch

from zinfer.kvcache.cache import PagedKv
from zinfer.layers.attention import attend
from zinfer.layers.packed import Packed
from zinfer.memory.assemble import open_manager
from zinfer.plan.records import Budget, Tier

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS, DIM = 8, 2, 64
LENGTHS = [(40, 300), (1, 0), (1, 130), (300, 0)]  # new rows, past


@pytest.fixture
def crossing(tmp_path):
    """The transfer seam of an open device."""
    table, _ = chunk_files.write_chunks(tmp_path, [200, 300], piece=64 * 4096)
    placement = chunk_files.sim_placement(table, (0,), (1,), 2, 1)
    budget = Budget(*(chunk_files.needed_bytes(table, placement, tier) for tier in (Tier.HOST, Tier.DEVICE)))
    manager = open_manager(table, placement, budget, device="cuda:0")
    yield manager
    manager.close()


def attended(where, *, dtype="BF16", exact=True, **options):
    """Several sequences fed in two passes; the output of the second on the CPU."""
    kv = PagedKv(num_layers=1, num_kv_heads=KV_HEADS, head_dim=DIM, num_pages=80, dtype=dtype, **options)
    draw = torch.Generator().manual_seed(4)
    out = None
    for is_first in (True, False):
        counts = [past if is_first else new for new, past in LENGTHS]
        ids = [number for number, count in enumerate(counts) if count]
        counts = [count for count in counts if count]
        bounds = tuple(sum(counts[:i]) for i in range(len(counts) + 1))
        past = tuple(0 if is_first else LENGTHS[id_][1] for id_ in ids)
        for id_, count, start in zip(ids, counts, past, strict=True):
            if id_ in kv.tables:
                kv.grow(id_, start + count)
            else:
                kv.open(id_, start + count)
        q = torch.randn(bounds[-1], HEADS, DIM, generator=draw).bfloat16().to(where)
        k, v = torch.randn(2, bounds[-1], KV_HEADS, DIM, generator=draw).bfloat16().to(where)
        positions = [start + i for count, start in zip(counts, past, strict=True) for i in range(count)]
        batch = Packed(torch.zeros(bounds[-1]), torch.tensor(positions), bounds, past, torch.zeros(0))
        view = kv.view(ids, bounds)
        with torch.no_grad():
            out = attend(q, k, v, 0, batch, view, scale=0.125, window=None, exact=exact)
        view.commit()
        assert out.device == q.device
    return out.cpu().float()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", ["BF16", "INT8"])
def test_pages_anywhere_give_what_the_cpu_gives(dtype, exact, crossing):
    want = attended("cpu", dtype=dtype)
    for how, pages in (("resident", "cuda:0"), ("device", "cpu"), ("host", "cpu")):
        before = dict(crossing.log.num_bytes)
        got = attended(
            "cuda:0", dtype=dtype, exact=exact, attend=how, device=pages, crossing=crossing.transfer
        )
        torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)
        moved = {link: nbytes - before.get(link, 0) for link, nbytes in crossing.log.num_bytes.items()}
        assert (moved.get("d2h", 0) > 0) == (how != "resident")
