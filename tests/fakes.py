"""Test doubles: the plainest thing that keeps a seam's promise."""

from itertools import accumulate

import torch

from zinfer.layers.packed import Packed
from zinfer.models.decoder import Flow, run_op

KV_BLOCK = 256


class DenseKv:
    """A KvView over plain lists: per layer and sequence the committed keys and values, whole."""

    device = torch.device("cpu")
    is_resident = True

    def __init__(self, num_layers, num_sequences):
        self.committed = [[None] * num_sequences for _ in range(num_layers)]
        self.staged = {}

    def begin(self, sequences, bounds):
        """The batch of the next pass: which sequences, and the rows of each."""
        self.sequences, self.bounds = list(sequences), bounds

    def stage(self, layer, k_TKD, v_TKD):
        for s, sequence in enumerate(self.sequences):
            rows = slice(self.bounds[s], self.bounds[s + 1])
            self.staged[layer, sequence] = (k_TKD[rows].clone(), v_TKD[rows].clone())

    def past(self, layer, sequence):
        both = self.committed[layer][self.sequences[sequence]]
        return [] if both is None else list(zip(*(x.split(KV_BLOCK) for x in both), strict=True))

    def bring(self, q_THD):
        return q_THD

    take_back = bring

    def locate(self, spans, size):
        return spans, size

    def read(self, layer, place):
        spans, size = place
        both = [[], []]
        for span in spans:
            name = self.sequences[span.sequence]
            parts = [part for part in (self.committed[layer][name], self.staged[layer, name]) if part]
            for rows, kind in zip(both, zip(*parts, strict=True), strict=True):
                kept = torch.cat(kind)[span.start : span.stop]
                rows.append(torch.cat([kept, kept[-1:].expand(size - len(kept), -1, -1)]))
        return tuple(map(torch.stack, both))

    def pages(self, sequences):
        return None

    def planes(self, layer):
        return []

    def commit(self):
        for (layer, sequence), new in self.staged.items():
            old = self.committed[layer][sequence]
            both = new if old is None else tuple(map(torch.cat, zip(old, new, strict=True)))
            self.committed[layer][sequence] = both
        self.staged = {}

    def length(self, sequence):
        both = self.committed[0][sequence]
        return 0 if both is None else len(both[0])


def begin_flow(spec, tensors, batch):
    """A flow with the embedding rows of the batch."""
    flow = Flow()
    for lookup in spec.lookups:
        ids = batch.tokens_T if lookup.role == "tokens" else batch.positions_T
        flow.rows[lookup.role] = tensors[lookup.name][ids + lookup.offset]
    return flow


def op_weights(op, tensors):
    """Role -> view, as a lease would give them; parts of a quantised matrix whole."""
    return {
        part.role: tensors[part.name] if part.dtype else tensors[part.name][part.start : part.stop]
        for part in op.reads
    }


def run_pass(spec, tensors, kv, pieces, *, sequences=None, lengths=None, logit_rows=None, exact=True):
    """The whole program over plain tensors: `pieces` are the new ids of each sequence; their rows are committed."""
    sequences = range(len(pieces)) if sequences is None else sequences
    bounds = tuple(accumulate((len(piece) for piece in pieces), initial=0))
    past = tuple(kv.length(sequence) for sequence in sequences)
    positions = [start + i for start, piece in zip(past, pieces, strict=True) for i in range(len(piece))]
    rows = range(bounds[-1]) if logit_rows is None else logit_rows
    batch = Packed(
        tokens_T=torch.cat(list(pieces)),
        positions_T=torch.tensor(positions),
        bounds=bounds,
        past=past,
        logit_rows=torch.tensor(list(rows), dtype=torch.long),
        lengths=lengths,
    )
    kv.begin(sequences, bounds)
    flow = begin_flow(spec, tensors, batch)
    for op in spec.program:
        run_op(op, spec, flow, op_weights(op, tensors), batch, kv, exact=exact)
    kv.commit()
    return flow.take_logits()
