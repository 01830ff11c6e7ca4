"""Where a server listens, to which names it answers, and what its log leaves out.

A web page from elsewhere may give its own name the address 127.0.0.1: to a browser on this machine it is then of one
origin with a server there (DNS rebinding). Its requests carry that name in the header Host. An address there cannot be
made to lead elsewhere, so addresses, by which probes and people on this machine come, are always answered.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Collection, Iterable

from odise_rt.errors import OptionsError

DEFAULT_HOST = "127.0.0.1"
WRONG_HOST = "this server does not answer to that Host; start it with --allow-host NAME"
_BACKLOG = 512
_PORT = re.compile(r":[0-9]*$")


def add_listening_arguments(parser: argparse._ActionsContainer, port: int) -> None:
    """Add ``--host``, ``--port`` with its default, and ``--allow-host``."""
    parser.add_argument(
        "--host",
        default=DEFAULT_HOST,
        help=f"Address to listen on. Default: {DEFAULT_HOST}, this machine alone; 0.0.0.0 lets everybody in who can "
        "reach it.",
    )
    parser.add_argument("--port", type=int, default=port, help="Port; 0 takes a free one.")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="Answer requests to this Host, besides addresses, localhost and the name in --host. May be repeated. "
        "Default: on a loopback address no other name, elsewhere all names.",
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        OptionsError: the address is unknown, not this machine's, or taken.
    """
    if not 0 <= port <= 65_535:
        raise OptionsError(f"port is {port}: expected 0 to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, ValueError) as exc:  # ValueError: no name that could be looked up
        raise OptionsError(
            f"cannot listen on {host}, port {port} ({getattr(exc, 'strerror', None) or exc}): choose another with "
            "--host and --port; --port 0 takes a free one"
        ) from exc


def server_url(listener: socket.socket) -> str:
    """The address of a server for people and programs."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def answered_hosts(listener: socket.socket, host: str, allowed: Iterable[str]) -> tuple[str, ...]:
    """The names that a server answers to besides addresses, in lower case. If there are none, it answers to all.

    Args:
        listener: the server's socket.
        host: the address that it was told to listen on.
        allowed: further names. Without any, a server on another address than a loopback one answers to all.
    """
    names = tuple(allowed)
    if not names and not is_loopback(listener):
        return ()
    return tuple(dict.fromkeys(name.lower() for name in ("localhost", host, *names)))


def is_answered(header: str, hosts: Collection[str]) -> bool:
    """Whether the Host header of a request is an address or one of :func:`answered_hosts`, on whatever port."""
    name = _PORT.sub("", header).strip("[]").lower()
    return not hosts or name in hosts or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_no_cut(record: logging.LogRecord) -> bool:
    """A filter for uvicorn's log that drops the tracebacks of requests that were cut because the server stops."""
    cut = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cut and not record.getMessage().rstrip().endswith("CancelledError")
