"""Bring weights over several devices' links.  In: a plan's machine and placement.  Out: a transfer that gathers shares.

PCIe-aware aggregation as in ZeRO-Inference (Aminabadi et al. 2022, arXiv 2207.00032, 5.3), in one process: every
device pulls its share of the next chunk, cut by what its link carries while all of them work, and sends it on to the
device that computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from zinfer.chunks.table import ChunkTable
from zinfer.config.machine import Machine
from zinfer.memory.assemble import MakeTransfer
from zinfer.memory.cuda_shares import CudaShares
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import LinkLog
from zinfer.memory.nvme import Reader
from zinfer.memory.shares import Helper
from zinfer.memory.sim import SimMode
from zinfer.memory.sim_shares import SimShares
from zinfer.memory.slab import DeviceSlab, HostSlab, Slab
from zinfer.memory.transfer import Transfer
from zinfer.plan.records import Budget, Placement, Tier
from zinfer.plan.shares import largest_share, num_share_slots, ways_up


def by_several_links(
    table: ChunkTable,
    placement: Placement,
    budget: Budget,
    machine: Machine,
    device: str,
    *,
    sim_mode: SimMode = "copy",
    parking_bytes: int = 0,
) -> MakeTransfer | None:
    """How chunks come to `device` ("sim", "cuda:0") over all links of the machine; None where it has only one.
    `parking_bytes` as in `open_manager`.

    The maker raises BudgetError ZI-2401 when the shares' places exceed `budget.device` on a further device, ZI-2402
    when its memory is not there.
    """
    ways = ways_up(machine)
    if len(ways) < 2 or placement.compute_tier is not Tier.DEVICE:
        return None
    largest = max(chunk.nbytes for chunk in table.chunks)
    rates = [way.bytes_per_s for way in ways]
    sizes = {at: largest_share(largest, rates, at) for at in range(1, len(ways))}

    def make(reader: Reader, staging: Sequence[Tensor], log: LinkLog) -> Transfer:
        with ExitStack() as undo:
            helpers = {}
            for at, nbytes in sizes.items():
                helpers[at] = _helper(at, nbytes, num_share_slots(placement), budget, device)
                undo.callback(helpers[at].slab.close)
            transfer: Transfer
            if device == "sim":
                transfer = SimShares(reader, staging, log, ways, helpers, d2h=machine.d2h, mode=sim_mode)
            else:
                transfer = CudaShares(reader, staging, log, ways, helpers, parking_bytes=parking_bytes)
            undo.pop_all()
            return transfer

    return make


def _helper(at: int, nbytes: int, num_slots: int, budget: Budget, device: str) -> Helper:
    """Its account first, then its memory."""
    ledger = Ledger(Tier.DEVICE, budget.device, {"staging": num_slots * nbytes})
    slab: Slab
    slab = (
        HostSlab(num_slots * nbytes)
        if device == "sim"
        else DeviceSlab(num_slots * nbytes, torch.device("cuda", at))
    )
    return Helper(slab, num_slots, ledger)
