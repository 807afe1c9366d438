"""What shares over several CUDA devices ask of the runtime, and in which order, with a runtime that writes it down."""

from contextlib import ExitStack, contextmanager

import chunk_files
import cuda_double
import pytest
import torch
from links_of import with_links

from zinfer.errors import MachineError
from zinfer.memory.cuda_shares import CudaShares
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import LinkLog
from zinfer.memory.measure_devices import CudaLinks, common_rates
from zinfer.memory.nvme import Files, Reader
from zinfer.memory.shares import Helper
from zinfer.memory.slab import HostSlab
from zinfer.memory.transfer import Order
from zinfer.parallel import aggregate, topology
from zinfer.plan.records import Budget, Tier
from zinfer.plan.shares import ways_up

PAGES = [8, 8, 8, 8]


class Runtime(cuda_double.Runtime):
    """Several devices: streams are numbered as they are made, of waiting only that for events is noted."""

    def __init__(self):
        super().__init__()
        self.refuses, self.current = None, []
        self.compute = FakeStream(self, "compute")

    def Stream(self, device):
        self.num_streams += 1
        return FakeStream(self, f"stream {self.num_streams}")

    def Event(self, **_):
        self.num_events += 1
        return FakeEvent(self, self.num_events)

    @contextmanager
    def stream(self, stream):
        if stream is self.refuses:
            raise RuntimeError("CUDA error: device is lost")
        self.current.append(stream.name)
        yield
        self.current.pop()


class FakeStream(cuda_double.FakeStream):
    def wait_stream(self, other):
        pass


class FakeEvent(cuda_double.FakeEvent):
    def elapsed_time(self, end):
        return 1000.0 * (end.number - self.number)


@pytest.fixture
def runtime(monkeypatch):
    fake = Runtime()
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


@pytest.fixture
def seam(tmp_path, runtime):
    """A table, its contents, a transfer over two links with one staging slot, and four places on the device."""
    table, contents = chunk_files.write_chunks(tmp_path, PAGES)
    ways = ways_up(with_links(chunk_files.FAST, [1e12, 1e12]))
    slab = HostSlab(2 * table.slot_bytes)
    helper = Helper(slab, 2, Ledger(Tier.DEVICE, 2**20, {"staging": len(slab.bytes_N)}))
    with ExitStack() as closing:
        files, staging, arena = Files(table.files), HostSlab(table.slot_bytes), HostSlab(4 * table.slot_bytes)
        reader = Reader(files, LinkLog())
        transfer = CudaShares(reader, [staging.bytes_N], LinkLog(), ways, {1: helper}, torch.device("cpu"))
        places = list(arena.bytes_N.split(table.slot_bytes))
        for thing in (arena, staging, files, reader, transfer):
            closing.callback(thing.close)
        closing.callback(runtime.finish.set)
        yield table, contents, transfer, places


def names(transfer):
    """The streams by what they are for."""
    near, far = transfer._routes
    return near._pull.name, far._pull.name, far._send.name, far._gather.name


def shown(chunk, place_N):
    views = {piece.key: place_N[piece.offset : piece.offset + piece.nbytes] for piece in chunk.tensors}
    return chunk_files.bytes_of(views, chunk)


def fetch(seam, number, after=None):
    table, contents, transfer, places = seam
    ticket = transfer.begin(Order(table.chunks[number], places[number], after=after))
    ticket.wait()
    assert shown(table.chunks[number], places[number]) == contents[number]
    return ticket


def test_each_share_has_its_streams_and_computation_waits_for_both(seam, runtime):
    _, _, transfer, _ = seam
    pull, far_pull, send, gather = names(transfer)
    runtime.calls.clear()
    fence = transfer.fence()
    first = fetch(seam, 0, after=fence)
    transfer.ready(first)
    assert runtime.calls == [
        ("compute", "records", 1),
        (pull, "waits for", 1),  # the place's last reader
        (pull, "records", 2),
        (pull, "records", 3),
        (far_pull, "records", 4),  # into a place of its own: no reader to wait for
        (far_pull, "records", 5),
        (send, "waits for", 1),
        (gather, "waits for", 1),
        (send, "waits for", 5),
        (send, "records", 6),
        (send, "records", 7),
        (gather, "waits for", 7),
        (gather, "records", 8),
        ("compute", "waits for", 3),
        ("compute", "waits for", 8),
    ]


