"""From a port to a served application: sockets, slow clients, and the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
from types import FrameType
from typing import Any

from starlette.applications import Starlette

from mara_integrations.errors import ConfigError, MissingExtraError
from mara_integrations.server.errors import RefusalError
from mara_integrations.server.limits import Admission

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise MissingExtraError("serving needs uvicorn", hint="pip install 'mara-integrations[serve]'") from error

# Seconds in which the headers of a request have to arrive.
HEADER_TIMEOUT_S = 10.0
# Seconds for which an idle connection is kept; proxies and clients reuse theirs for about as long.
_KEEP_ALIVE_S = 60
# Seconds for replies that were told to stop, whose threads finish their step.
_STOPPING_S = 10.0
_BACKLOG = 2048
_log = logging.getLogger(__name__)


def bind(host: str, port: int) -> list[socket.socket]:
    """Open the sockets to listen on, one for each address of the host. Connections wait until `serve` takes them.

    Args:
        host: Name or address.
        port: 0 takes a free one.

    Raises:
        ConfigError: If the host is unknown, or the port is in use or not allowed.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError):
        hint = "127.0.0.1 is this machine alone, 0.0.0.0 all of its addresses"
        raise ConfigError(f"host {host!r} is not known here", hint=hint) from None
    sockets: list[socket.socket] = []
    try:
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            if sockets and port == 0:  # a name of two addresses has one port
                address = (address[0], port_of(sockets), *address[2:])
            try:
                sockets.append(socket.create_server(address, family=family, backlog=_BACKLOG))
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    continue  # a machine without IPv6 still resolves ::1 by name
                raise
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise _no_socket(host, port, error) from None
    if not sockets:
        raise ConfigError(f"host {host!r} is not an address of this machine")
    return sockets


def _no_socket(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} of {host} is in use", hint="stop the other program, or take another --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"port {port} of {host} is not allowed", hint="ports below 1024 are the administrator's")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(f"host {host!r} is not an address of this machine")
    return ConfigError(f"port {port} of {host} can't be opened: {error.strerror or error}")


def port_of(sockets: list[socket.socket]) -> int:
    """Return the port that the sockets listen on."""
    port: int = sockets[0].getsockname()[1]
    return port


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches the host, as far as its name tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(app: Starlette, sockets: list[socket.socket]) -> None:
    """Serve an application of `create_app` until the process is told to stop; see `Server`.

    Returns after Ctrl-C; after SIGTERM the process ends by that signal.
    """
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signals again that it has handled
        Server(app).run(sockets)


class Server(uvicorn.Server):
    """A web server for an application of `create_app`.

    The first Ctrl-C or SIGTERM takes no more requests and waits for the replies that are running; a second Ctrl-C stops
    them.

    Args:
        app: The application.
        header_timeout_s: Seconds in which the headers of a request have to arrive.
    """

    def __init__(self, app: Starlette, *, header_timeout_s: float = HEADER_TIMEOUT_S) -> None:
        protocol = type("_Protocol", (_ImpatientProtocol,), {"header_timeout_s": header_timeout_s})
        settings: dict[str, Any] = {"ws": "none", "lifespan": "off", "log_config": None, "access_log": False}
        settings.update(server_header=False, timeout_keep_alive=_KEEP_ALIVE_S)
        super().__init__(uvicorn.Config(app, http=protocol, **settings))
        self._admission: Admission = app.state.admission
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop after the replies that are running; on a second Ctrl-C stop at once."""
        is_first = not self.should_exit
        super().handle_exit(sig, frame)
        count = self._admission.num_running
        replies = f"{count} {'reply' if count == 1 else 'replies'}"
        if self.force_exit:
            _log.warning("stopping %s", replies)
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._drop_connections)
        elif count and is_first:
            which = "it" if count == 1 else "them"
            again = f"; press Ctrl-C again to stop {which}" if sig == signal.SIGINT else ""
            _log.warning("waiting for %s%s", replies, again)

    def _drop_connections(self) -> None:
        """Close all connections at once; whoever answers on one notices, and stops the generation."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the replies that are running; after a second Ctrl-C only for their ends."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(list(self.server_state.tasks), timeout=_STOPPING_S)


class _ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit on headers, and its own errors in our form.

    uvicorn waits for ever for the rest of a request's headers, and for the rest of a body that nobody reads.
    """

    header_timeout_s = HEADER_TIMEOUT_S
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take in data; the wait ends when they complete a request's headers."""
        super().data_received(data)
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the wait."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer data that is not an HTTP request."""
        body = RefusalError(400, msg).as_bytes()
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            self.transport.close()
