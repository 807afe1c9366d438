"""Whether this installation can serve.  In: nothing.  Out: nothing, or one error that says what to install."""

from __future__ import annotations

from zinfer.errors import MachineError


def need_extra() -> None:
    """Raises MachineError ZI-5351 where a package of the extra `serve` is not there."""
    try:
        import h11  # noqa: F401
        import orjson  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MachineError(
            "ZI-5351", f"serving needs {error.name}, which is not there", remedy="pip install 'zinfer[serve]'"
        ) from None
