"""A server from its first connection to the end of its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Generator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from kvsieve.errors import ArgumentError
from kvsieve.serve.access import is_loopback

if TYPE_CHECKING:
    from kvsieve.serve.service import Service

__all__ = ["Server", "address_of", "bound"]

AFTER_GRACE = 5.0
"""Seconds that connections have to be told of answers that were cut."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound(host: str, port: int, *, keys: bool) -> socket.socket:
    """A socket at ``host`` and ``port`` that does not listen yet; port 0 is a free one.

    Raises:
        ArgumentError: for an address that others reach, where no key is asked for, and for one that is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"there is no address {host}: {error}") from error
    family, kind, protocol, _, address = found[0]
    if not keys and not is_loopback(str(address[0])):
        raise ArgumentError(
            f"{host} can be reached by others: ask for a key (--api-key-file, or KVSIEVE_API_KEY), or serve 127.0.0.1"
        )
    made = socket.socket(family, kind, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise ArgumentError(f"cannot serve {host} port {port}: {error.strerror or error}") from error
    return made


def address_of(host: str, port: int) -> str:
    """What clients call a server."""
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


class Server(uvicorn.Server):
    """Serves an app, and closes the service with it.

    At the first signal nothing new is taken, and what is being answered has ``grace`` seconds; a second signal ends that.

    Args:
        app: over ``service``.
        ready: a line that is printed once it listens.
        access_log: a line for each request: address, path and status.
    """

    def __init__(self, app: Any, service: Service, *, grace: float = 10.0, ready: str = "", access_log: bool = False) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="info" if access_log else "warning",
            access_log=access_log,
            server_header=False,
            timeout_graceful_shutdown=int(grace + AFTER_GRACE),
        )
        super().__init__(config)
        self._service, self._grace, self._ready = service, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once: from now on it listens."""
        await super().startup(sockets)
        if self._ready:
            print(self._ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called once, when it is to end: the model thread finishes while connections do."""
        closing = asyncio.create_task(asyncio.to_thread(self._service.close, self._grace))
        try:
            await super().shutdown(sockets)
        finally:
            if self.force_exit:
                await asyncio.to_thread(self._service.close, 0)
            await closing

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """A signal is what ends a server, and no failure: the process goes on behind it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
