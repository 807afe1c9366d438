"""Put the tiers of a plan together.  In: a chunk table, a placement, budgets, a device.  Out: a manager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zinfer.chunks.table import ChunkTable, Read
from zinfer.config.machine import Machine
from zinfer.errors import InternalError
from zinfer.memory.cuda import CudaTransfer
from zinfer.memory.holdings import Memory
from zinfer.memory.ledger import Ledger
from zinfer.memory.links import LinkLog, Pace
from zinfer.memory.manager import ChunkManager
from zinfer.memory.numa import Near, near_device
from zinfer.memory.nvme import Files, Reader, Verify
from zinfer.memory.pinning import Pinning
from zinfer.memory.rows import RowReader
from zinfer.memory.sim import SimMode, SimTransfer
from zinfer.memory.slab import DeviceSlab, HostSlab, Slab
from zinfer.memory.tier import TierMemory, homes_in
from zinfer.memory.transfer import HostTransfer, Transfer
from zinfer.plan.evict import Policy
from zinfer.plan.records import Budget, Placement, Tier

_MOST_SLOTS = 9  # the largest look-ahead, and one

MakeTransfer: TypeAlias = Callable[[Reader, Sequence[Tensor], LinkLog], Transfer]  # staging slots lie between


def open_manager(
    table: ChunkTable,
    placement: Placement,
    budget: Budget,
    *,
    device: str = "cpu",
    machine: Machine | None = None,
    reservations: Mapping[Tier, Mapping[str, int]] | None = None,
    policy: Policy | None = None,
    moments: Sequence[int] = (),
    verify: Verify = "always",
    wants_direct: bool = True,
    sim_mode: SimMode = "copy",
    make_transfer: MakeTransfer | None = None,
    parking_bytes: int = 0,
) -> ChunkManager:
    """Ledgers first, then memory, then threads; nothing is read yet.

    `device` is "cpu" (the placement computes in host memory), "sim" (needs `machine`, whose disk and h2d rates pace
    it) or "cuda:N"; `make_transfer` makes what brings chunks there, if that is not the device's own link alone;
    `parking_bytes` of host memory, reserved among the activations there, hold what waits below it;
    `reservations` are bytes per tier and name (KV, activations, ...) beside weights and staging.
    Raises BudgetError ZI-2401 when reservations and staging alone exceed a budget, ZI-2402 when the system grants
    less than the budget.
    """
    compute = placement.compute_tier
    if (device == "cpu") != (compute is Tier.HOST) or (
        device == "sim" and (machine is None or machine.h2d is None)
    ):
        raise InternalError(
            "ZI-5403", f"device {device!r} does not fit a placement that computes in {compute} memory"
        )
    is_cuda = device.startswith("cuda")
    reserved = reservations or {}
    capacities = {Tier.HOST: budget.host} | ({Tier.DEVICE: budget.device} if compute is Tier.DEVICE else {})
    ledgers = {tier: Ledger(tier, capacity, reserved.get(tier)) for tier, capacity in capacities.items()}
    log = LinkLog()
    with ExitStack() as undo:
        tiers = {}
        for tier, ledger in ledgers.items():
            slots = placement.slots if tier is compute else placement.staging
            where = device if tier is Tier.DEVICE else "cpu"
            tiers[tier] = _tier_memory(table, placement, ledger, slots, where, is_fixed=is_cuda)
            undo.callback(tiers[tier].close)
        pace = Pace(machine.disk_read) if device == "sim" and machine else None
        files = Files(table.files, wants_direct=wants_direct)
        undo.callback(files.close)
        near = near_device(torch.device(device)) if is_cuda else Near()
        reader = Reader(files, log, verify=verify, pace=pace, enter=near.bind_thread)
        undo.callback(reader.close)
        rows = RowReader(files, log, blocks=_row_blocks(table) if verify == "always" else {}, pace=pace)
        undo.callback(rows.close)
        transfer: Transfer = HostTransfer(reader)
        locks: list[Pinning] = []
        if compute is Tier.DEVICE:
            staging = tiers[Tier.HOST].lend_slots("staging")
            if make_transfer is not None:
                transfer = make_transfer(reader, staging, log)
            elif device == "sim" and machine and machine.h2d:
                transfer = SimTransfer(reader, staging, log, machine.h2d, d2h=machine.d2h, mode=sim_mode)
            else:
                transfer = CudaTransfer(
                    reader, staging, log, torch.device(device), near=near, parking_bytes=parking_bytes
                )
        undo.callback(transfer.close)
        if compute is Tier.HOST:  # after the threads: to start one waits for each page that is being found
            streamed = [chunk for chunk in table.streamable if not placement.resident(chunk.id)]
            tiers[Tier.HOST].find_ahead(len(streamed) + len(placement.packed), placement.guests)
        if is_cuda:
            locks = _lock(tiers[Tier.HOST], transfer, near)
        manager = ChunkManager(
            table,
            placement,
            Memory(tiers, files, reader, rows, transfer, log, tuple(locks)),
            policy=policy,
            moments=moments,
        )
        undo.pop_all()
        return manager


def _lock(host: TierMemory, transfer: Any, near: Near) -> list[Pinning]:
    """Begin to page-lock what copies start from or end in."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    locks = [host.pin(runtime, near=near, enter=transfer.enter)]
    slab = transfer.crossing.parking.slab
    if parking_bytes := len(slab.bytes_N):
        locks.append(slab.pin([0, parking_bytes], runtime, near=near, enter=transfer.enter))
    return [lock for lock in locks if lock is not None]


def _tier_memory(
    table: ChunkTable, placement: Placement, ledger: Ledger, slots: int, device: str, *, is_fixed: bool
) -> TierMemory:
    homes = homes_in(table, placement, ledger.tier)
    nbytes = sum(homes.values()) + slots * placement.slot_bytes
    # Addresses for every other split of the tiers; twice, since what stays is never moved to close gaps.
    spare = 0 if is_fixed else 2 * (table.total_bytes + _MOST_SLOTS * table.slot_bytes)
    slab: Slab = (
        DeviceSlab(nbytes, torch.device(device)) if device.startswith("cuda") else HostSlab(nbytes, spare)
    )
    return TierMemory(ledger, slab, homes, slots, placement.slot_bytes)


def _row_blocks(table: ChunkTable) -> dict[str, list[Read]]:
    """The checksummed ranges in which each row table lies: the blocks of the chunks that hold its rows."""
    return {
        name: [
            read
            for chunk in table.chunks
            if any(piece.name == name for piece in chunk.tensors)
            for read in chunk.reads
            if read.digest is not None
        ]
        for name in table.row_tables
    }