def test_a_place_for_shares_is_written_again_only_behind_the_copy_that_read_it(seam, runtime):
    _, _, transfer, _ = seam
    _, far_pull, send, _ = names(transfer)
    for number in range(3):
        fetch(seam, number)
    sends = [number for name, what, number in runtime.calls if (name, what) == (send, "records")]
    waits = [number for name, what, number in runtime.calls if (name, what) == (far_pull, "waits for")]
    assert waits == [sends[1]]  # the third share goes where the first was, behind the end of its peer copy


def test_without_that_wait_the_order_is_seen_to_be_wrong(seam, runtime, monkeypatch):
    """The mutation: nothing waits for the copy out of a place."""
    _, _, transfer, _ = seam
    slots = transfer._routes[1]._slots
    for number in range(3):
        fetch(seam, number)
        for slot in (next(slots), next(slots)):
            slot.sent = None
    with pytest.raises(AssertionError, match="assert"):
        _, far_pull, _, _ = names(transfer)
        assert [call for call in runtime.calls if call[:2] == (far_pull, "waits for")]


def test_a_staging_slot_is_filled_again_only_when_every_share_has_left_it(seam, runtime):
    table, _, transfer, places = seam
    runtime.finish.clear()
    first, second = (transfer.begin(Order(table.chunks[i], places[i])) for i in (0, 1))
    first.wait()
    assert not second._landed.wait(0.05)
    runtime.finish.set()
    second.wait()
    transfer.close()
    assert len(transfer._free) == 1
    half = table.chunks[0].nbytes
    assert transfer._log.num_bytes == {"h2d": half, "h2d:1": half, "peer:1": half}  # of two chunks


def test_a_device_that_is_lost_is_one_error_and_the_source_is_free_again(seam, runtime):
    table, _, transfer, places = seam
    runtime.refuses = transfer._routes[1]._pull
    ticket = transfer.begin(Order(table.chunks[0], places[0]))
    with pytest.raises(
        MachineError, match=r"ZI-5382.*chunk 0 did not come over h2d:1: CUDA error: device is lost"
    ):
        ticket.wait()
    runtime.refuses = None
    fetch(seam, 1)


def test_a_copy_that_fails_later_surfaces_at_the_next_lease(seam, runtime):
    _, _, transfer, _ = seam
    runtime.error = RuntimeError("CUDA error: peer access was taken away")
    ticket = fetch(seam, 0)
    transfer.close()
    with pytest.raises(MachineError, match=r"ZI-5382.*peer access"):
        transfer.ready(ticket)
    assert len(transfer._free) == 1


def test_what_the_computing_device_does_alone_stays_as_it_is(seam, runtime):
    _, _, transfer, places = seam
    x = torch.arange(4.0)
    assert torch.equal(transfer.to_device(x), x) and torch.equal(transfer.to_host(x), x)
    transfer.release(places[0])
    transfer.close()  # what a copy took is written down when it has been seen to end
    assert transfer._log.num_bytes == {"h2d": 16, "d2h": 16}


def test_rates_count_while_all_are_at_work():
    """The slow link runs alone when the fast one has ended: what it does then is not counted."""
    fast, slow = [1, 2, 3, 4], [2, 4, 4.5, 5]  # one round each; the slow one at half the rate until 4 s
    assert common_rates([fast, slow], 100) == [100, 50]
    assert common_rates([[1.0]], 100) == [100]
    assert common_rates([[1, 2], [7, 8]], 70) == [70, 10], "not one round in time: the first one's own rate"


class FakeLinks:
    """Links with ports, switches and a last hop in fact: what a measurement has to find out."""

    def __init__(self, alone, port_of, port_rate, peer, last_hop=None):
        self.alone, self.port_of, self.port_rate, self.peer, self.last_hop = (
            alone,
            port_of,
            port_rate,
            peer,
            last_hop,
        )
        self.num_devices = len(alone)

    def own(self, device):
        return self.alone[device]

    def send(self, device):
        return self.peer

    def pull(self, devices):
        shared = [sum(self.port_of[other] == self.port_of[device] for other in devices) for device in devices]
        rates = [
            min(self.alone[device], self.port_rate / count, self.peer if device else self.alone[0])
            for device, count in zip(devices, shared, strict=True)
        ]
        crowd = sum(rates) / self.last_hop if self.last_hop else 1
        return [rate / max(crowd, 1) for rate in rates]


