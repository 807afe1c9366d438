"""Read one request line.  In: its bytes.  Out: a JobRequest, or the Fault that its result line will state.

Two forms: OpenAI's batch lines {"custom_id", "method", "url", "body"}, and plain {"prompt": text or ids} or
{"prompt_ids": ids} beside fields of SamplingParams.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Any, Literal, TypeAlias

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from zinfer.checkpoint.strict_json import parse_object, shown
from zinfer.errors import UsageError, ZinferError
from zinfer.sampling.params import SamplingParams

Form: TypeAlias = Literal["plain", "completions", "chat"]
URLS: dict[str, Form] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}
MAX_ID_CHARS = 512
_OPENAI_FIELDS = {"method", "url", "body"}
_LINE_FIELDS = _OPENAI_FIELDS | {"custom_id"}
# What changes nothing here: bookkeeping of the service that the lines were written for.
_IGNORED = {"model", "user", "metadata", "store", "service_tier", "stream_options", "safety_identifier"}
# Understood at one value only: that at which it does nothing.
_IDLE: dict[str, object] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
}
_TOP_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A request as its line states it; `prompt` is None for a conversation, which is in `messages`.

    `key` is what an interrupted job knows it by: the custom_id, else line number and hash of the line.
    """

    line: int
    digest: str  # of the line's bytes
    form: Form
    custom_id: str | None
    prompt: str | list[int] | None
    messages: list[Mapping[str, Any]] | None
    params: SamplingParams
    tools: list[Mapping[str, Any]] | None = None
    model: str | None = None

    @property
    def key(self) -> str:
        """What the request is known by."""
        return key_of(self.line, self.digest, self.custom_id)

    def fault(self, error: ZinferError) -> Fault:
        """What becomes of it when `error` keeps it from being answered."""
        return Fault(self.line, self.digest, self.form, self.custom_id, error)


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a line gives no answer; `form` and `custom_id` as far as they could be read."""

    line: int
    digest: str
    form: Form
    custom_id: str | None
    error: ZinferError


def key_of(line: int, digest: str, custom_id: str | None) -> str:
    """The custom_id, else line number and hash of the line."""
    return f"{line}:{digest}" if custom_id is None else f"id:{custom_id}"


def custom_id_of(raw: bytes) -> str | None:
    """The line's custom_id where it has one that can be meant.  Never raises."""
    try:
        return _custom_id(_object(raw))
    except ZinferError:
        return None


def read_line(number: int, raw: bytes, defaults: SamplingParams) -> JobRequest | Fault:
    """Parse line `number` (from 1); what it leaves out is as in `defaults`.  Never raises.

    A request without a seed gets one made from its key, so that it draws the same in every run of the job.
    """
    digest = xxh3_64_hexdigest(raw)
    form: Form = "plain"
    custom_id = None
    try:
        fields = _object(raw)
        form = "completions" if fields.keys() & _OPENAI_FIELDS else "plain"  # of a fault in what follows
        custom_id = _custom_id(fields)
        form = _form(fields)
        request = (
            _plain(number, digest, custom_id, fields, defaults)
            if form == "plain"
            else _openai(number, digest, custom_id, form, fields, defaults)
        )
    except ZinferError as error:
        return Fault(number, digest, form, custom_id, error)
    if request.params.seed is None:
        seed = xxh3_64_intdigest(request.key.encode("utf-8", "surrogatepass")) >> 1
        return replace(request, params=replace(request.params, seed=seed))
    return request


def _object(raw: bytes) -> dict[str, Any]:
    try:
        return parse_object(raw)
    except ValueError as error:
        raise UsageError(
            "ZI-1701",
            f"the line is not a JSON object: {error}",
            remedy='write {"custom_id": "a", "prompt": "Once"}',
        ) from None


def _form(fields: Mapping[str, Any]) -> Form:
    if not fields.keys() & _OPENAI_FIELDS:
        return "plain"
    url = fields.get("url")
    if not isinstance(url, str) or url not in URLS:
        raise UsageError("ZI-1702", f"url is {shown(url)}", remedy=f"use one of {', '.join(URLS)}")
    return URLS[url]


def _custom_id(fields: Mapping[str, Any]) -> str | None:
    custom_id = fields.get("custom_id")
    if custom_id is None:
        return None
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise UsageError(
            "ZI-1703",
            f"custom_id is {shown(custom_id)}",
            remedy=f"custom_id must be a string of 1 to {MAX_ID_CHARS} characters",
        )
    return custom_id


