"""The Python face.  In: a model folder and a memory budget.  Out: text, token ids, logits, and what it cost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor

from zinfer.config.load import load_settings
from zinfer.config.schema import Settings
from zinfer.errors import BudgetError, UsageError, ZinferError
from zinfer.plan.make import Plan
from zinfer.runtime.labels import Labelled, check_top_k, ranked_rows, shaped
from zinfer.runtime.model import Model, open_model
from zinfer.runtime.request import CompletionOutput, Request, RequestMetrics, RequestOutput
from zinfer.runtime.score import Branches, Score, branched, scorer_of
from zinfer.runtime.session import Job, Session
from zinfer.runtime.stats import Stats
from zinfer.runtime.text import TextState
from zinfer.sampling.params import SamplingParams
from zinfer.tokenizer import Tokenizer
from zinfer.watch import Watch, unwatched

Prompts: TypeAlias = str | list[str] | list[int] | list[list[int]]
PromptAndParams: TypeAlias = str | list[int] | tuple[str | list[int], SamplingParams]
DEMO = Path(__file__).parent / "assets" / "demo"


class LLM:
    """A causal language model that may be larger than the memory it is given.

    `model` is a Hugging Face folder or a zinfer store (None: the bundled model), `device` "auto", "cpu", "cuda:0"
    or "sim", `memory` {"device": "20GiB", "host": 64 * 2**30, "disk": "/nvme"}.  Further keywords are settings of
    `runtime` (max_rows, max_batch, context, lookahead, ...).  A budget that is too small is refused here; the plan is
    made for the first request, and no weight is read before it.  A request that needs more cache than was planned makes
    a new plan.  `watch(done, total, what)` follows each pass, in bytes of weights.  Threads may call at once: their
    passes take turns.
    Raises a ZinferError: UsageError, CheckpointError, BudgetError, MachineError.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str | None = None,
        memory: Mapping[str, Any] | None = None,
        exact: bool | None = None,
        machine: str | Path | None = None,
        config: str | Path | None = None,
        settings: Settings | None = None,
        trace: str | Path | None = None,
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
        self._ids = count()
        self.settings = settings
        self.model: Model = open_model(Path(settings.model) if settings.model else DEMO, settings)
        self._session = Session(self.model, trace=None if trace is None else Path(trace), watch=watch)

    @property
    def plan(self) -> Plan:
        """The plan that the last generation followed, or the next small one would."""
        return self._session.plan

    @property
    def stats(self) -> Stats:
        """What the engine of that plan has done so far."""
        return self._session.stats

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer; None where it has none."""
        return self.model.tokenizer

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; results in input order.  `progress(done, total, what)` counts tokens."""
        params = params or SamplingParams()
        requests = self._requests(prompts, params)
        jobs = self._jobs(requests)
        total = params.max_tokens * len(requests)
        for done, _ in enumerate(self._session.run(jobs), 1):
            if progress is not None:
                progress(done, total, "generating")
        return [_output(job.request.id, job) for job in jobs]

    def generate_iter(
        self,
        prompts: Iterable[PromptAndParams],
        params: SamplingParams | None = None,
        *,
        ordered: bool = False,
    ) -> Iterator[RequestOutput]:
        """Continue prompts of an iterable of any length; results as they finish, or in input order with `ordered`.

        An item is a prompt or (prompt, SamplingParams).  Items are pulled as passes have room for them, so that the
        iterable may be a file of millions of lines.  `request_id` counts items from 0.  A request that cannot be
        carried out (no token, beyond the context, larger than the cache) does not end the others: its result has
        `error` and no outputs.
        """
        jobs = (self._job(number, item, params or SamplingParams()) for number, item in enumerate(prompts))
        outputs = (_output(job.number, job) for job in self._session.feed(jobs))
        return _in_order(outputs) if ordered else outputs

    def stream(self, prompt: Prompts, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield text of one prompt as it becomes certain: never half a character, nothing of a stop string."""
        self._need_tokenizer()
        requests = self._requests(prompt, params or SamplingParams())
        if len(requests) != 1:
            raise UsageError(
                "ZI-1103", f"stream wants one prompt, {len(requests)} were given", remedy="generate"
            )
        for event in self._session.run(self._jobs(requests)):
            if event.text:
                yield event.text

    def chat(
        self, messages: Sequence[Mapping[str, Any]], params: SamplingParams | None = None, **template: Any
    ) -> RequestOutput:
        """Answer a conversation [{"role", "content"}], by the checkpoint's chat template."""
        text = self._need_tokenizer().apply_chat_template(messages, **template)
        ids = self._need_tokenizer().encode(text, add_special_tokens=False)
        return self.generate([ids], params)[0]

    async def agenerate(self, prompts: Prompts, params: SamplingParams | None = None) -> list[RequestOutput]:
        """`generate` in a worker thread."""
        return await asyncio.to_thread(self.generate, prompts, params)

    async def astream(
        self, prompt: str | list[int], params: SamplingParams | None = None
    ) -> AsyncIterator[str]:
        """`stream` for asynchronous callers; each step runs in a worker thread."""
        deltas = self.stream(prompt, params)
        while (delta := await asyncio.to_thread(next, deltas, None)) is not None:
            yield delta

    def logits(self, prompt: str | list[int]) -> Tensor:
        """Logits of every position of one prompt: CPU float32 [T, V]."""
        (request,) = self._requests(prompt, SamplingParams(max_tokens=1))
        pieces: list[Tensor] = []
        request.on_logits = lambda _, logits_nV: pieces.append(logits_nV.cpu())
        for _ in self._session.run(self._jobs([request])):
            pass
        return torch.cat(pieces)

    def score(
        self, prompts: Sequence[str | list[int]], continuations: Sequence[str | list[int]]
    ) -> list[Score]:
        """How likely each continuation is after its prompt: log probabilities, whole and per token, and whether
        greedy decoding writes it (the `loglikelihood` of lm-evaluation-harness).  A prompt that comes several times is
        fed once, its continuations branch from it.

        Both are text, or both token ids.  Raises UsageError ZI-1105 to ZI-1107, ZI-1113 to ZI-1116.
        """
        if isinstance(prompts, str) or isinstance(continuations, str) or len(prompts) != len(continuations):
            raise UsageError(
                "ZI-1116",
                "a list of prompts and as many continuations were wanted",
                remedy='llm.score(["The sky is"], [" blue"])',
            )
        scorers = [scorer_of(self.model, *pair) for pair in zip(prompts, continuations, strict=True)]
        groups = list(branched(self.model, scorers))
        while groups:
            groups = [half for group in self._too_large(groups) for half in group.halves()]
        return [scorer.score() for scorer in scorers]

    def classify_labels(
        self, prompts: str | Sequence[str], labels: Sequence[str], top_k: int | None = None
    ) -> Any:
        """Which of `labels` continues each prompt best: {"label", "score"}, likeliest first, the scores adding up to 1.

        A label's score is the probability of its text after the prompt, over those of all labels.  One prompt gives
        one result; with top_k=1 a result is its first entry alone.  Raises as `score`.
        """
        check_top_k(top_k)
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        scores = self.score([text for text in texts for _ in labels], [*labels] * len(texts))
        logprobs_NC = torch.tensor([found.logprob for found in scores]).view(len(texts), len(labels))
        results = ranked_rows(logprobs_NC, labels, "softmax", top_k)
        return shaped(results, is_one=isinstance(prompts, str), top_k=top_k)

    def classify(self, texts: str | list[int] | Sequence[str | list[int]], top_k: int | None = 1) -> Any:
        """Labels of texts by a `...ForSequenceClassification` head, in the shape of `transformers` pipelines.

        With top_k=1 a text gives {"label", "score"}, else the `top_k` (None: all) best as a list; a list of texts
        gives a list of those.  Raises UsageError ZI-1104 to ZI-1107, ZI-1112, ZI-1115 (the model generates text).
        """
        check_top_k(top_k)
        labelled = [Labelled.of(self.model, text) for text in _as_list(texts)]
        for job in self._prefill([each.request(next(self._ids)) for each in labelled]):
            if job.error is not None:
                raise job.error
        results = [each.ranked(self.model, top_k) for each in labelled]
        return shaped(results, is_one=isinstance(texts, str) or _is_ids(texts), top_k=top_k)

    def fit(self, prompts: Prompts, params: SamplingParams | None = None) -> Plan:
        """Plan for these prompts (and read nothing yet); the plan that their generation will follow."""
        return self._session.fit(self._requests(prompts, params or SamplingParams()))

    def set_memory(self, **memory: Any) -> Plan:
        """Other budgets from the next pass on, while requests run: `llm.set_memory(host="6GiB")`.

        Only what changes is read or given back (on a CUDA device the model is loaded anew, between generations).
        Raises BudgetError when it is too little, and the old budgets hold.
        """
        return self._session.set_memory(memory)

    def close(self) -> None:
        """Give everything back: memory, files, threads.  The object can be used again; it then loads again."""
        self._session.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self, prompts: Prompts, params: SamplingParams) -> list[Request]:
        return [self._request(prompt, params) for prompt in _as_list(prompts)]

    def _request(self, prompt: str | list[int], params: SamplingParams) -> Request:
        self.model.check_kind(labels=False)
        ids = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        self.model.check_prompt(ids, params.max_tokens)
        text = prompt if isinstance(prompt, str) else None
        return Request(next(self._ids), ids, params, _seed(params), text)

    def _prefill(self, requests: Iterable[Request]) -> Iterator[Job]:
        """Carry out requests that only want logits; however many there are, a window of them is planned for."""
        jobs = (Job(number, request, self._text(request)) for number, request in enumerate(requests))
        return self._session.feed(jobs)

    def _too_large(self, groups: Sequence[Branches]) -> list[Branches]:
        """Score what fits; give back the groups of several continuations whose cache does not fit at once."""
        found = []
        for job in self._prefill(group.request(next(self._ids)) for group in groups):
            group = groups[job.number]
            if job.error is None:
                continue
            if not isinstance(job.error, BudgetError) or len(group.scorers) == 1:
                raise job.error
            found.append(group)
        return found

    def _jobs(self, requests: Sequence[Request]) -> list[Job]:
        return [Job(number, request, self._text(request)) for number, request in enumerate(requests)]

    def _text(self, request: Request) -> TextState:
        return TextState(self.model.tokenizer, request, self.model.spec.eos_ids)

    def _job(self, number: int, item: PromptAndParams, params: SamplingParams) -> Job:
        """One item of an iterable as a job; what is wrong with it becomes its error."""
        prompt, own = item if isinstance(item, tuple) else (item, params)
        error: ZinferError | None = None
        try:
            (checked,) = _as_list(prompt)
            request = self._request(checked, own)
        except ZinferError as found:
            error = found
            request = Request(next(self._ids), [], own, 0, prompt if isinstance(prompt, str) else None)
        return Job(number, request, self._text(request), error)

    def _need_tokenizer(self) -> Tokenizer:
        return self.model.need_tokenizer()


