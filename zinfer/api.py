"""The Python face.  In: a model folder and a memory budget.  Out: text, token ids, logits, and what it cost."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from torch import Tensor

from zinfer.config.load import load_settings
from zinfer.config.schema import Settings
from zinfer.errors import UsageError
from zinfer.plan.make import Plan
from zinfer.runtime.engine import Engine, open_engine
from zinfer.runtime.executor import Watch, unwatched
from zinfer.runtime.loop import Event
from zinfer.runtime.model import Model, open_model
from zinfer.runtime.request import CompletionOutput, Request, RequestOutput
from zinfer.runtime.stats import Stats
from zinfer.runtime.text import TextState
from zinfer.sampling.params import SamplingParams
from zinfer.tokenizer import Tokenizer

Prompts: TypeAlias = str | list[str] | list[int] | list[list[int]]
DEMO = Path(__file__).parent / "assets" / "demo"


class LLM:
    """A causal language model that may be larger than the memory it is given.

    `model` is a Hugging Face folder or a zinfer store (None: the bundled model), `device` "auto", "cpu", "cuda:0"
    or "sim", `memory` {"device": "20GiB", "host": 64 * 2**30, "disk": "/nvme"}.  Further keywords are settings of
    `runtime` (max_rows, max_batch, context, lookahead, ...).  The plan is made here, no weight is read before the
    first request; a request that needs more cache than was planned makes a new plan.  `watch(done, total, what)`
    follows each pass, in bytes of weights.  Threads may call at once: their passes take turns.
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
        self._lock = threading.RLock()
        self._engine: Engine | None = None
        self._num_running = 0
        self._trace = None if trace is None else Path(trace)
        self._watch = watch
        self._ids = count()
        self.settings = settings
        self.model: Model = open_model(Path(settings.model) if settings.model else DEMO, settings)
        self.plan: Plan = self.model.plan()
        self.stats = Stats(self.plan.forecast)

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
        texts = self._texts(requests)
        total = params.max_tokens * len(requests)
        for done, _ in enumerate(self._events(requests, texts), 1):
            if progress is not None:
                progress(done, total, "generating")
        return [_output(request, text) for request, text in zip(requests, texts, strict=True)]

    def stream(self, prompt: Prompts, params: SamplingParams | None = None) -> Iterator[str]:
        """Yield text of one prompt as it becomes certain: never half a character, nothing of a stop string."""
        self._need_tokenizer()
        requests = self._requests(prompt, params or SamplingParams())
        if len(requests) != 1:
            raise UsageError(
                "ZI-1103", f"stream wants one prompt, {len(requests)} were given", remedy="generate"
            )
        for event in self._events(requests, self._texts(requests)):
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
        with self._lock:
            return self._open([request]).logits(request)

    def fit(self, prompts: Prompts, params: SamplingParams | None = None) -> Plan:
        """Plan for these prompts (and read nothing yet); the plan that their generation will follow."""
        requests = self._requests(prompts, params or SamplingParams())
        with self._lock:
            self._plan_for(requests)
            return self.plan

    def close(self) -> None:
        """Give everything back: memory, files, threads.  The object can be used again; it then loads again."""
        with self._lock:
            if self._engine is not None:
                self._engine.close()
                self._engine = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _requests(self, prompts: Prompts, params: SamplingParams) -> list[Request]:
        requests = []
        for prompt in _as_list(prompts):
            ids = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
            self.model.check_prompt(ids, params.max_tokens)
            number = next(self._ids)
            text = prompt if isinstance(prompt, str) else None
            requests.append(Request(number, ids, params, _seed(params), text))
        return requests

    def _texts(self, requests: Sequence[Request]) -> list[TextState]:
        return [TextState(self.model.tokenizer, request, self.model.spec.eos_ids) for request in requests]

    def _events(self, requests: Sequence[Request], texts: Sequence[TextState]) -> Iterator[Event]:
        """Passes as they end.  The lock is held within a pass only, so that a stream left half-read blocks nobody."""
        with self._lock:
            events = self._open(requests).generate(requests, texts)
            self._num_running += 1
        try:
            while True:
                with self._lock:
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            with self._lock:
                self._num_running -= 1
                events.close()

    def _plan_for(self, requests: Sequence[Request]) -> None:
        workload = self.model.workload(
            [(len(request.prompt_ids), request.params.max_tokens) for request in requests]
        )
        if self._engine is None or not self.plan.covers(workload):
            if self._num_running:
                raise UsageError(
                    "ZI-1108",
                    "a request needs a larger plan while another generation is running",
                    remedy="let it end first, or set runtime.context and runtime.max_batch for both",
                )
            self.close()
            self.plan = self.model.plan(workload)
            self.stats = Stats(self.plan.forecast)

    def _open(self, requests: Sequence[Request]) -> Engine:
        self._plan_for(requests)
        if self._engine is None:
            self._engine = open_engine(
                self.model, self.plan, self.stats, trace=self._trace, watch=self._watch
            )
        return self._engine

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


def _output(request: Request, text: TextState) -> RequestOutput:
    completion = CompletionOutput(
        index=0,
        text=text.text,
        token_ids=request.output_ids,
        logprobs=request.logprobs or None,
        finish_reason=request.finish_reason or "length",
        stop_reason=request.stop_reason,
    )
    return RequestOutput(request.id, request.prompt, request.prompt_ids, [completion])
