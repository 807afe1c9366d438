"""The Python face of encoders.  In: a folder and a memory budget.  Out: labels with scores, embeddings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zinfer.config.load import load_settings
from zinfer.config.schema import Settings
from zinfer.errors import UsageError
from zinfer.layers.pooling import normalised
from zinfer.runtime.encoder_engine import EncoderEngine
from zinfer.runtime.executor import Watch, unwatched
from zinfer.runtime.labels import check_top_k, ranked, shaped
from zinfer.spec.records import Encoder
from zinfer.students.serving import GroupService, is_group
from zinfer.tokenizer import Text, encode_texts

Texts: TypeAlias = (
    str | tuple[str, str] | Mapping[str, str] | Sequence[str | tuple[str, str] | Mapping[str, str]]
)
WINDOW = 1024  # texts that are cut into tokens and sorted by length together


class Classifier:
    """An encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM, sentence-transformers) that may exceed its memory.

    `model` is a Hugging Face folder, a sentence-transformers folder, a zinfer store, or a group of students that
    `zinfer distill` wrote, of which the first `students` answer (None: all).  `device`, `memory`, `exact`, `machine`
    and the keywords of `runtime` are those of `LLM`; a group is resident for good, in host memory.  Texts are packed
    without padding; what is longer than the model takes is cut, as upstream does.  Threads may call at once: their
    passes take turns.  Raises a ZinferError: UsageError (ZI-1134 for a model that is no encoder), CheckpointError,
    BudgetError, MachineError, IntegrityError.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        students: int | None = None,
        device: str | None = None,
        memory: Mapping[str, Any] | None = None,
        exact: bool | None = None,
        machine: str | Path | None = None,
        config: str | Path | None = None,
        settings: Settings | None = None,
        watch: Watch = unwatched,
        **runtime: Any,
    ) -> None:
        if settings is None:
            flags = {
                "model": str(model),
                "device": device,
                "exact": exact,
                "machine": None if machine is None else str(machine),
                **{f"memory.{name}": value for name, value in (memory or {}).items()},
                **{f"runtime.{name}": value for name, value in runtime.items()},
            }
            settings = load_settings(config, flags=flags).settings
        self._lock = threading.RLock()
        self.settings = settings
        path = Path(model)
        self.engine: EncoderEngine | GroupService
        if is_group(path):
            self.engine = GroupService(path, settings, students)
        elif students is not None:
            raise UsageError(
                "ZI-1140", f"{path} is one model, not a group of students", remedy="leave students out"
            )
        else:
            self.engine = EncoderEngine(path, settings, watch=watch)
        self.encoder: Encoder = self.engine.encoder

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes; empty for a model without a classification head."""
        return self.encoder.labels

    def classify(
        self,
        texts: Texts,
        top_k: int | None = 1,
        *,
        raw_scores: bool = False,
        progress: Callable[[int, int, str], None] = unwatched,
    ) -> Any:
        """Labels with scores, likeliest first, as `transformers` pipelines give them.

        A text is a str, a pair (str, str) or {"text": str, "text_pair": str}.  With top_k=1 one text gives
        {"label", "score"}, a list a list of them; with top_k=N or None (all) each is a list of such.  Scores are
        softmax over the labels, a sigmoid each where the config says multi-label, or as they are (a regression, or
        `raw_scores`).
        Raises UsageError ZI-1112, ZI-1131, ZI-1132, ZI-1135 (no head), ZI-1136 (no texts).
        """
        if not self.labels:
            raise UsageError(
                "ZI-1135",
                f"{self.engine.folder} is a {self.engine.spec.architecture}: it has no classification head",
                remedy=f"zinfer embed {self.engine.folder} 'a text'",
            )
        check_top_k(top_k)
        given, is_one = as_texts(texts)
        logits_NC = self._run(given, 1, progress, "classifying")
        scoring = "none" if raw_scores else self.encoder.scoring
        results = [ranked(row_C, self.labels, scoring, top_k) for row_C in logits_NC]
        return shaped(results, is_one=is_one, top_k=top_k)

    def embed(
        self, texts: Texts, *, progress: Callable[[int, int, str], None] = unwatched
    ) -> npt.NDArray[np.float32]:
        """Pooled and, where the folder says so, normalised rows: float32 [N, D], in input order; one text is N = 1.

        Pooling is that of the folder's 1_Pooling/config.json, else the mean over all tokens.
        """
        given, _ = as_texts(texts)
        rows_ND = self._run(given, 0, progress, "embedding")
        rows_ND = normalised(rows_ND) if self.encoder.is_normalised else rows_ND
        result: npt.NDArray[np.float32] = rows_ND.numpy()
        return result

    def about(self) -> dict[str, Any]:
        """Who answers: {"plan", "stats"} of an offloaded model, {"students", "of", ...} of a group."""
        return self.engine.about()

    def close(self) -> None:
        """Give everything back: memory, files, threads.  The object can be used again; it then loads again."""
        with self._lock:
            self.engine.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, texts: Sequence[Text], which: int, progress: Callable[[int, int, str], None], what: str
    ) -> Tensor:
        """Of each text its pooled row (which = 0) or its logits (1), fp32 [N, ...] in input order."""
        rows: list[Tensor] = []
        for begin in range(0, len(texts), WINDOW):
            window = texts[begin : begin + WINDOW]
            found: dict[int, Tensor] = {}
            for numbers, pooled, logits in self._passes(window, begin):
                result = logits if which else pooled
                assert result is not None, "classify was refused where there is no head"
                found |= dict(zip(numbers, result, strict=True))
                progress(begin + len(found), len(texts), what)
            rows += [found[number] for number in range(len(window))]
        return torch.stack(rows)

    def _passes(self, texts: Sequence[Text], first: int) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        if self.encoder.is_lowered:
            texts = [text.lower() if isinstance(text, str) else _lowered(text) for text in texts]
        encoded = encode_texts(self.engine.tokenizer, texts, self.engine.max_tokens, first)
        with self._lock:
            yield from self.engine.passes(encoded)


def as_texts(texts: object) -> tuple[list[Text], bool]:
    """One text or several as a list, and whether it was one.  Raises UsageError ZI-1136 for anything else."""
    one = _text(texts)
    if one is not None:
        return [one], True
    found = [_text(item) for item in texts] if isinstance(texts, list) else []
    if not found or None in found:
        raise UsageError(
            "ZI-1136",
            f"a text, a pair of texts or a list of those was wanted; {texts!r:.60} was given",
            remedy='classifier.classify(["a text", ("a text", "its pair")])',
        )
    return [text for text in found if text is not None], False


def _text(item: object) -> Text | None:
    if isinstance(item, str):
        return item
    if isinstance(item, dict) and set(item) == {"text", "text_pair"}:
        item = (item["text"], item["text_pair"])
    elif isinstance(item, dict) and set(item) == {"text"}:
        return _text(item["text"])
    if isinstance(item, tuple) and len(item) == 2 and all(isinstance(part, str) for part in item):
        return item
    return None


def _lowered(pair: tuple[str, str]) -> tuple[str, str]:
    return pair[0].lower(), pair[1].lower()
