"""The process that renders a chat template.  In: jobs, a line of JSON each.  Out: answers likewise.

Started by renderer.py, never imported.  Knows jinja2 and the standard library only.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(jinja2.ext.Extension):
    """{% generation %}: marks what a model said, for training; rendered, it is its content."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 wants a plain class attribute

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """`dict` without its attributes, which lead out of the sandbox."""

    def __call__(self, *pairs: Any, **values: Any) -> dict[Any, Any]:
        return dict(*pairs, **values)


def environment() -> jinja2.Environment:
    """Jinja as transformers sets it up for chat templates."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict()}
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005  # the wall clock is what templates print


def render(job: dict[str, Any]) -> dict[str, str]:
    """{"kind": "text" | "broken" | "refused" | "runaway", "text": ...}."""
    try:
        template = environment().from_string(job["template"])
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        return {"kind": "broken", "text": f"{error}"[:300]}
    pieces, size = [], 0
    try:
        for piece in template.generate(**job["values"]):
            size += len(piece.encode("utf-8", "surrogatepass"))
            if size > job["output_bytes"]:
                return {"kind": "runaway", "text": f"made more than {job['output_bytes']} bytes of text"}
            pieces.append(piece)
    except (MemoryError, RecursionError, OverflowError) as error:
        return {"kind": "runaway", "text": f"needs too much: {type(error).__name__} {error}"[:300]}
    except Exception as error:  # whatever a stranger's program does wrong
        return {"kind": "refused", "text": f"{error}"[:300] or type(error).__name__}
    return {"kind": "text", "text": "".join(pieces)}


def main() -> None:
    """Read jobs; for each give up time and memory, render, answer."""
    for line in sys.stdin.buffer:
        job = json.loads(line)
        resource.setrlimit(resource.RLIMIT_AS, (job["memory_bytes"], job["memory_bytes"]))
        # Counts seconds of computing and kills: a handler would wait for a long computation in C to end.
        signal.setitimer(signal.ITIMER_PROF, job["deadline_s"])
        answer = json.dumps(render(job)).encode() + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        while answer:
            answer = answer[os.write(1, answer) :]


if __name__ == "__main__":
    main()
