"""Text <-> token ids.  In: a checkpoint's tokenizer files.  Out: a Tokenizer.  The only importer of `tokenizers`."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from zinfer.errors import CheckpointError, UsageError
from zinfer.tokenizer.chat import find_templates, render_chat
from zinfer.tokenizer.renderer import Renderer
from zinfer.tokenizer.stream import IncrementalDecoder

MAX_TOKENIZER_BYTES = 64 * 2**20  # the largest published one has 33 MB
MAX_SIDE_BYTES = 16 * 2**20
_SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class HasSideFiles(Protocol):
    """A checkpoint folder whose small files were found and checked: file name -> path."""

    @property
    def side_files(self) -> Mapping[str, Path]:
        """Those that exist."""
        ...


class Tokenizer:
    """A fast tokenizer as published in tokenizer.json.

    Which special tokens an encoded text gets is what the file's post-processor says.  Spaces are never cleaned up
    after decoding.  `special_tokens` are the named ones ("bos_token" -> "<s>") that chat templates use, `templates`
    the chat templates by name.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self._core = core
        self._lock = threading.Lock()  # truncation is a setting of the core
        self.special_tokens = dict(special_tokens or {})
        self.templates = dict(templates or {})
        core.no_truncation()
        core.no_padding()
        added = core.get_added_tokens_decoder()
        self._special_ids = frozenset(id_ for id_, token in added.items() if token.special)
        decoder = core.decoder
        falls_back = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        byte_ids = (core.token_to_id(f"<0x{byte:02X}>") for byte in range(256)) if falls_back else ()
        self._byte_ids = frozenset(id_ for id_ in byte_ids if id_ is not None)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, added tokens included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.  Special tokens spelled out in the text are recognised, as upstream.

        Raises UsageError ZI-1131 for a text that is no Unicode.
        """
        try:
            return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:
            refuse_half_pairs(text, "the text")
            raise

    def encode_batch(
        self, texts: Sequence[str | tuple[str, str]], max_tokens: int, direction: str = "right"
    ) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
        """(ids, token types, was it cut) of each text or pair, special tokens included.

        What exceeds `max_tokens` is cut off its `direction` end ("left" or "right"), of a pair off the longer part
        first.  Threads take turns.
        """
        given = [text if isinstance(text, str) else tuple(text) for text in texts]
        with self._lock:
            try:
                self._core.enable_truncation(max_tokens, strategy="longest_first", direction=direction)
                found = self._core.encode_batch_fast(given, add_special_tokens=True)  # without offsets
            finally:
                self._core.no_truncation()
        return [(tuple(one.ids), tuple(one.type_ids), bool(one.overflowing)) for one in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; ids outside the vocabulary have none."""
        return self._core.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def incremental(self, context: Sequence[int] = ()) -> IncrementalDecoder:
        """A decoder for ids that come one by one after `context`, special tokens skipped."""
        return IncrementalDecoder(
            self._core.decode, is_silent=self._is_silent, byte_ids=self._byte_ids, context=context
        )

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        renderer: Renderer | None = None,
        **variables: Any,
    ) -> str:
        """Render a conversation to text, special tokens spelled out: encode it without adding more.

        `chat_template` is a template's name or its Jinja text; by default the checkpoint's own, or its "tool_use"
        where tools are given.  A `renderer` spares many conversations a process each.
        Raises UsageError ZI-1401 to ZI-1403, CheckpointError ZI-4605 to ZI-4606.
        """
        values = {
            **self.special_tokens,
            "documents": None,
            **variables,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_chat(self.templates, chat_template, messages, values, renderer)

    def _is_silent(self, token_id: int) -> bool:
        return token_id in self._special_ids or self._core.id_to_token(token_id) is None


def refuse_half_pairs(text: str, what: str) -> None:
    """Raises UsageError ZI-1131 for half a surrogate pair, as bytes of another encoding become on a command line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            "ZI-1131",
            f"{what} is no Unicode text: half a surrogate pair stands at character {error.start}",
            remedy="decode its bytes with errors='replace'; on a command line: -p \"$(iconv -f latin1 prompt.txt)\"",
        ) from None


def load_tokenizer(folder: HasSideFiles) -> Tokenizer | None:
    """Read a checkpoint's tokenizer; None where it has no tokenizer.json, which only text needs.

    Raises CheckpointError ZI-4602 for a tokenizer.json that is too large or makes no sense, ZI-4603 for another
    of its files.
    """
    files = folder.side_files
    path = files.get("tokenizer.json")
    if path is None:
        return None
    raw = _read(path, MAX_TOKENIZER_BYTES, "ZI-4602")
    try:
        core = tokenizers.Tokenizer.from_buffer(raw)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the parser's panics are no Exceptions
        raise _refusal("ZI-4602", path, f"is no tokenizer that can be read: {str(error)[:200]}") from None
    config = _json_object(files.get("tokenizer_config.json"))
    names = {**_json_object(files.get("special_tokens_map.json")), **config}
    special = {role: _content(names[role]) for role in _SPECIAL_ROLES if names.get(role) is not None}
    own_file = files.get("chat_template.jinja")
    template = None if own_file is None else _text(own_file)
    older = _json_object(files.get("chat_template.json")).get("chat_template")
    templates = find_templates(template, config.get("chat_template"), older)
    return Tokenizer(core, special_tokens=special, templates=templates)


def _content(token: object) -> str:
    """A special token is published as a string or as {"content": string, ...}."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _json_object(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        value = json.loads(_read(path, MAX_SIDE_BYTES, "ZI-4603"))
    except (ValueError, RecursionError) as error:
        raise _refusal("ZI-4603", path, f"is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise _refusal("ZI-4603", path, f"holds a {type(value).__name__} where an object was wanted")
    return value


def _text(path: Path) -> str:
    try:
        return _read(path, MAX_SIDE_BYTES, "ZI-4603").decode("utf-8")
    except UnicodeDecodeError as error:
        raise _refusal("ZI-4603", path, f"is not UTF-8: {error}") from None


def _read(path: Path, limit: int, code: str) -> bytes:
    size = path.stat().st_size
    if size > limit:
        raise _refusal(code, path, f"has {size} bytes, the limit is {limit}")
    return path.read_bytes()


def _refusal(code: str, path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        code,
        f"{path} {what}",
        remedy=f"fetch it again: hf download ORG/NAME {path.name} --local-dir {path.parent}",
    )
