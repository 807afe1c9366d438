"""Who may ask.  In: an address to listen on, a key, a request's header.  Out: a bound socket; yes or a refusal."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import socket

from zinfer.config.schema import Serve
from zinfer.errors import MachineError, UsageError
from zinfer.serving.refusal import Refusal

BACKLOG = 2048  # connections that the kernel holds until they are taken


def check_binding(serve: Serve) -> None:
    """Raises UsageError ZI-1171 for an address that others can reach and no key."""
    if serve.api_key is None and not is_loopback(serve.host):
        raise UsageError(
            "ZI-1171",
            f"{serve.host} can be reached by others, and no key is set",
            remedy="export ZINFER_SERVE_API_KEY=$(openssl rand -hex 24), or leave --host out",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(serve: Serve) -> socket.socket:
    """A listening socket; port 0 takes a free one.  Raises MachineError ZI-5352 where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            serve.host, serve.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named: asyncio sends small packets at once on such sockets alone, and 40 ms later on others.
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen(BACKLOG)
        except OSError:
            opened.close()
            raise
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        raise MachineError(
            "ZI-5352",
            f"{serve.host} port {serve.port} cannot be listened on: {error.strerror or error}",
            remedy="--port 0 takes a free one" if is_taken else "--host 127.0.0.1",
        ) from None
    return opened


def check_key(serve: Serve, authorization: str | None) -> None:
    """Raises Refusal 401 ZI-1174 unless the header carries the key; takes as long whichever byte differs."""
    if serve.api_key is None:
        return
    scheme, _, given = (authorization or "").partition(" ")
    expected = serve.api_key.get_secret_value().encode()
    is_right = hmac.compare_digest(given.strip().encode(), expected)
    if not is_right or scheme.lower() != "bearer":
        raise Refusal(
            401,
            "ZI-1174",
            "no key, or not the one this server was started with",
            remedy="curl -H 'Authorization: Bearer KEY' ...",
        )