def _plain(
    number: int, digest: str, custom_id: str | None, fields: Mapping[str, Any], defaults: SamplingParams
) -> JobRequest:
    sources = [name for name in ("prompt", "prompt_ids") if fields.get(name) is not None]
    if len(sources) != 1:
        raise _no_prompt(f"{len(sources)} of prompt and prompt_ids are given")
    (source,) = sources
    prompt = _prompt(fields[source])
    if source == "prompt_ids" and isinstance(prompt, str):
        raise _no_prompt("prompt_ids is text")
    rest = {
        name: value for name, value in fields.items() if name not in ("prompt", "prompt_ids", "custom_id")
    }
    return JobRequest(number, digest, "plain", custom_id, prompt, None, _params(rest, defaults))


def _openai(
    number: int,
    digest: str,
    custom_id: str | None,
    form: Form,
    fields: Mapping[str, Any],
    defaults: SamplingParams,
) -> JobRequest:
    if custom_id is None:
        raise UsageError("ZI-1703", "custom_id is missing", remedy='add "custom_id": "request-1"')
    unknown = fields.keys() - _LINE_FIELDS
    if unknown:
        raise _unsupported(min(unknown), fields[min(unknown)], "beside custom_id, method, url and body")
    if fields.get("method", "POST") != "POST":
        raise UsageError("ZI-1702", f"method is {shown(fields['method'])}", remedy='"method": "POST"')
    body = fields.get("body")
    if not isinstance(body, dict):
        raise UsageError(
            "ZI-1704", f"body is {shown(body)}", remedy='"body": {"prompt": "Once", "max_tokens": 8}'
        )
    body = {name: value for name, value in body.items() if value is not None}
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _unsupported("model", model, "it must be a name")
    for name, idle in _IDLE.items():
        if name in body and (body[name] != idle or isinstance(body[name], bool) != isinstance(idle, bool)):
            raise _unsupported(name, body[name], f"only {idle!r} is done")
    is_chat = form == "chat"
    taken = {"messages", "tools"} if is_chat else {"prompt"}
    rest = {name: value for name, value in body.items() if name not in taken | _IGNORED | _IDLE.keys()}
    _rename(rest, is_chat=is_chat)
    return JobRequest(
        number,
        digest,
        form,
        custom_id,
        prompt=None if is_chat else _prompt(body.get("prompt")),
        messages=_messages(body.get("messages")) if is_chat else None,
        params=_params(rest, defaults),
        tools=_tools(body.get("tools")) if is_chat else None,
        model=model,
    )


def _rename(rest: dict[str, Any], *, is_chat: bool) -> None:
    """OpenAI's names for the length, and for log probabilities of chats, in place."""
    if "max_completion_tokens" in rest:
        if "max_tokens" in rest:
            raise _unsupported(
                "max_completion_tokens", rest["max_completion_tokens"], "max_tokens is given too"
            )
        rest["max_tokens"] = rest.pop("max_completion_tokens")
    if not is_chat:
        return
    wanted, count = rest.pop("logprobs", False), rest.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise _unsupported("logprobs", wanted, "in a chat it is true or false")
    if count is not None and (type(count) is not int or not 0 <= count <= _TOP_LOGPROBS or not wanted):
        raise _unsupported("top_logprobs", count, f"0 to {_TOP_LOGPROBS}, with logprobs true")
    if wanted:
        rest["logprobs"] = count or 0


def _params(given: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    values = {field.name: getattr(defaults, field.name) for field in fields_of(SamplingParams)}
    if "max_new_tokens" in given and "max_tokens" not in given:
        del values["max_tokens"]
    return SamplingParams.from_dict(
        values | {name: value for name, value in given.items() if value is not None}
    )


def _prompt(value: object) -> str | list[int]:
    # OpenAI also takes several prompts in one request: one of them is as good as none.
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(type(token) is int for token in value):
        return value
    raise _no_prompt(f"prompt is {shown(value)}")


def _no_prompt(what: str) -> UsageError:
    return UsageError("ZI-1705", what, remedy='give one "prompt": "text" or "prompt_ids": [1, 2, 3] per line')


def _messages(value: object) -> list[Mapping[str, Any]]:
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        return value
    raise UsageError(
        "ZI-1706", f"messages is {shown(value)}", remedy='"messages": [{"role": "user", "content": "Hello"}]'
    )


def _tools(value: object) -> list[Mapping[str, Any]] | None:
    if not value:
        return None
    if isinstance(value, list) and all(isinstance(tool, dict) for tool in value):
        return value
    raise _unsupported("tools", value, "a list of objects was wanted")


def _unsupported(name: str, value: object, why: str) -> UsageError:
    return UsageError("ZI-1707", f"{name} is {shown(value)}: {why}", remedy=f"leave {shown(name)} out")
