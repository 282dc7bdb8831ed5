"""The process that serves: its socket, its signals, and its end."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma2_jax.command_line import EXIT_INTERRUPTED
from gemma2_jax.inference.service import Service

STALLED_SECONDS = 60  # after which a client that takes nothing of what waits for it is cut off
HEADER_SECONDS = 30  # that the first line and headers of a request may take to come
_KEEP_ALIVE_SECONDS = 30
_READ_SECONDS = 5  # that clients have for the end of their answers when all are written
_POLL_SECONDS = 0.05
_CLOSING = "the server is shutting down"


def open_socket(host: str, port: int) -> socket.socket:
    """A socket at this address, which does not listen yet. Port 0 is any that is free. Raises ValueError."""
    opened = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        if opened:
            opened.close()
        raise ValueError(
            f"the server cannot listen on {host}:{port} ({error.strerror or error}); give another --host or --port"
        ) from error
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_SECONDS * 1000)
    return opened


def serve(app: FastAPI, service: Service, opened: socket.socket, *, grace: float, announce: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C: new requests are refused then, and those under way have `grace` seconds.

    A second Ctrl-C ends the process at once. Raises ValueError where the engine has failed.
    """
    asyncio.run(serve_until_told(make_server(app), service, opened, grace=grace, announce=announce))
    if service.has_failed:
        raise ValueError("the engine has failed, as said above; start the server again")


def make_server(app: FastAPI, *, header_seconds: float = HEADER_SECONDS) -> uvicorn.Server:
    """The HTTP server of an application. A connection whose headers take longer than `header_seconds` is closed."""

    class Protocol(_TimedProtocol):
        seconds = header_seconds

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            log_config=None,  # Python prints warnings and errors by itself
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_READ_SECONDS,
        )
    )


class _TimedProtocol(H11Protocol):
    """uvicorn's protocol, with a limit on the time that the headers of a request may take."""

    seconds: float
    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Begins to wait for headers, unless it does so already; ends where a request is under way."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._limit is None:
            self._limit = self.loop.call_later(self.seconds, self.transport.close)

    def _stop(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


async def serve_until_told(
    server: uvicorn.Server,
    service: Service,
    opened: socket.socket,
    *,
    grace: float,
    announce: Callable[[], None],
) -> None:
    """Serves until SIGTERM, Ctrl-C or an error of the engine; `announce` is called when requests are taken."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    service.start()
    serving = asyncio.create_task(server.serve([opened]))
    while not (server.started or serving.done()):
        await asyncio.sleep(_POLL_SECONDS)
    for number in (signal.SIGTERM, signal.SIGINT):  # in place of uvicorn's handlers
        loop.add_signal_handler(number, _take_signal, number, told)
    announce()
    while not (told.is_set() or serving.done() or service.has_failed):
        await asyncio.sleep(_POLL_SECONDS)
    service.close(_CLOSING)
    deadline = loop.time() + grace
    while not service.is_idle and loop.time() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    await asyncio.to_thread(service.end, _CLOSING)
    server.should_exit = True
    await serving


def _take_signal(number: signal.Signals, told: asyncio.Event) -> None:
    if told.is_set() and number == signal.SIGINT:
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)
    again = "; once more, and it ends at once" if number == signal.SIGINT else ""
    print(f"{number.name}: requests under way are finished, and no others are taken{again}", file=sys.stderr)
    told.set()
