"""A small HTTP/1.1 server for trio: h11 decides, this file does the reading and writing, everything with a limit.

Bodies of known length only: who gets fewer bytes than Content-Length said knows that something went wrong. Bytes of a
body go from the handler's buffer to the socket without a copy.
"""

from __future__ import annotations

import logging
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

import h11
import trio

from p2pnode.errors import NotListening

log = logging.getLogger(__name__)

MAX_HEAD = 16 << 10  # bytes of a request line and its headers; Nix sends 150
MAX_CONNECTIONS = 256  # Nix opens up to 25 (http-connections), and a machine has several users
HEAD_SECONDS = 15.0  # for one whole request head, from its first byte
IDLE_SECONDS = 120.0  # of a connection kept alive; curl drops its own after 118
WRITE_SECONDS = 120.0  # for one piece: a reader that takes no 256 KiB in this time has gone
WRITE_PIECE = 256 << 10
HEAD_GRACE = 1.0  # once no more connections are taken: how long a first or begun request may take to come in ...
WRITE_GRACE = 5.0  # ... and a reader to take a piece, before it is ended to make room for others
READ_SIZE = 16 << 10
BACKLOG = 128
READING = (b"GET", b"HEAD")  # methods that come without a body
WARN_SECONDS = 60.0  # between two lines that say that there is no room

Body = AsyncIterator[bytes | memoryview]


