"""Several links on the virtual clock: shares in proportion, passes as long as all links together need, who binds."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from links_of import machine_with, with_links
from plan_of import SHAPES, plan_of, spec_of
from plan_tables import table_of
from pydantic import ValidationError

from zinfer.chunks.table import PAGE
from zinfer.config.limits import memory_limits
from zinfer.config.load import load_settings
from zinfer.config.machine import DeviceLink, Link, Machine
from zinfer.config.profiles import SIM_DEFAULT, load_machine
from zinfer.config.resolve import resolve
from zinfer.errors import UsageError
from zinfer.plan.explain import explain
from zinfer.plan.place import Reserve, place
from zinfer.plan.records import Budget, Tier
from zinfer.plan.revise import _corrected
from zinfer.plan.schedule import build_schedule, serial_schedule
from zinfer.plan.shares import SHARE_ALIGN, cut, largest_share, link_seconds, ways_up
from zinfer.plan.simulate import simulate

rates = st.lists(st.floats(1e6, 1e12), min_size=1, max_size=8)
sizes = st.integers(1, 2**31)


@given(sizes, rates)
def test_shares_are_the_chunk_and_each_lies_within_a_piece_of_its_proportion(nbytes, rates):
    shares = cut(nbytes, rates)
    assert [shares[0].begin, shares[-1].end] == [0, nbytes]
    assert all(one.end == next_.begin for one, next_ in pairwise(shares))
    for share, rate in zip(shares, rates, strict=True):
        assert share.nbytes >= 0
        assert abs(share.nbytes - nbytes * rate / sum(rates)) <= SHARE_ALIGN
        assert share.begin % SHARE_ALIGN == 0 or share.begin == nbytes


@given(sizes, rates, st.data())
def test_a_place_for_the_largest_chunk_holds_the_share_of_every_smaller_one(nbytes, rates, data):
    smaller = data.draw(st.integers(1, nbytes))
    for at, share in enumerate(cut(smaller, rates)):
        assert share.nbytes <= largest_share(nbytes, rates, at)


def streamed_pass(machine, *, pages=256, count=24, build=build_schedule, lookahead=2, compute_s=0.0):
    """A steady pass in which every chunk comes up from host memory."""
    table = table_of([pages] * count)
    budget = Budget(host=(count + lookahead + 1) * pages * PAGE, device=(lookahead + 1) * pages * PAGE)
    placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=lookahead)
    return simulate(table, placement, build(table, placement), machine, [compute_s] * count)[1]


ONE = machine_with(disk=1e6, h2d=100)


def several(*pages_per_s, peer=1e6):
    return with_links(ONE, [rate * PAGE for rate in pages_per_s], peer=peer * PAGE)


def test_two_equal_links_halve_a_streamed_pass():
    alone, both = streamed_pass(ONE), streamed_pass(several(100, 100))
    assert both.seconds == pytest.approx(alone.seconds / 2, rel=0.02)
    assert both.bytes == dict.fromkeys(("h2d", "h2d:1", "peer:1"), alone.bytes["h2d"] // 2)


def test_four_links_quarter_it():
    assert streamed_pass(several(100, 100, 100, 100)).seconds == pytest.approx(
        streamed_pass(ONE).seconds / 4, rel=0.03
    )


def test_unequal_links_end_together_with_shares_in_proportion():
    both = streamed_pass(several(100, 25))
    assert both.seconds == pytest.approx(streamed_pass(ONE).seconds / 1.25, rel=0.02)
    assert both.bytes["h2d"] / both.bytes["h2d:1"] == pytest.approx(4, rel=0.05)
    assert both.busy_s["h2d"] == pytest.approx(both.busy_s["h2d:1"], rel=0.05)


def test_equal_shares_over_unequal_links_would_be_slower(monkeypatch):
    """The mutation: cut by count and not by rate, the slow link's half decides."""
    right = streamed_pass(several(100, 25)).seconds
    monkeypatch.setattr("zinfer.plan.simulate.cut", lambda nbytes, rates: cut(nbytes, [1.0] * len(rates)))
    assert streamed_pass(several(100, 25)).seconds > 2 * right


def test_links_behind_one_port_gain_nothing():
    assert streamed_pass(several(50, 50)).seconds == pytest.approx(streamed_pass(ONE).seconds, rel=0.02)


def test_a_slow_gather_binds():
    both = streamed_pass(several(100, 100, peer=20))
    assert link_seconds(both.busy_s) == both.busy_s["peer:1"]
    # The way is as slow as its slowest hop, so it is given that much less to carry.
    assert both.seconds == pytest.approx(streamed_pass(ONE).seconds / 1.2, rel=0.03)


def test_a_pass_without_look_ahead_pays_for_the_gather_of_each_chunk():
    serial = streamed_pass(several(100, 100, peer=100), build=serial_schedule)
    overlapped = streamed_pass(several(100, 100, peer=100))
    assert serial.seconds == pytest.approx(2 * overlapped.seconds, rel=0.05)


def test_computation_hides_several_links_as_it_hides_one():
    both = streamed_pass(several(100, 100), compute_s=1.5)
    assert both.seconds == pytest.approx(24 * 1.5, rel=0.02)


