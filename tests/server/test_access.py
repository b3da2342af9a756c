"""Who may ask the server: hosts, origins and keys."""

from __future__ import annotations

import pytest

from mixbits.server.access import Access
from mixbits.server.errors import RequestError

pytest.importorskip("starlette")


def asked(access: Access, path: str = "/v1/models", **headers: str) -> int:
    """The status with which a request to 192.168.1.5 is refused, or 200."""
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "scheme": "http", "path": path, "headers": raw}
    try:
        access.check({**scope, "server": ("192.168.1.5", 8000)})
    except RequestError as error:
        return error.status
    return 200


def test_hosts() -> None:
    for host in (
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:8000",
        "[::1]:8000",
        "[::1]",
        "192.168.1.5",
    ):
        assert asked(Access(), host=host) == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::2]"):
        assert asked(Access(), host=host) == 403
    for host in ("10.0.0.1", "evil@localhost", "localhost evil", "[", "[::1", "0.0.0.0"):
        assert asked(Access(), host=host) == (200 if host == "[::1" else 403)
    assert asked(Access()) == 403  # none
    assert asked(Access(hosts=("my.name",)), host="My.Name:80") == 200
    assert asked(Access(hosts=("*",)), host="any.thing") == 200


def test_origins() -> None:
    page = "http://page.example"
    assert asked(Access(), host="localhost:80") == 200  # no page
    assert asked(Access(), host="localhost:80", origin="http://localhost:80") == 200
    for origin in (page, "null", "http://localhost:81", "https://localhost:80", "", "*"):
        assert asked(Access(), host="localhost:80", origin=origin) == 403
    assert asked(Access(origins=(page,)), host="localhost", origin=page) == 200
    assert asked(Access(origins=(page,)), host="localhost", origin="http://other") == 403
    assert asked(Access(origins=("*",)), host="localhost", origin="http://other") == 200


def test_keys() -> None:
    access = Access(key="sécret")
    good = "Bearer sécret"
    assert asked(access, host="localhost", authorization=good) == 200
    assert asked(access, host="localhost", authorization="bearer  sécret") == 200
    assert asked(access, "/health", host="localhost") == 200
    for wrong in ("", "Bearer", "Bearer x", "Basic sécret", "sécret", "Bearer sécretx"):
        assert asked(access, host="localhost", authorization=wrong) == 401
    assert asked(access, host="localhost") == 401