@dataclass(frozen=True, slots=True)
class Request:
    """`headers` by lower-case name; of repeated ones the last."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Response:
    """`body`: bytes, or pieces that add up to `length`; nothing of it is taken for HEAD."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | Body = b""
    length: int = -1

    @property
    def size(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.length


class Broken(Exception):
    """For a body's iterator to raise: the rest cannot be had, so the connection is broken. `str()` says why."""


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(eq=False)
class _Connection:
    stream: trio.SocketStream
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    since: float = math.inf  # when we began to wait for the client, if we do
    grace: float = 0.0  # how long it may let us wait while others cannot get in

    @property
    def overdue(self) -> float:
        """From when on it may be ended; never while it is us who keep the client waiting."""
        return self.since + self.grace


class Server:
    """Serves until cancelled. `handler` must not raise; should it do so all the same, the client is told 404.

    404 because that is an answer Nix can live with, and 500 is not: it repeats the request for 4.5 s and then fails.
    """

    def __init__(self, handler: Handler, *, max_connections: int = MAX_CONNECTIONS) -> None:
        self._handler = handler
        self._max = max_connections
        self._connections: set[_Connection] = set()
        self._entrance = trio.Lock()
        self._changed = trio.Event()
        self._looks_at = -math.inf  # when whoever waits for room looks again by itself
        self._quiet_until = -math.inf

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def run(
        self, host: str, port: int, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen; `task_status` gets the addresses as `HOST:PORT`. Raises NotListening."""
        try:
            listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
        except OSError as error:
            raise NotListening(f"the gateway cannot listen on {host}:{port}: {error.strerror or error}") from error
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept, listener, nursery)
            task_status.started([_name(listener.socket) for listener in listeners])

    async def _accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:  # out of descriptors, or gone before it was accepted
                    log.warning("gateway: a connection could not be accepted: %s", error.strerror)
                    await trio.sleep(0.1)
                    continue
                async with self._entrance:
                    try:
                        await self._room()
                    except trio.Cancelled:
                        stream.socket.close()
                        raise
                    connection = _Connection(stream)
                    self._connections.add(connection)
                nursery.start_soon(self._connection, connection)

    async def _room(self) -> None:
        """Until there is room for one more."""
        while len(self._connections) >= self._max and not self._make_room():
            self._looks_at = min(each.overdue for each in self._connections)
            with trio.move_on_at(self._looks_at):
                await self._changed.wait()
            self._looks_at = -math.inf

    def _make_room(self) -> bool:
        """End the connection that has kept us waiting for longest; False if none does so for too long.

        Clients that send half a request or read a byte a minute would otherwise keep Nix out for minutes.
        """
        now = trio.current_time()
        late = [each for each in self._connections if each.overdue <= now]
        if not late:
            return False
        worst = min(late, key=lambda each: each.since)
        if worst.grace and now >= self._quiet_until:
            self._quiet_until = now + WARN_SECONDS
            log.warning("gateway: all %d connections are taken; those whose clients are too slow are ended", self._max)
        worst.scope.cancel()
        self._connections.discard(worst)
        return True

    def _wait(self, connection: _Connection, grace: float) -> None:
        """From now on it is the client's turn."""
        connection.since, connection.grace = trio.current_time(), grace
        if connection.overdue < self._looks_at:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _connection(self, connection: _Connection) -> None:
        stream = connection.stream
        try:
            with connection.scope:
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._talk(connection)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the client went away
        except Exception:
            log.exception("gateway: a connection failed")
        finally:
            self._connections.discard(connection)
            self._wake()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.aclose_forcefully(stream)

    async def _talk(self, connection: _Connection) -> None:
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        while True:
            try:
                request = await self._request(connection, http)
            except h11.RemoteProtocolError as error:
                if http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    # h11 has 501 for transfer encodings that nobody uses: even then no 5xx, see `Server`.
                    status = error.error_status_hint if error.error_status_hint < 500 else 400
                    refusal = Response(status, (("Connection", "close"),), b"bad request\n")
                    await self._respond(connection, http, refusal, "GET")
                return
            if request is None:
                return
            try:
                response = await self._handler(request)
            except Exception:
                log.exception("gateway: %s %.200s failed", request.method, request.target)
                response = Response(404, (), b"not found\n")
            if not await self._respond(connection, http, response, request.method):
                return
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()

    async def _request(self, connection: _Connection, http: h11.Connection) -> Request | None:
        """The next request; None at the end of the connection. Raises h11.RemoteProtocolError."""
        head: h11.Request | None = None
        begun = False
        self._wait(connection, 0 if http.their_http_version else HEAD_GRACE)
        with trio.CancelScope(deadline=trio.current_time() + IDLE_SECONDS) as scope:
            while True:
                event = http.next_event()
                if head is not None and not isinstance(event, h11.EndOfMessage) and head.method not in READING:
                    return self._asked(connection, head)  # its body is not waited for: the answer does not depend on it
                if event is h11.NEED_DATA:
                    data = await connection.stream.receive_some(READ_SIZE)
                    if data and not begun:
                        begun = True
                        self._wait(connection, HEAD_GRACE)
                        scope.deadline = trio.current_time() + HEAD_SECONDS
                    http.receive_data(data)
                elif isinstance(event, h11.Request):
                    head = event
                elif isinstance(event, h11.Data):
                    raise h11.RemoteProtocolError("a request with a body", error_status_hint=413)
                elif isinstance(event, h11.EndOfMessage) and head is not None:
                    return self._asked(connection, head)
                else:  # h11.ConnectionClosed, h11.PAUSED
                    return None
        return None

    def _asked(self, connection: _Connection, head: h11.Request) -> Request:
        """From now on it is our turn."""
        connection.since = math.inf
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Request(head.method.decode("latin-1"), head.target.decode("latin-1"), headers)

    async def _respond(self, connection: _Connection, http: h11.Connection, response: Response, method: str) -> bool:
        """Whether all of it was sent."""
        headers = list(response.headers)
        if response.status != 304:  # which is about a body that the client has
            headers.append(("Content-Length", str(response.size)))
        head = http.send(h11.Response(status_code=response.status, headers=headers)) or b""
        if isinstance(response.body, bytes):
            data = b"" if method == "HEAD" or not response.body else http.send(h11.Data(data=response.body)) or b""
            end = http.send(h11.EndOfMessage()) or b""
            return await self._write(connection, head + data + end)
        async with aclosing(response.body) as pieces:  # type: ignore[type-var]
            if method == "HEAD":
                http.send(h11.EndOfMessage())
                return await self._write(connection, head)
            first = head
            try:
                async for piece in pieces:
                    # One write for the head and the first bytes: two would wait for each other's acknowledgement.
                    http.send_with_data_passthrough(h11.Data(data=piece))  # type: ignore[arg-type]
                    if first:
                        if not await self._write(connection, first + bytes(piece[:WRITE_PIECE])):
                            return False
                        piece = memoryview(piece)[WRITE_PIECE:]
                        first = b""
                    view = memoryview(piece)
                    for start in range(0, len(view), WRITE_PIECE):
                        if not await self._write(connection, view[start : start + WRITE_PIECE]):
                            return False
            except Broken as error:
                log.warning("gateway: a body is broken off: %s", error)
                return False
            if first and not await self._write(connection, first):
                return False
        http.send(h11.EndOfMessage())
        return True

    async def _write(self, connection: _Connection, data: bytes | memoryview) -> bool:
        if not data:
            return True
        self._wait(connection, WRITE_GRACE)
        with trio.move_on_after(WRITE_SECONDS) as scope:
            await connection.stream.send_all(data)
        connection.since = math.inf
        if scope.cancelled_caught:
            log.warning("gateway: a client took no data for %.0f s; it is disconnected", WRITE_SECONDS)
            return False
        return True


def _name(sock: trio.socket.SocketType) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