def test_chunks_from_disk_are_shared_too():
    table = table_of([64] * 12)
    budget = Budget(host=3 * 64 * PAGE, device=3 * 64 * PAGE)
    placement = place(table, budget, compute_tier=Tier.DEVICE, reserve=Reserve(), lookahead=2)
    assert Tier.DISK in placement.home
    machine = several(100, 100).model_copy(update={"disk_read": Link(bytes_per_s=50 * PAGE)})
    _, steady = simulate(table, placement, build_schedule(table, placement), machine, [0.0] * 12)
    assert steady.bytes["h2d"] == steady.bytes["h2d:1"] == steady.bytes["disk"] // 2
    assert steady.seconds == pytest.approx(steady.busy_s["disk"], rel=0.05)


def test_a_machine_with_one_link_has_one_way_and_one_without_a_device_none():
    assert [way.bytes_per_s for way in ways_up(ONE)] == [100 * PAGE]
    assert ways_up(machine_with(disk=1)) == []
    assert machine_with(disk=1).up_bytes_per_s == 0


@pytest.mark.parametrize("peers", [(False, False), (True, True), (True, False)])
def test_only_the_first_device_computes(peers):
    link = Link(bytes_per_s=1e9)
    links = [DeviceLink(h2d=link, together_bytes_per_s=1e9, peer=link if peer else None) for peer in peers]
    with pytest.raises(ValidationError, match="the first device computes"):
        Machine.model_validate(ONE.model_dump() | {"links": [one.model_dump() for one in links]})


def planned(machine, devices, **flags):
    return plan_of(
        spec_of("llama-3-8b"),
        machine=machine,
        device="cuda",
        memory__device="4GiB",
        memory__host="40GiB",
        runtime__devices=devices,
        **flags,
    )


TWO = load_machine(SIM_DEFAULT)
ONE_PORT = with_links(TWO, [12e9, 12e9], alone=[24e9, 24e9], peer=50e9)


def test_a_plan_with_two_links_takes_half_the_time_and_says_which_bind():
    one, two = planned(TWO, 1), planned(TWO, 2)
    assert two.forecast.pass_s == pytest.approx(one.forecast.pass_s / 2, rel=0.05)
    assert two.machine.links and not one.machine.links
    text = "\n".join(explain(two))
    assert "h2d 24.00 GB/s (50%) + h2d:1 24.00 GB/s (50%) = 48.00 GB/s" in text
    assert "bound by h2d and h2d:1" in text
    assert "2.00 times the first alone" in text
    assert "links " not in "\n".join(explain(one))


def test_with_twice_the_links_half_as_many_rows_are_free():
    """T* = F b (1 - f) / 2 N B."""
    quick, rows = with_links(TWO, [96e9, 96e9]), {"runtime__max_rows": 8192}
    one, two = planned(quick, 1, **rows), planned(quick, 2, **rows)
    assert one.forecast.token_rows < 8192
    assert two.forecast.token_rows == pytest.approx(one.forecast.token_rows / 2, rel=0.25)


def test_a_plan_says_when_links_share_a_port():
    one, two = planned(ONE_PORT, 1), planned(ONE_PORT, 2)
    assert two.forecast.pass_s == pytest.approx(one.forecast.pass_s, rel=0.02)
    assert "1.00 times the first alone: no gain" in two.reasons["runtime.devices"]


@pytest.mark.parametrize(("machine", "used"), [(TWO, 2), (ONE_PORT, 0)])
def test_auto_takes_the_links_that_gain(machine, used):
    plan = planned(machine, "auto")
    assert len(plan.machine.links) == used
    assert plan.reasons["runtime.devices"].startswith("auto: ")


def resolved(machine, device, devices, num_gpus=0):
    settings = load_settings(flags={"device": device, "runtime.devices": devices}, environ={}).settings
    return resolve(settings, machine, limits=memory_limits(), num_gpus=num_gpus)


@pytest.mark.parametrize(
    ("device", "devices", "num_gpus", "code"),
    [
        ("cpu", 2, 0, "ZI-1196"),
        ("sim", 3, 0, "ZI-1197"),
        ("cuda:0", 2, 1, "ZI-1197"),
        ("cuda:1", 2, 2, "ZI-1198"),
    ],
)
def test_devices_that_cannot_serve_are_refused_with_a_setting_that_works(device, devices, num_gpus, code):
    with pytest.raises(UsageError, match=code) as refused:
        resolved(TWO, device, devices, num_gpus)
    assert "runtime.devices=" in refused.value.remedy
    number = int(refused.value.remedy.partition("runtime.devices=")[2][0])
    assert resolved(TWO, device, number, num_gpus).devices == number


@pytest.mark.parametrize(("device", "num_gpus"), [("cpu", 0), ("cuda:0", 1), ("cuda:1", 2)])
def test_auto_never_refuses(device, num_gpus):
    assert resolved(TWO, device, "auto", num_gpus).devices == 1


def test_measured_passes_correct_every_link():
    slower = _corrected(TWO, 2.0)
    assert slower.up_bytes_per_s == TWO.up_bytes_per_s / 2


def test_the_shipped_machines_say_what_several_cards_gain():
    folder = SHAPES.parent / "machines"
    gains = {
        name: machine.up_bytes_per_s / machine.using(1).up_bytes_per_s
        for name in ("2x-a100-nvlink", "2x-rtx-4090")
        for machine in [load_machine(str(folder / f"{name}.toml"))]
    }
    assert gains == pytest.approx({"2x-a100-nvlink": 2.0, "2x-rtx-4090": 1.0})
