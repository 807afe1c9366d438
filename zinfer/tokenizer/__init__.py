"""Text and token ids.  In: tokenizer files of a checkpoint, text, ids.  Out: ids, text, rendered conversations."""

from __future__ import annotations

from zinfer.tokenizer.pairs import Encoded, Text, encode_texts
from zinfer.tokenizer.renderer import Renderer
from zinfer.tokenizer.stream import IncrementalDecoder
from zinfer.tokenizer.text import Tokenizer, load_tokenizer

__all__ = [
    "Encoded",
    "IncrementalDecoder",
    "Renderer",
    "Text",
    "Tokenizer",
    "encode_texts",
    "load_tokenizer",
]