def _as_list(prompts: object) -> list[str | list[int]]:
    """One prompt or several as a list.  Raises UsageError ZI-1104 for anything that is neither text nor ids."""
    items = [prompts] if isinstance(prompts, str) or _is_ids(prompts) else prompts
    if isinstance(items, list) and items and all(isinstance(item, str) or _is_ids(item) for item in items):
        return items
    raise UsageError(
        "ZI-1104",
        f"prompts are str, list[str], list[int] or list[list[int]]; {prompts!r:.60} was given",
        remedy='llm.generate(["Once upon a time"])',
    )


def _is_ids(item: object) -> bool:
    return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)


def _seed(params: SamplingParams) -> int:
    """A request with a seed draws the same whoever its batch mates are; one without draws afresh."""
    return secrets.randbits(63) if params.seed is None else params.seed


def _output(number: int, job: Job) -> RequestOutput:
    request = job.request
    completion = CompletionOutput(
        index=0,
        text=job.text.text,
        token_ids=request.output_ids,
        logprobs=request.logprobs or None,
        finish_reason=request.finish_reason or "length",
        stop_reason=request.stop_reason,
    )
    if job.error is not None:
        return RequestOutput(number, request.prompt, request.prompt_ids, [], job.error)
    metrics = RequestMetrics(request.arrival_s, request.token_s)
    return RequestOutput(number, request.prompt, request.prompt_ids, [completion], metrics=metrics)


def _in_order(outputs: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
    """Hold back what has finished before its predecessors."""
    held: dict[int, RequestOutput] = {}
    number = 0
    for output in outputs:
        held[output.request_id] = output
        while number in held:
            yield held.pop(number)
            number += 1
