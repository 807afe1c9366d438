"""Machines with several devices, by the rates of their links."""

from zinfer.chunks.table import PAGE
from zinfer.config.machine import Compute, DeviceLink, Link, Machine, ProductRate

RATES = Compute(
    products={"BF16": (ProductRate(rows=1, seconds_per_gb=0.1),)}, attention_flops_per_s=1e12, op_overhead_s=0
)


def machine_with(disk, h2d=None):
    """Links that move `disk` and `h2d` pages a second."""
    return Machine(
        name="test",
        host_bytes=2**30,
        device_bytes=2**30,
        disk_read=Link(bytes_per_s=disk * PAGE),
        h2d=Link(bytes_per_s=h2d * PAGE) if h2d else None,
        host=RATES,
        device=RATES,
    )


def with_links(machine, together, *, peer=1e15, alone=None, latency_s=0.0):
    """The machine with one device per entry of `together` (bytes per second while all work)."""
    alone = alone or together
    return machine.model_copy(
        update={
            "h2d": Link(bytes_per_s=alone[0], latency_s=latency_s),
            "links": tuple(
                DeviceLink(
                    h2d=Link(bytes_per_s=alone[at], latency_s=latency_s),
                    together_bytes_per_s=rate,
                    peer=Link(bytes_per_s=peer) if at else None,
                )
                for at, rate in enumerate(together)
            ),
        }
    )
