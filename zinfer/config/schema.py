"""What can be set.  In: a tree of plain values.  Out: one frozen Settings object, or an error naming the key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from zinfer.errors import UsageError
from zinfer.units import Bytes

Auto = Literal["auto"]
_FORMS = "20GiB or 20G (binary), 20GB (decimal), 80% (of the machine's memory), auto, or a number of bytes"
EXAMPLES = (  # one assignment per setting that is always right: what errors propose
    "model=./model",
    "device=cpu",
    "exact=true",
    "serve.host=127.0.0.1",
    "serve.port=8080",
    "serve.api_key=$(cat key-file)",
    "serve.objective_ms=100",
    "serve.adapt=true",
    "serve.queue_tokens=16384",
    "serve.max_body=2MiB",
    "serve.max_bodies=64MiB",
    "serve.max_texts=64",
    "serve.max_chars=200000",
    "serve.max_connections=1000",
    "serve.header_s=10",
    "serve.body_s=20",
    "serve.idle_s=75",
    "serve.grace_s=30",
    "serve.access_s=10",
    "memory.host=80%",
    "memory.device=80%",
    "memory.disk=.",
    "runtime.lookahead=auto",
    "runtime.read_mode=auto",
    "runtime.verify=always",
    "runtime.max_rows=auto",
    "runtime.micro_rows=auto",
    "runtime.max_batch=1",
    "runtime.context=auto",
    "runtime.threads=auto",
    "runtime.lanes=auto",
    "runtime.kv=auto",
    "runtime.kv_dtype=auto",
    "runtime.objective=throughput",
    "runtime.kv_tokens=auto",
    "runtime.watch_moments=false",
    "runtime.preempt=auto",
    "runtime.park=auto",
    "runtime.pack=auto",
    "runtime.devices=1",
    "runtime.graphs=auto",
    "machine=sim-default",
)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def read_size(value: object) -> int | str:
    """A memory size as a user writes it -> bytes, "auto", or "80%" (resolved when the machine is known)."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        if not 0 < float(match[1]) <= 100:
            raise ValueError("a share lies above 0% and at most at 100%")
        return f"{float(match[1]):g}%"
    if isinstance(value, str | int):
        try:
            return int(Bytes.parse(value))
        except UsageError as error:
            raise ValueError(f"write {_FORMS}") from error
    raise ValueError(f"write {_FORMS}")


def read_bytes(value: object) -> int:
    """As `read_size`, for a limit that no machine resolves."""
    size = read_size(value)
    if isinstance(size, str):
        raise ValueError("write 2MiB, or a number of bytes")
    return size


Size = Annotated[int | str, BeforeValidator(read_size)]


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Memory(_Group):
    """Bytes zinfer may hold in each memory tier, everything it allocates there counted; `disk` is a folder."""

    device: Size = "auto"
    host: Size = "auto"
    disk: str | None = None  # where stores and scratch files go; None: beside the model


class Runtime(_Group):
    """How a run is carried out.  "auto" values are chosen by the plan and printed."""

    lookahead: Annotated[int, Field(ge=0, le=8)] | Auto = "auto"  # chunks in flight while one computes
    read_mode: Literal["auto", "direct", "buffered"] = "auto"
    verify: Literal["always", "off"] = "always"  # checksums of a store's blocks
    max_rows: Annotated[int, Field(ge=1)] | Auto = "auto"  # token rows one pass carries
    micro_rows: Annotated[int, Field(ge=1)] | Auto = (
        "auto"  # of them, computed together while a chunk is there
    )
    max_batch: Annotated[int, Field(ge=1)] | Auto = "auto"  # sequences at once
    context: Annotated[int, Field(ge=1)] | Auto = "auto"  # tokens a sequence may reach, prompt included
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"  # OpenMP dies of very many
    lanes: Annotated[int, Field(ge=1, le=1024)] | Auto = "auto"  # cores that share an encoder's pass
    kv: Literal["auto", "device", "host"] = "auto"  # where the cache lives when there is a device
    kv_dtype: Literal["auto", "model", "int8"] = "auto"  # of its pages; auto: the model's
    objective: Literal["throughput", "latency"] = (
        "throughput"  # the job's end, or each request's, as early as can be
    )
    kv_tokens: Annotated[int, Field(ge=1)] | Auto = "auto"  # what the cache holds, all sequences together
    watch_moments: bool = (
        False  # in the first pass, what each moment needs beside weights; more than planned is met
    )
    park: Literal["auto", "always", "never"] = (
        "auto"  # hidden states of waiting micro-batches below the device
    )
    pack: Literal["auto", "always", "never"] = (
        "auto"  # without loss, in host memory: weights that stay while others stream
    )
    devices: Annotated[int, Field(ge=1, le=16)] | Auto = 1  # whose links bring weights; auto: all that gain
    graphs: Literal["auto", "off"] = "auto"  # decode passes recorded once and replayed
    preempt: Literal["auto", "spill", "recompute"] = "auto"  # a sequence whose pages are needed: the cheaper


