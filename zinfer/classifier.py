"""The Python face of encoders.  In: a folder and a memory budget.  Out: labels with scores, embeddings."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
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
from zinfer.runtime.labels import check_top_k, ranked_rows, shaped
from zinfer.spec.records import Encoder
from zinfer.students.cascade import Cascade, Deferral, check_threshold, threshold_for
from zinfer.students.scheduler import PASS_TOKENS
from zinfer.students.serving import GroupService, is_group
from zinfer.tokenizer import Encoded, Text, encode_texts
from zinfer.watch import Watch, unwatched

Texts: TypeAlias = (
    str | tuple[str, str] | Mapping[str, str] | Sequence[str | tuple[str, str] | Mapping[str, str]]
)
DEMO = Path(__file__).parent / "assets" / "classifier" / "group"
WINDOW = 1024  # texts that are cut into tokens and sorted by length together


class Classifier:
    """An encoder (BERT, RoBERTa, DistilBERT, ELECTRA, MiniLM, sentence-transformers) that may exceed its memory.

    `model` is a Hugging Face folder, a sentence-transformers folder, a zinfer store, or a group of students that
    `zinfer distill` wrote, of which the first `students` answer (None: all); None: the bundled group, which says of
    Python code which package of the standard library it is from.  `device`, `memory`, `exact`, `machine` and the
    keywords of `runtime` are those of `LLM`; a group is resident for good.  Texts are packed without padding; what is
    longer than the model takes is cut, as upstream does.  Threads may call at once: their passes take turns.

    Of a group, answers whose confidence is below `defer_below` are given by `teacher`, which runs in what memory the
    group leaves; `target_accuracy` chooses the least threshold that reached it on unseen texts.  Without a teacher
    such answers are marked.  A damaged group is refused, or with `degraded` serves its first whole students.  `spread`
    names devices over which the students are spread.

    Raises a ZinferError: UsageError (ZI-1134 for a model that is no encoder, ZI-1165 to ZI-1169 for a cascade that
    cannot be meant), CheckpointError, BudgetError, MachineError, IntegrityError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        students: int | None = None,
        teacher: str | Path | None = None,
        defer_below: float | None = None,
        target_accuracy: float | None = None,
        degraded: bool = False,
        spread: Sequence[str] = (),
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
                "model": None if model is None else str(model),
                "device": device,
                "exact": exact,
                "machine": None if machine is None else str(machine),
                **{f"memory.{name}": value for name, value in (memory or {}).items()},
                **{f"runtime.{name}": value for name, value in runtime.items()},
            }
            settings = load_settings(config, flags=flags).settings
        self._lock = threading.RLock()
        self.settings = settings
        named = settings.model if model is None else model
        path = Path(named) if named else DEMO
        self.engine: EncoderEngine | GroupService
        self.cascade: Cascade | None = None
        self._teacher: EncoderEngine | None = None
        if is_group(path):
            self.engine = GroupService(path, settings, students, devices=spread, is_degraded=degraded)
            try:
                self._begin_cascade(teacher, defer_below, target_accuracy, watch)
            except BaseException:
                self.engine.close()
                raise
        elif (
            degraded
            or spread
            or any(one is not None for one in (students, teacher, defer_below, target_accuracy))
        ):
            raise UsageError(
                "ZI-1140",
                f"{path} is one model, not a group of students",
                remedy="leave students, teacher, threshold and degraded out",
            )
        else:
            self.engine = EncoderEngine(path, settings, watch=watch)
        self.encoder: Encoder = self.engine.encoder

    def _begin_cascade(
        self, teacher: str | Path | None, below: float | None, accuracy: float | None, watch: Watch
    ) -> None:
        group = self.engine
        assert isinstance(group, GroupService), "only a group has a teacher behind it"
        if accuracy is not None:
            below = threshold_for(group.manifest, group.num_students, accuracy)
        if below is None and teacher is None:
            return
        check_threshold(below)
        assert below is not None, "that was checked"
        if teacher is not None:
            self._teacher = EncoderEngine(Path(teacher), group.beside(group.settings), watch=watch)
        self.cascade = Cascade(group, self._teacher, below, group.encoder.scoring)

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
        `raw_scores`).  A group's labels also say "students", how many answered, and where there is a threshold
        "unsure", whether they were below it, and "answered_by", "students" or "teacher".
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
        logits_NC, notes = self._run(given, 1, progress, "classifying")
        scoring = "none" if raw_scores else self.encoder.scoring
        results = [
            [label | note for label in labels]
            for labels, note in zip(ranked_rows(logits_NC, self.labels, scoring, top_k), notes, strict=True)
        ]
        return shaped(results, is_one=is_one, top_k=top_k)

    def embed(
        self, texts: Texts, *, progress: Callable[[int, int, str], None] = unwatched
    ) -> npt.NDArray[np.float32]:
        """Pooled and, where the folder says so, normalised rows: float32 [N, D], in input order; one text is N = 1.

        Pooling is that of the folder's 1_Pooling/config.json, else the mean over all tokens.
        """
        given, _ = as_texts(texts)
        rows_ND, _ = self._run(given, 0, progress, "embedding")
        rows_ND = normalised(rows_ND) if self.encoder.is_normalised else rows_ND
        result: npt.NDArray[np.float32] = rows_ND.numpy()
        return result

    def deferral(self, *, max_queue_tokens: int = 65_536, pass_tokens: int = PASS_TOKENS) -> Deferral | None:
        """The way from a scheduler before the group to the teacher; None without a teacher.  The scheduler owns it."""
        if self.cascade is None or self._teacher is None:
            return None
        return Deferral(
            self._teacher,
            self.cascade.below,
            self.encoder.scoring,
            max_queue_tokens=max_queue_tokens,
            pass_tokens=pass_tokens,
        )

    def encode(self, texts: Sequence[Text], *, direction: str = "right", first: int = 0) -> list[Encoded]:
        """Token ids as the model reads them, cut at the `direction` end ("left", "right"); texts count from `first`.

        Raises UsageError ZI-1131, ZI-1132.
        """
        if self.encoder.is_lowered:
            texts = [text.lower() if isinstance(text, str) else _lowered(text) for text in texts]
        return encode_texts(self.engine.tokenizer, texts, self.engine.max_tokens, first, direction)

    def about(self) -> dict[str, Any]:
        """Who answers: {"plan", "stats"} of an offloaded model, {"students", "of", ...} of a group."""
        about = self.engine.about()
        if self.cascade is not None:
            about["cascade"] = self.cascade.about()
        if self._teacher is not None:
            about["teacher"] = self._teacher.about()
        return about

    def close(self) -> None:
        """Give everything back: memory, files, threads.  The object can be used again; it then loads again."""
        with self._lock:
            self.engine.close()
            if self._teacher is not None:
                self._teacher.close()

    def __enter__(self) -> Classifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, texts: Sequence[Text], which: int, progress: Callable[[int, int, str], None], what: str
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """Of each text its pooled row (which = 0) or its logits (1), fp32 [N, ...] in input order; who gave them."""
        rows: list[Tensor] = []
        notes: list[dict[str, Any]] = []
        for begin in range(0, len(texts), WINDOW):
            encoded = self.encode(texts[begin : begin + WINDOW], first=begin)
            found: dict[int, Tensor] = {}
            with self._lock:
                for numbers, pooled, logits in self.engine.passes(encoded):
                    result = logits if which else pooled
                    assert result is not None, "classify was refused where there is no head"
                    found |= dict(zip(numbers, result, strict=True))
                    progress(begin + len(found), len(texts), what)
                window = torch.stack([found[number] for number in range(len(encoded))])
                is_unsure: list[bool] = []
                if self.cascade is not None and which:
                    window, is_unsure = self.cascade.settle(encoded, window)
            rows.append(window)
            notes += self._notes(len(encoded), is_unsure)
        return torch.cat(rows), notes

    def _notes(self, count: int, is_unsure: Sequence[bool]) -> list[dict[str, Any]]:
        """What each result says of who gave it; nothing where there is one model."""
        if not isinstance(self.engine, GroupService):
            return [{}] * count
        students = {"students": self.engine.num_students}
        if not is_unsure:
            return [students] * count
        who = {False: "students", True: "students" if self._teacher is None else "teacher"}
        return [students | {"unsure": unsure, "answered_by": who[unsure]} for unsure in is_unsure]


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
