"""Compile the kernels for this processor.  In: the C files beside this one.  Out: a shared library, kept.

A compiler is not asked of anybody: where there is none, torch does the work.  The library lies in zinfer's cache
folder under a name that says what it was made of, so that another processor, compiler or version makes its own.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from zinfer.config.load import cache_folder
from zinfer.config.profiles import fingerprint
from zinfer.log import logger

_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC", "-pthread")
_TIMEOUT_S = 60
_OTHERS_WRITE = 0o022


def library(sources: Sequence[str], more_flags: Sequence[str], folder: Path | None = None) -> Path | None:
    """What `sources` (C files here, and what they include) compile to, in `folder` (None: the cache), made if it is
    not there; None where it cannot be."""
    command = compiler()
    if command is None or platform.system() != "Linux":
        return None
    folder = cache_folder() / "native" if folder is None else folder
    command = (*command, *_FLAGS, *more_flags)
    path = folder / f"{Path(sources[0]).stem}-{_digest(command, sources)}.so"
    failed = path.with_suffix(".failed")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            logger.warning("others may write to %s: torch replaces the compiled kernels", folder)
            return None
        if not path.is_file() and not failed.is_file():
            _compile(command, sources, path, failed)
    except OSError as error:
        logger.warning("no kernels were compiled (%s): slower torch code replaces them", error)
    return path if path.is_file() else None


def compiler() -> tuple[str, ...] | None:
    """The command of a C compiler: the system's, or the one that the package ziglang carries."""
    for name in _COMPILERS:
        if found := shutil.which(name):
            return (found,)
    with suppress(metadata.PackageNotFoundError):
        metadata.version("ziglang")
        return (sys.executable, "-m", "ziglang", "cc")
    return None


def _compile(command: tuple[str, ...], names: Sequence[str], path: Path, failed: Path) -> None:
    """Whole or not at all, whoever else compiles the same now; a compiler that cannot is not asked twice."""
    sources = [str(_here() / name) for name in names if name.endswith(".c")]
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        words = [*command, "-o", str(made), *sources, "-lm"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            told = done.stderr if done.returncode else ""
        except subprocess.TimeoutExpired:
            told = f"took more than {_TIMEOUT_S} s"
        if told or not made.is_file():
            logger.warning("%s cannot compile the kernels: slower torch code replaces them", command[0])
            failed.write_text(told, encoding="utf-8")
            return
        made.replace(path)


def _digest(command: tuple[str, ...], names: Sequence[str]) -> str:
    """Of all that the library depends on."""
    digest = hashlib.sha256()
    for name in names:
        digest.update((_here() / name).read_bytes())
    told = (*command, fingerprint(), *_processor())
    digest.update("\n".join(told).encode())
    return digest.hexdigest()[:16]


def _processor() -> tuple[str, ...]:
    """What the processor can do, as the kernel lists it: a folder may be shared by machines."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return (line,)
    return (platform.machine(),)


def _is_ours(folder: Path) -> bool:
    """Code that others could have put there is not run."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & _OTHERS_WRITE


def _here() -> Path:
    return Path(__file__).parent
