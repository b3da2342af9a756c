"""Who may ask. A page in a browser on this machine reaches its ports: so not any page.

The name of the Host header is looked at, as a page may have its own name lead here (DNS
rebinding), and so is Origin, which browsers send along with what a page of another origin asks.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import RequestError, shortened

ANY = "*"
_LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Access:
    """hosts: names that Host may have beside this machine's own; origins: of pages that may ask;

    key: what `Authorization: Bearer` must hold. "*" allows any host, or origin.
    """

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    key: str | None = None

    def check(self, scope: Scope) -> None:
        """Raises RequestError for who may not."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        local = str((scope.get("server") or ("",))[0])  # at which the connection came in
        for host in hosts or [""]:
            self._check_host(host, local)
        for origin in headers.getlist("origin"):
            self._check_origin(origin, [f"{scope['scheme']}://{host}" for host in hosts])
        if self.key is not None and scope["path"] != "/health":
            self._check_key(headers.get("authorization", ""), self.key)

    def _check_host(self, host: str, local: str) -> None:
        name = _name_of(host)
        allowed = {*_LOCAL, *map(_plain, self.hosts), _plain(local)}
        if ANY not in self.hosts and name not in allowed:
            raise RequestError(
                403,
                f"this server is not called {shortened(name)}: --allow-host would allow the name",
                code="host_not_allowed",
            )

    def _check_origin(self, origin: str, own: Sequence[str]) -> None:
        if ANY in self.origins or origin in self.origins or origin in own:
            return
        raise RequestError(
            403,
            f"pages of {shortened(origin)} may not ask this server: --allow-origin would allow it",
            code="origin_not_allowed",
        )

    def _check_key(self, authorization: str, key: str) -> None:
        kind, _, given = authorization.partition(" ")
        same = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
        if kind.lower() != "bearer" or not same:
            raise RequestError(
                401,
                "an API key is required: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Guard:
    """Middleware: what may not ask is answered here."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._access.check(scope)
        except RequestError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _name_of(host: str) -> str:
    """The name in name:port, [::1]:port or either without a port."""
    if host.startswith("["):
        name, _, _ = host[1:].partition("]")
    else:
        name, _, _ = host.partition(":")
    return _plain(name)


def _plain(name: str) -> str:
    """One writing of a name or address."""
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name.lower()
