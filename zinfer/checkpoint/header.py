"""A safetensors header as hostile input.  In: a file's first bytes and size.  Out: entries that add up."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from zinfer.checkpoint.strict_json import DuplicateKeyError, parse_object, shown
from zinfer.errors import CheckpointError
from zinfer.units import Bytes

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 200_000
MAX_RANK = 16
LENGTH_BYTES = 8  # little-endian length of the JSON that follows

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightEntry:
    """A published tensor: which file of the index, where in it (absolute), safetensors dtype and shape."""

    name: str
    file: int
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension; of the whole where there is none."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


def header_bytes(first: bytes, file_bytes: int, where: str) -> int:
    """Length of the JSON header, from the file's first 8 bytes, before anything of that size is allocated.

    Raises CheckpointError: ZI-4101 (shorter than it says), ZI-4102 (over MAX_HEADER_BYTES).
    """
    if len(first) < LENGTH_BYTES:
        raise _refusal("ZI-4101", where, f"the file has {file_bytes} bytes, a safetensors file at least 10")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise _refusal(
            "ZI-4102", where, f"its header claims {length} bytes, the limit is {Bytes(MAX_HEADER_BYTES)}"
        )
    if LENGTH_BYTES + length > file_bytes:
        raise _refusal(
            "ZI-4101", where, f"its header claims {length} bytes, the whole file has {file_bytes}: cut short"
        )
    return length


def parse_header(
    raw: bytes, file_bytes: int, where: str, file: int = 0, max_tensors: int = MAX_TENSORS
) -> tuple[WeightEntry, ...]:
    """Validate the header JSON `raw` of a file of `file_bytes` bytes; entries come in file order.

    What is promised of the result: names unique, dtypes known, sizes equal shape times dtype, ranges disjoint
    and together exactly the bytes behind the header.  Raises CheckpointError ZI-4103 to ZI-4114.
    """
    # Guessed before parsing, which takes seconds for so many, and counted after it.
    if raw.count(b'"data_offsets"') > max_tensors:
        raise _too_many(where, max_tensors)
    fields = _parse_json(raw, where)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refusal("ZI-4106", where, "its __metadata__ is not a map from text to text")
    if len(fields) > max_tensors:
        raise _too_many(where, max_tensors)
    data_start = LENGTH_BYTES + len(raw)
    entries = [_entry(name, value, data_start, where, file) for name, value in fields.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(entries, data_start, file_bytes, where)
    return tuple(entries)


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _refusal("ZI-4103", where, "its header does not begin with '{': not a safetensors file")
    try:
        return parse_object(raw)
    except DuplicateKeyError as error:
        raise _refusal("ZI-4104", where, f"in its header {error}") from None
    except ValueError as error:
        raise _refusal("ZI-4103", where, f"its header is not JSON: {error}") from None


def _entry(name: str, value: Any, data_start: int, where: str, file: int) -> WeightEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _refusal("ZI-4107", where, f"tensor {shown(name)} needs exactly dtype, shape, data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refusal("ZI-4108", where, f"tensor {shown(name)} has the unknown dtype {shown(dtype)}")
    if not _are_counts(shape) or len(shape) > MAX_RANK:
        raise _refusal("ZI-4109", where, f"tensor {shown(name)} has an impossible shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refusal("ZI-4110", where, f"tensor {shown(name)} has impossible data_offsets")
    begin, end = offsets
    bits = DTYPE_BITS[dtype]
    for extent in shape:
        bits *= extent
        if bits >= 2**63:  # before the next factor: [2**62, 2**62, 0] must not pass as empty
            raise _refusal("ZI-4109", where, f"tensor {shown(name)} of shape {shape} is larger than any file")
    if bits != (end - begin) * 8:
        needs = f"tensor {shown(name)} ({dtype} {shape}) needs {-(-bits // 8)} bytes"
        raise _refusal("ZI-4111", where, f"{needs}, its data_offsets hold {end - begin}")
    return WeightEntry(name, file, data_start + begin, end - begin, dtype, tuple(shape))


def _are_counts(value: Any) -> bool:
    """A list of whole numbers from 0 to 2**63 (true and 1.0 are none)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(entries: list[WeightEntry], data_start: int, file_bytes: int, where: str) -> None:
    """The ranges, in order, touch end to end and fill the file; so no byte is shared and none is hidden."""
    at = data_start
    for entry in entries:
        if entry.offset < at:
            raise _refusal("ZI-4112", where, f"tensor {shown(entry.name)} overlaps the one before it")
        if entry.offset > at:
            gap = entry.offset - at
            raise _refusal("ZI-4113", where, f"{gap} bytes before {shown(entry.name)} are no tensor's")
        at = entry.offset + entry.nbytes
    if at > file_bytes:
        ends = f"its tensors end at byte {at}, the file at {file_bytes}"
        raise _refusal("ZI-4114", where, f"{ends}: {at - file_bytes} bytes are missing")
    if at < file_bytes:
        raise _refusal("ZI-4113", where, f"{file_bytes - at} bytes after the last tensor are no tensor's")


def _too_many(where: str, max_tensors: int) -> CheckpointError:
    return _refusal(
        "ZI-4105",
        where,
        f"with it there are more than {MAX_TENSORS} tensors: {max_tensors} were still allowed",
    )


def _refusal(code: str, where: str, what: str) -> CheckpointError:
    remedy = f"sha256sum {shlex.quote(where)}   # where it differs from the publisher's, fetch the file again"
    return CheckpointError(code, f"{where}: {what}", remedy=remedy)