@pytest.mark.parametrize(
    ("links", "gain", "sharers"),
    [
        (FakeLinks([24e9, 24e9], [0, 1], 24e9, 50e9), 2.0, []),
        (FakeLinks([24e9, 24e9], [0, 0], 24e9, 50e9), 1.0, [0, 1]),
        (FakeLinks([24e9, 12e9], [0, 1], 24e9, 50e9), 1.5, []),
        (FakeLinks([24e9] * 4, [0, 0, 1, 1], 24e9, 200e9), 2.0, [0, 1, 2, 3]),
        (FakeLinks([24e9, 24e9], [0, 1], 24e9, 24e9, last_hop=24e9), 1.0, [0, 1]),  # no bridge between them
        (FakeLinks([24e9, 24e9], [0, 1], 24e9, 6e9), 1.25, []),
    ],
)
def test_measuring_finds_out_who_shares_a_port(links, gain, sharers):
    found = topology.measure_links(links)
    assert [link.peer is None for link in found] == [True] + [False] * (links.num_devices - 1)
    assert topology.sharing(found) == sharers
    assert sum(link.together_bytes_per_s for link in found) / links.alone[0] == pytest.approx(gain)


def test_rates_alone_would_promise_what_a_port_does_not_keep():
    """The mutation: the same links, guessed from what each carries by itself."""
    links = FakeLinks([24e9, 24e9], [0, 0], 24e9, 50e9)
    guessed = sum(links.own(device) for device in range(2))
    assert guessed == 2 * sum(link.together_bytes_per_s for link in topology.measure_links(links))


def test_one_device_has_nothing_to_measure():
    assert topology.cuda_links(num_devices=1) == topology.cuda_links(num_devices=0) == ()


@pytest.fixture
def two_devices(runtime, monkeypatch):
    """CudaLinks on two devices that are host memory, with the runtime's page-locking noted."""
    locked = {}

    class Library:
        @staticmethod
        def cudaHostRegister(address, nbytes, flags):
            locked[address] = flags
            return 0

        @staticmethod
        def cudaHostUnregister(address):
            del locked[address]

    monkeypatch.setattr(torch.cuda, "cudart", Library)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr("zinfer.memory.measure_devices.DeviceSlab", lambda nbytes, device: HostSlab(nbytes))
    return locked


def test_the_links_of_two_devices_are_measured_and_everything_goes_back(two_devices, runtime):
    links = topology.cuda_links(lambda count: CudaLinks(count, 4096), num_devices=2)
    assert [link.peer is None for link in links] == [True, False]
    assert all(link.together_bytes_per_s > 0 for link in links)
    assert two_devices == {}


def test_host_memory_is_page_locked_for_every_device(two_devices):
    with CudaLinks(2, 4096):
        assert list(two_devices.values()) == [1, 1]


def test_a_way_over_another_device_pulls_ahead_by_one_place(two_devices, runtime):
    with CudaLinks(2, 4096) as links:
        pulls, sends = links._pulls[1].name, links._sends[1].name
        runtime.calls.clear()
        links.pull([1])
        sent = [number for name, what, number in runtime.calls if (name, what) == (sends, "records")]
        waits = [number for name, what, number in runtime.calls if (name, what) == (pulls, "waits for")]
    assert waits == sent[:-2], "a pull waits for the copy two rounds before, never for the last one"


def test_links_that_cannot_be_measured_are_one_error(two_devices, runtime):
    with pytest.raises(MachineError, match=r"ZI-5383.*copying failed.*lost"), CudaLinks(2, 4096) as links:
        runtime.refuses = links._pulls[1]
        links.own(1)
    assert two_devices == {}


def test_what_is_parked_has_its_place_with_several_devices_too(tmp_path, runtime, monkeypatch):
    table, _ = chunk_files.write_chunks(tmp_path, PAGES)
    placement = chunk_files.sim_placement(table, (), (), 3, 1)
    machine = with_links(chunk_files.FAST, [1e12, 1e12])
    monkeypatch.setattr(aggregate, "DeviceSlab", lambda nbytes, device: HostSlab(nbytes))
    made = aggregate.by_several_links(
        table, placement, Budget(2**24, 2**24), machine, "cuda:0", parking_bytes=8192
    )
    files = Files(table.files)
    reader = Reader(files, LinkLog())
    transfer = made(reader, [], LinkLog())
    assert len(transfer.crossing.parking.slab.bytes_N) == 8192
    place = 24576  # half a chunk and two pieces
    assert transfer.ledgers["device:1"].reserved["staging"] == 3 * place
    for thing in (transfer, reader, files):
        thing.close()
