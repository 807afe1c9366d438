"""Overlapped passes over a manager's chunks, as the hazard tests drive them on every kind of device."""

from contextlib import closing

import chunk_files
import torch


def leases(manager, passes, ahead):
    """Every chunk of every pass, leased, while what is ahead of it arrives; look-ahead goes around the end."""
    streamed = [chunk.id for chunk in manager.table.chunks if not manager.placement.resident(chunk.id)]
    for number in streamed[: ahead + 1]:
        manager.prefetch(number)
    for _ in range(passes):
        for chunk in manager.table.chunks:
            if manager.placement.resident(chunk.id):
                manager.prefetch(chunk.id)
            with manager.lease(chunk.id) as lease:
                yield chunk, lease
            if chunk.id in streamed:
                manager.evict(chunk.id)
                manager.prefetch(streamed[(streamed.index(chunk.id) + ahead + 1) % len(streamed)])
            manager.check()


def run_passes(manager, contents, *, passes=4, ahead=2):
    """Every lease's bytes are compared with the file's, twice."""
    with closing(
        leases(manager, passes, ahead)
    ) as walk:  # a lease ends with the assertion that failed under it
        for chunk, lease in walk:
            for _ in range(2):
                assert chunk_files.bytes_of(lease, chunk) == contents[chunk.id], f"chunk {chunk.id}"


def summed_passes(manager, *, passes=4, ahead=2, between=lambda: None):
    """The checksum of every lease, in order, by the device in stream order, as a product would read: the host does
    not wait for it once."""
    sums = []
    for chunk, lease in leases(manager, passes, ahead):
        between()
        parts = [lease[piece.key].flatten().view(torch.uint8).long().sum() for piece in chunk.tensors]
        sums.append(torch.stack(parts).sum())
    return torch.stack(sums).tolist()
