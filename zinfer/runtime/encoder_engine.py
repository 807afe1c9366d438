"""An encoder behind the offload engine.  In: a model folder, settings.  Out: pooled rows and logits of texts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zinfer.config.schema import Settings
from zinfer.errors import UsageError
from zinfer.memory.manager import ChunkManager
from zinfer.plan.make import Plan
from zinfer.runtime.compiled import take_shortcut
from zinfer.runtime.engine import open_executor
from zinfer.runtime.executor import Executor
from zinfer.runtime.model import Model, open_model
from zinfer.runtime.stats import Stats
from zinfer.runtime.texts import encode, in_order
from zinfer.spec.records import Encoder
from zinfer.tokenizer import Encoded, Tokenizer
from zinfer.watch import Watch, unwatched


class EncoderEngine:
    """One plan, made for the longest text the model takes; the first pass opens the tiers and loads.

    `passes` is used from one thread at a time, `answer` from any.  Raises UsageError ZI-1134 for a model that is no
    encoder.
    """

    def __init__(self, path: Path, settings: Settings, *, watch: Watch = unwatched) -> None:
        self.folder = path
        self.model: Model = open_model(path, settings)
        self.spec = self.model.spec
        if self.spec.encoder is None:
            raise UsageError(
                "ZI-1134",
                f"{path} is a {self.spec.architecture}, which generates text; an encoder was wanted",
                remedy=f"zinfer generate {path} -p 'a text'",
            )
        self.encoder: Encoder = self.spec.encoder
        self.plan: Plan = self.model.plan()
        self.stats = Stats(self.plan.forecast)
        self.max_tokens = self.model.max_text_tokens
        self.num_students = 1
        self._watch = watch
        self._turn = threading.Lock()
        self._open: tuple[ChunkManager, Executor] | None = None
        self._is_to_be_tried = True

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError ZI-4601 where the folder has none."""
        return self.model.need_tokenizer()

    def passes(self, texts: Sequence[Encoded]) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """(numbers of texts, pooled rows [n, D], logits [n, C] or None) of each pass, fp32 on the host."""
        if self._open is None:
            self._open = open_executor(self.model, self.plan, self.stats, watch=self._watch)
        manager, executor = self._open
        workload = self.plan.workload
        for numbers, _, flow in encode(
            executor, texts, max_rows=workload.prefill_rows, max_batch=workload.batch
        ):
            assert flow.pooled is not None, "a whole pass has pooled"
            pooled, logits = flow.pooled.cpu(), None if flow.logits is None else flow.logits.cpu()
            executor.results_are_here()
            yield numbers, pooled, logits
        self.stats.peak_bytes = manager.stats().peak_bytes

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty for a model without a classification head."""
        return self.encoder.labels

    def answer(self, texts: Sequence[Encoded], num_students: int = 1) -> tuple[Tensor, Tensor | None]:
        """(pooled rows [S, D], logits [S, C] or None) in the order of the texts, by the one model there is.

        Safe to call from several threads: passes take turns.  After the first one a resident model may answer in
        compiled code, where that is faster and results need not be exact.
        """
        assert num_students == self.num_students, "one model is no group"
        with self._turn:
            found = in_order(self.passes(texts))
            if self._is_to_be_tried and self._open is not None:
                self._is_to_be_tried = False
                take_shortcut(self._open[1], self.model.resolved.lanes)
            return found

    def about(self) -> dict[str, Any]:
        """What a JSON result says of where the model lived and what it took."""
        return {"plan": self.plan.to_dict(), "stats": self.stats.to_dict()}

    def close(self) -> None:
        """Give everything back: memory, files, threads.  The next pass loads again."""
        if self._open is not None:
            self._open[0].close()
            self._open, self._is_to_be_tried = None, True
