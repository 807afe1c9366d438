"""Token ids of a request.  In: a JobRequest.  Out: the ids to feed, or the Fault that keeps it from being run."""

from __future__ import annotations

from zinfer.errors import ZinferError
from zinfer.jobs.line import Fault, JobRequest
from zinfer.runtime.model import Model
from zinfer.tokenizer import Renderer


def ids_of(request: JobRequest, model: Model, renderer: Renderer) -> list[int] | Fault:
    """The ids, checked against vocabulary and context.

    Errors: UsageError ZI-1105 to ZI-1107 (no tokens, an id outside the vocabulary, longer than the context),
    ZI-1401 to ZI-1403 (chat), CheckpointError ZI-4601 (text without a tokenizer).
    """
    try:
        ids = _ids(request, model, renderer)
        model.check_prompt(ids, request.params.max_tokens)
    except ZinferError as error:
        return request.fault(error)
    return ids


def _ids(request: JobRequest, model: Model, renderer: Renderer) -> list[int]:
    if isinstance(request.prompt, list):
        return request.prompt
    tokenizer = model.need_tokenizer()
    if isinstance(request.prompt, str):
        return tokenizer.encode(request.prompt)
    assert request.messages is not None, "a request has a prompt or messages"
    text = tokenizer.apply_chat_template(request.messages, tools=request.tools, renderer=renderer)
    return tokenizer.encode(text, add_special_tokens=False)
