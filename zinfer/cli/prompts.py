"""Prompts and results as files.  In: flags or JSON lines.  Out: prompts; results as lines."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from zinfer.errors import CheckpointError, UsageError


def read_prompts(
    prompt: str | None, prompt_ids: str | None, input_file: Path | None
) -> str | list[int] | list[str] | list[list[int]]:
    """The one source that was given.  Raises UsageError ZI-1101 for none or several, ZI-1102 for ill-formed ids."""
    if sum(source is not None for source in (prompt, prompt_ids, input_file)) != 1:
        raise UsageError(
            "ZI-1101",
            "exactly one of --prompt, --prompt-ids and --input is wanted",
            remedy='zinfer generate -p "Once"',
        )
    if prompt is not None:
        return prompt
    if prompt_ids is not None:
        try:
            return [int(part) for part in prompt_ids.split(",")]
        except ValueError as error:
            raise UsageError(
                "ZI-1102",
                f"--prompt-ids wants whole numbers, {prompt_ids!r} was given",
                remedy="--prompt-ids 1,2,3",
            ) from error
    assert input_file is not None, "one source was counted above"
    return read_prompt_lines(input_file)


def read_prompt_lines(path: Path) -> list[str] | list[list[int]]:
    """JSON lines {"prompt": text} or {"prompt": [ids]}, all of one kind.  Raises CheckpointError ZI-4911 to ZI-4913."""
    try:
        lines = path.read_bytes().split(b"\n")  # JSON text may hold what else Unicode counts as a line's end
    except OSError as error:
        raise CheckpointError(
            "ZI-4911",
            f"{path} cannot be read: {error.strerror}",
            remedy=f"ls -ld {shlex.quote(str(path))}   # a file is wanted",
        ) from error
    prompts = [_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    ids = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not prompts or (texts and ids):
        what = "mixes text and token ids" if prompts else "holds no prompts"
        raise CheckpointError("ZI-4913", f"{path} {what}", remedy='one {"prompt": "text"} per line')
    return texts or ids


def _prompt(path: Path, number: int, raw: bytes) -> str | list[int]:
    try:
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        where = shlex.quote(str(path))
        raise CheckpointError(
            "ZI-4911",
            f"{path} line {number} is not UTF-8: {error.reason} at its byte {error.start}",
            remedy=f"iconv -f latin1 -t utf-8 {where} > prompts.jsonl   # or whatever it was written in",
        ) from None
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError):
        prompt = None
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise CheckpointError(
        "ZI-4912",
        f'{path} line {number} is not {{"prompt": text or list of token ids}}: {line[:60]!r}',
        remedy='write lines like {"prompt": "Once upon a time"}',
    )


def write_lines(file: BinaryIO, records: Iterable[Mapping[str, object]]) -> None:
    """One JSON line per result."""
    for record in records:
        file.write(as_line(record).encode() + b"\n")


def as_line(record: Mapping[str, object]) -> str:
    """As JSON on one line; half a surrogate pair, which is no Unicode, stays an escape."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        return json.dumps(record)
    return line
