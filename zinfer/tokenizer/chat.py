"""Conversations to text.  In: messages and a stranger's Jinja template.  Out: text, or a refusal within seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from zinfer.errors import CheckpointError, UsageError
from zinfer.tokenizer.renderer import DiedError, Renderer

MAX_TEMPLATE_BYTES = 256 * 2**10
MAX_OUTPUT_BYTES = 4 * 2**20
DEADLINE_S = 1.0  # of computing, for the template alone
MEMORY_BYTES = 2**30


def find_templates(own_file: str | None, in_config: object, older: object) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja goes before tokenizer_config.json, that before chat_template.json."""
    if own_file is not None:
        return {"default": own_file}
    for found in (in_config, older):
        if isinstance(found, str):
            return {"default": found}
        if isinstance(found, list):
            pairs = [(item.get("name"), item.get("template")) for item in found if isinstance(item, dict)]
            return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {}


def render_chat(
    templates: Mapping[str, str],
    chosen: str | None,
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    renderer: Renderer | None = None,
) -> str:
    """Render `messages` with the chosen template in a process of its own, which has little time and memory.

    `renderer` keeps that process for the conversations to come.

    A template is a program by a stranger: Jinja's sandbox keeps it from files and objects, only a process can be
    kept from eating time and memory.  Raises UsageError ZI-1401 (no template), ZI-1402 (the conversation is not
    what the template wants), ZI-1403 (no conversation), CheckpointError ZI-4605 (the template is broken), ZI-4606
    (it exceeds size, time, memory or output).
    """
    template = _choose(templates, chosen, values.get("tools") is not None)
    if len(template.encode()) > MAX_TEMPLATE_BYTES:
        raise _runaway(f"has {len(template.encode())} bytes, the limit is {MAX_TEMPLATE_BYTES}")
    if not messages or not all(isinstance(message, Mapping) for message in messages):
        raise UsageError(
            "ZI-1403",
            "a conversation is a list of at least one message",
            remedy='[{"role": "user", "content": "Hello"}]',
        )
    # Keys without a value are left out, as transformers does: templates test whether a key is there.
    chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
    job = {"template": template, "values": {**values, "messages": chat}, "output_bytes": MAX_OUTPUT_BYTES}
    job |= {"deadline_s": DEADLINE_S, "memory_bytes": MEMORY_BYTES}
    try:
        with ExitStack() as stack:
            answer = (renderer or stack.enter_context(Renderer())).render(job, DEADLINE_S)
    except DiedError as error:
        raise _runaway(str(error)) from None
    match answer["kind"]:
        case "text":
            return str(answer["text"])
        case "broken":
            raise CheckpointError(
                "ZI-4605",
                f"the chat template is broken: {answer['text']}",
                remedy="give a working one: llm.chat(messages, chat_template=TEXT)",
            )
        case "runaway":
            raise _runaway(answer["text"])
    raise UsageError(
        "ZI-1402",
        f"the chat template does not take this conversation: {answer['text']}",
        remedy="change the messages as it says, or give another template: llm.chat(messages, chat_template=TEXT)",
    )


def _choose(templates: Mapping[str, str], chosen: str | None, has_tools: bool) -> str:
    if chosen is not None:
        return templates.get(chosen, chosen)
    name = "tool_use" if has_tools and "tool_use" in templates else "default"
    if name not in templates:
        held = f"only templates named {', '.join(sorted(templates))}" if templates else "no chat template"
        raise UsageError(
            "ZI-1401",
            f"this checkpoint has {held}: it is a base model, or its template was not published",
            remedy="continue plain text with `zinfer generate -p TEXT`, or llm.chat(messages, chat_template=TEXT)",
        )
    return templates[name]


def _runaway(what: str) -> CheckpointError:
    return CheckpointError(
        "ZI-4606",
        f"the chat template {what}",
        remedy="give a trusted one: llm.chat(messages, chat_template=TEXT)",
    )
