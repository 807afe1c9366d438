"""What passes had of the disk.  In: a plan and the passes under it.  Out: the rate that would have foretold them."""

from __future__ import annotations

from collections.abc import Sequence

from zinfer.config.profiles import fingerprint
from zinfer.memory.disk_notes import write_down
from zinfer.plan.make import Plan
from zinfer.runtime.stats import PassRecord

_LEAST_PASSES, _LEAST_S = 3, 1.0
_WAITED = 0.02  # share of a pass spent waiting above which the disk bound it


def disk_rate(plan: Plan, passes: Sequence[PassRecord]) -> float | None:
    """Bytes per second of the disk alone, as profiles have them; None where too few passes waited for it.

    By the ratio of bytes per second of passes, measured over foretold: what reads lose to products beside them is
    in both.
    """
    forecast = plan.forecast
    foretold_bytes = forecast.bytes_per_pass.get("disk", 0)
    if forecast.binding != "disk" or not foretold_bytes:
        return None
    waited = [done for done in passes if not done.is_first and done.wait_s > _WAITED * done.seconds]
    seconds, nbytes = (
        sum(done.seconds for done in waited),
        sum(done.num_bytes.get("disk", 0) for done in waited),
    )
    if len(waited) < _LEAST_PASSES or seconds < _LEAST_S or not nbytes:
        return None
    return plan.machine.disk_read.bytes_per_s * (nbytes / seconds) / (foretold_bytes / forecast.pass_s)


def note_disk(plan: Plan, passes: Sequence[PassRecord]) -> None:
    """For the next plan on this machine: passes under a plan for another one say nothing."""
    machine = plan.machine
    if not machine.measured or not machine.disk_device or machine.fingerprint != fingerprint():
        return
    if (rate := disk_rate(plan, passes)) is not None:
        write_down(machine.disk_device, rate)
