"""Where servers listen, and which Host headers they answer."""

from __future__ import annotations

import argparse
import socket

import pytest

from odise_rt import OptionsError
from odise_rt.listening import (
    add_listening_arguments,
    answered_hosts,
    is_answered,
    is_loopback,
    listen,
    server_url,
)


def test_takes_a_free_port_or_says_why_not() -> None:
    with listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert server_url(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(OptionsError, match=f"cannot listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("host", "port"),
    [
        ("127.0.0.1", 99_999),
        ("127.0.0.1", -1),
        ("203.0.113.7", 0),
        ("no-such-host.invalid", 0),
        ("256.1.1.1", 0),
        ("a..b", 0),
        ("label" * 20, 0),
        ("nul\0l", 0),
    ],
)
def test_addresses_that_cannot_be_used(host: str, port: int) -> None:
    with pytest.raises(OptionsError, match=r"cannot listen|expected 0 to 65535"):
        listen(host, port)


def test_ipv6_where_there_is_one() -> None:
    if not socket.has_ipv6:
        pytest.skip("Requires: IPv6")
    try:
        with listen("::1", 0) as listener:
            assert is_loopback(listener)
            assert server_url(listener).startswith("http://[::1]:")
    except OptionsError:
        pytest.skip("Requires: an IPv6 loopback address")


def test_on_loopback_own_names_are_answered() -> None:
    with listen("127.0.0.1", 0) as listener:
        assert answered_hosts(listener, "127.0.0.1", ("Demo.Example",)) == ("localhost", "127.0.0.1", "demo.example")


def test_name_of_a_loopback_address_is_answered_and_no_other() -> None:
    """As /etc/hosts gives a machine's own name the address 127.0.1.1."""
    with listen("127.0.1.1", 0) as listener:
        assert answered_hosts(listener, "Workstation", ()) == ("localhost", "workstation")


def test_elsewhere_all_names_are_answered_unless_some_are_given() -> None:
    with listen("0.0.0.0", 0) as listener:
        assert not is_loopback(listener)
        assert answered_hosts(listener, "0.0.0.0", ()) == ()
        assert answered_hosts(listener, "0.0.0.0", ("demo.example",)) == ("localhost", "0.0.0.0", "demo.example")


def test_host_headers() -> None:
    hosts = ("localhost", "seg.example")
    for header in ("localhost:8000", "LOCALHOST", "seg.example"):
        assert is_answered(header, hosts), header
    for header in ("evil.example", "localhost.evil.example", "", "127.0.0.1.evil.example:8000", "[::1].evil.example"):
        assert not is_answered(header, hosts), header
    assert is_answered("evil.example", ())


@pytest.mark.parametrize("header", ["127.0.0.1", "10.1.2.3:8000", "[::1]:8000", "[fd00::7]"])
def test_addresses_are_always_answered(header: str) -> None:
    """Probes name a pod by its address; no page can make an address lead to another server."""
    assert is_answered(header, ("seg.example",))


def test_arguments() -> None:
    parser = argparse.ArgumentParser()
    add_listening_arguments(parser, port=7860)
    assert vars(parser.parse_args([])) == {"host": "127.0.0.1", "port": 7860, "allow_host": []}
    assert parser.parse_args(["--allow-host", "a", "--allow-host", "b"]).allow_host == ["a", "b"]
