"""Connections: how many, for how long, and how the process ends.

uvicorn waits for ever for half a request, answers what is no HTTP in its own words, and ends when
the last client has gone. Here everything has a limit of time, and a signal ends the process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import UsageError
from .errors import RequestError

CONNECTIONS = 512
REQUEST_SECONDS = 15.0  # from its first byte to the end of its headers
IDLE_SECONDS = 30
WRITE_SECONDS = 60.0  # that a client may leave unread what waits for it
LINGER_SECONDS = 2.0  # for a client that still sends to read why it is refused
HEADER_BYTES = 64 << 10
GRACE_SECONDS = 3  # for answers, once the process is to end
END_SECONDS = 10.0  # when it ends, whatever hangs


class Protocol(H11Protocol):
    """One connection."""

    _waiting: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            self._refuse(RequestError(503, f"{CONNECTIONS} connections are open already"))
        else:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_refused or self._has_whole_request():
            return  # a second request before the first is answered: its client has to send it again
        super().data_received(data)
        if self._is_answering():
            self._stop_waiting()
        elif not self.transport.is_closing():
            self._wait()
        if self._has_whole_request() and self.conn.trailing_data[0]:
            self.cycle.keep_alive = False
            self.flow.resume_reading()  # else it would not be seen that the client leaves

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _has_whole_request(self) -> bool:
        return self._is_answering() and not self.cycle.more_body

    # --- limits of time --------------------------------------------------------------------------

    def _wait(self) -> None:
        """A request has begun, and must be here in time."""
        if self._waiting is None and not self._is_refused:
            self._waiting = self.loop.call_later(REQUEST_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        said = f"the request has not arrived within {REQUEST_SECONDS:g} s"
        self._refuse(RequestError(408, said))

    def timeout_keep_alive_handler(self) -> None:
        with suppress(h11.LocalProtocolError):
            super().timeout_keep_alive_handler()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def shutdown(self) -> None:
        with suppress(h11.LocalProtocolError):
            super().shutdown()
        if not self._is_answering():
            self.transport.close()

    # --- what is no request ----------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        most = HEADER_BYTES >> 10
        said = f"this is no HTTP/1.1 request with at most {most} KB of headers"
        self._refuse(RequestError(400, said))

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close when the client has had time to read it."""
        self._is_refused = True
        self._stop_waiting()
        if self._is_answering():
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = error.response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            reason = HTTPStatus(error.status).phrase.encode()
            events = (
                h11.Response(status_code=error.status, headers=headers, reason=reason),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            if self.transport.can_write_eof():
                self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


class Server(uvicorn.Server):
    """uvicorn's server, ended by SIGINT and SIGTERM with exit code 0, or by `stop`."""

    def __init__(
        self, app: Any, on_start: Callable[[], object], on_end: Callable[[], object]
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                h11_max_incomplete_event_size=HEADER_BYTES,
            )
        )
        self._on_start, self._on_end = on_start, on_end
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if not self.should_exit:
            self._on_start()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but for good: a late signal must not end the process in its own way."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets answers in flight end in an error; the second waits for nothing."""
        if self.should_exit:
            self.force_exit = True
            return
        last = threading.Timer(END_SECONDS, os._exit, (0,))
        last.daemon = True
        last.start()
        self.stop()

    def stop(self) -> None:
        """From any thread."""
        self.should_exit = True
        if self._loop is not None:
            with suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(self._on_end)


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets of a host's addresses, which do not listen yet. Raises UsageError."""
    bound: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            made = socket.socket(family, kind, protocol)
            bound.append(made)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = bound[0].getsockname()[1] if len(bound) > 1 else port
            made.bind((address[0], chosen, *address[2:]))
    except (OSError, OverflowError) as error:
        for made in bound:
            made.close()
        raise UsageError(f"cannot listen at {host}, port {port}: {error}") from error
    return bound


def url(host: str, bound: Sequence[socket.socket]) -> str:
    """Where clients find what is bound."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound[0].getsockname()[1]}"