class Serve(_Group):
    """How `zinfer serve` listens, and what it refuses.  The key never appears in any output."""

    host: str = "127.0.0.1"  # an address; any but a loopback one needs a key
    port: Annotated[int, Field(ge=0, le=65535)] = 8080  # 0: whichever is free, printed
    api_key: Annotated[SecretStr, Field(min_length=1)] | None = None
    objective_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100  # what 99 of 100 answers may take
    adapt: bool = True  # fewer students answer under load
    queue_tokens: Annotated[int, Field(ge=1)] = 16384  # that may wait; more is refused
    max_body: Annotated[int, BeforeValidator(read_bytes), Field(ge=1)] = 2 * 2**20  # of one request
    max_bodies: Annotated[int, BeforeValidator(read_bytes), Field(ge=1)] = 64 * 2**20  # of all that are held
    max_texts: Annotated[int, Field(ge=1)] = 64  # of one request
    max_chars: Annotated[int, Field(ge=1)] = 200_000  # of one text
    max_connections: Annotated[int, Field(ge=1)] = 4096  # open at once; further ones are refused and closed
    header_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10  # from a request's first byte
    body_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20  # from its headers
    idle_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 75  # a connection between requests
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        30  # to answer what was accepted, at the end
    )
    access_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10  # one line about so many seconds


class Settings(_Group):
    """Everything a user can choose.  `machine` names a shipped profile or a file; None: this machine."""

    model: Annotated[str, Field(min_length=1)] | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|sim|cuda(:\d+)?)$")] = "auto"
    exact: bool = True
    memory: Memory = Memory()
    runtime: Runtime = Runtime()
    serve: Serve = Serve()
    machine: str | None = None


def setting_paths(group: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every key as users write it: "device", "memory.host", ..."""
    for name, field in group.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from setting_paths(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def closest(word: str, known: Iterator[str] | list[str]) -> str:
    """The known word most like `word`; the empty string when none resembles it."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)), "")


def parse_settings(tree: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Settings:
    """Check a tree of plain values.

    Raises UsageError ZI-1002 for an unknown key (with the closest known one), ZI-1003 for a value that cannot be
    meant; both say where the key came from when `origins` tells.
    """
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _explained(error.errors()[0], origins or {}) from None


def _explained(fault: Any, origins: Mapping[str, str]) -> UsageError:
    # pydantic appends which member of a union it tried: only the leading parts are ours.
    parts = [str(part) for part in fault["loc"]]
    path = ".".join(parts[: 2 if isinstance(getattr(Settings(), parts[0], None), BaseModel) else 1])
    where = f" (from {origins[path]})" if path in origins else ""
    if fault["type"] == "extra_forbidden":
        return unknown_setting(path, where)
    reason = str(fault["msg"]).removeprefix("Value error, ")
    return UsageError(
        "ZI-1003",
        f"{path} = {fault['input']!r}{where} cannot be meant: {reason}",
        remedy=f"--set {next(example for example in EXAMPLES if example.startswith(path))}",
    )


def unknown_setting(path: str, where: str = "") -> UsageError:
    """The error for a key that does not exist, with the closest one that does."""
    guess = closest(path, setting_paths()) or closest(path.rpartition(".")[2], setting_paths())
    return UsageError(
        "ZI-1002",
        f"unknown setting {path!r}{where}" + (f": did you mean {guess!r}?" if guess else ""),
        remedy=f"--set {next(example for example in EXAMPLES if example.startswith(guess))}"
        if guess
        else "one of: " + ", ".join(setting_paths()),
    )
