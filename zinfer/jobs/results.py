"""Result lines.  In: a request and its output, or a fault.  Out: one line of JSON, in the form of the request."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from xxhash import xxh3_128_hexdigest

from zinfer.jobs.line import Fault, JobRequest, key_of
from zinfer.jobs.output import Entry
from zinfer.runtime.request import CompletionOutput, RequestOutput

Decode = Callable[[int], str]  # the text of one token, as well as it has one


def answer(request: JobRequest, output: RequestOutput, *, begun_s: int, model: str, decode: Decode) -> Entry:
    """The line of a finished request: OpenAI's batch output, or `RequestOutput.to_dict` for a plain line.

    Nothing in it depends on when, where or in which run of the job it was made.
    """
    if request.form == "plain":
        record = output.to_dict() | {"id": request.line, "prompt": request.prompt}
        return _entry(request.line, _with_id(record, request.custom_id), is_fault=False)
    best = output.outputs[0]
    number = _number(request.key)
    is_chat = request.form == "chat"
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": best.finish_reason,
        "stop_reason": best.stop_reason,
    }
    if is_chat:
        choice |= {
            "message": {"role": "assistant", "content": best.text},
            "logprobs": _chat_logprobs(best, decode),
        }
    else:
        choice |= {"text": best.text, "logprobs": _logprobs(best, decode)}
    num_prompt, num_output = len(output.prompt_token_ids), len(best.token_ids)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": begun_s,
        "model": request.model or model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
        },
    }
    record = {
        "id": f"batch_req_{number}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": number, "body": body},
        "error": None,
    }
    return _entry(request.line, record, is_fault=False)


def fault_answer(fault: Fault) -> Entry:
    """The line of a request that cannot be answered: code, message, remedy, and which line of the input it is."""
    told = {name: fault.error.to_dict()[name] for name in ("code", "message", "remedy")} | {
        "line": fault.line
    }
    if fault.form == "plain":
        record: dict[str, Any] = _with_id({"id": fault.line, "error": told}, fault.custom_id)
    else:
        number = _number(key_of(fault.line, fault.digest, fault.custom_id))
        record = {"id": f"batch_req_{number}", "custom_id": fault.custom_id, "response": None, "error": told}
    return _entry(fault.line, record, is_fault=True)


def _entry(line: int, record: Mapping[str, Any], *, is_fault: bool) -> Entry:
    # A request may name half a character; a file in UTF-8 cannot.
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Entry(line, text + b"\n", is_fault)


def _with_id(record: dict[str, Any], custom_id: str | None) -> dict[str, Any]:
    return record if custom_id is None else {"custom_id": custom_id} | record


def _number(key: str) -> str:
    return xxh3_128_hexdigest(key.encode("utf-8", "surrogatepass"))


def _logprobs(best: CompletionOutput, decode: Decode) -> dict[str, Any] | None:
    if best.logprobs is None:
        return None
    tokens = [decode(token_id) for token_id in best.token_ids]
    pairs = list(zip(best.token_ids, best.logprobs, strict=True))
    return {
        "tokens": tokens,
        "token_logprobs": [found[token_id] for token_id, found in pairs],
        "top_logprobs": [{decode(other): value for other, value in found.items()} for found in best.logprobs],
        "text_offset": _offsets(tokens),
    }


def _offsets(tokens: Sequence[str]) -> list[int]:
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    return ends[:-1]


def _chat_logprobs(best: CompletionOutput, decode: Decode) -> dict[str, Any] | None:
    if best.logprobs is None:
        return None

    def told(token_id: int, value: float) -> dict[str, Any]:
        text = decode(token_id)
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    for token_id, found in zip(best.token_ids, best.logprobs, strict=True):
        others = sorted(((value, other) for other, value in found.items()), key=lambda pair: -pair[0])
        top = [told(other, value) for value, other in others]
        content.append(told(token_id, found[token_id]) | {"top_logprobs": top})
    return {"content": content}
