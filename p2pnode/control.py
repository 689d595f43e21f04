"""The control socket: how commands reach the daemon that holds their home.

JSON lines over a Unix stream socket of mode 0600 inside the home (mode 0700); the file system is the access control.
One request per connection:

    -> {"op": "fetch", "args": {"spec": "p2pnode:...", "out": "/abs/path", ...}}
    <- {"progress": {"phase": "...", "done": 0, "total": 0, "peers": 0, "note": ""}}     any number of these
    <- {"result": {...}}                                                                 one per result object
    <- {"done": true}        or, instead,        {"error": {"error": "NotFound", "message": "...", "exit_code": 3}}

A client that goes away, or half-closes, cancels its operation. A malformed request is answered with an error. Paths in
requests are absolute: the daemon has another working directory.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from p2pnode.config import SIGNATURE_POLICIES
from p2pnode.errors import ConfigError, StoreError, UsageError
from p2pnode.failures import describe
from p2pnode.link import MAX_PEERS
from p2pnode.progress import Progress, Report

log = logging.getLogger(__name__)

MAX_REQUEST = 256 << 10  # bytes; a link of 32 KiB and a few paths of 4 KiB fit even when every character is escaped
MAX_CLIENTS = 64
MAX_KEYS = 64
MAX_PATHS = 1000  # of one request: MAX_REQUEST holds them at their longest
REQUEST_TIMEOUT = 10.0  # s for a client to send its request after it connected
PROGRESS_INTERVAL = 0.25  # s
ACCEPT_PAUSE = 0.5  # s, when the process is out of file descriptors
DEFAULT_TIMEOUT = 60.0  # s without any progress after which a fetch gives up
MAX_TIMEOUT = 30 * 86400.0
MAX_SOCKET_PATH = 107  # bytes: sockaddr_un has 108 with the final NUL, see unix(7)

Result = dict[str, Any]
Tell = Callable[[Result], Awaitable[None]]
"""Takes results as they come, from any number of tasks."""


class NodeAPI(Protocol):
    """What commands can ask of a running node (`p2pnode.node.Node`). All values returned fit into JSON.

    Errors are `NodeError`s. Every method may be cancelled. `report` may be called from any thread.
    """

    async def provide(
        self, path: str, *, kind: str | None, name: str | None, report: Report, sign_keys: Sequence[str] = ()
    ) -> Result:
        """Import `path` and serve it from now on; `sign_keys`: files of keys to sign store paths with.

        {"image", "link", "kind", "name", "bytes", "new_bytes", "chunks", "seconds"}, as soon as it is being served.
        """

    async def publish(
        self,
        cache: str,
        *,
        paths: Sequence[str],
        name: str | None,
        report: Report,
        tell: Tell,
        sign_keys: Sequence[str] = (),
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> None:
        """Import what the binary cache at a URL or absolute path holds, or the closures of `paths` in it, and serve it.

        `tell` gets images as `provide` returns them, {"path", "error", "message", "exit_code"} for what could not be
        published, and {"path", "warning"}.
        """

    async def fetch(
        self,
        spec: str,
        *,
        out: str | None,
        force: bool,
        keep_chunks: bool,
        timeout: float,
        peers: Sequence[str],
        report: Report,
        into_store: bool = False,
        add_root: str | None = None,
        to_cache: str | None = None,
        sign_keys: Sequence[str] = (),
        require_signatures: str | None = None,
        trusted_keys: Sequence[str] = (),
    ) -> Result:
        """Get an image by link or id, asking `peers` (multiaddresses) too; give up after `timeout` s of no progress.

        It goes to `out`, into the Nix store, kept by the link `add_root`, or to the binary cache `to_cache`, which
        the keys in the files `sign_keys` sign.

        {"image", "path", "bytes", "received_bytes", "duplicate_bytes", "from": {peer: bytes}, "banned": [peer],
        "relayed_bytes", "connections": {peer: {"path": "direct" or "relayed", "direct_after": seconds or None}},
        "seconds"}; with `into_store` also "store": {"added", "present", "root"}, with `to_cache` "cache": {"added",
        "present", "path"}, counting store paths.
        """

    async def mirror(self, things: Sequence[str], *, timeout: float, report: Report) -> list[Result]:
        """Keep complete, pinned copies of images (links, ids) and of all that publishers (peer ids, addresses) list.

        Per image the result of `fetch` with "mirror" and "pinned", or {"mirror", "image", "error", "message",
        "exit_code"}, without "image" if it is not about one.
        """

    async def mirrors(self) -> list[Result]:
        """What is mirrored, as `local.mirrors` gives it."""

    async def stop_mirror(self, thing: str) -> Result:
        """Mirror one thing no longer: what `mirrors` said of it."""

    async def pin(self, spec: str) -> Result:
        """Let an image be kept: {"image", "name", "pinned"}."""

    async def unpin(self, spec: str) -> Result:
        """Undo `pin`."""

    async def images(self) -> list[Result]:
        """Every image known here, as `local.images` gives them."""

    async def show(self, spec: str) -> Result:
        """One image, as `local.show` gives it."""

    async def verify(self, spec: str, report: Report) -> Result:
        """Read one image again, as `local.verify`. Raises `VerificationFailed` when it is damaged."""

    async def remove(self, spec: str) -> Result:
        """Forget one image: {"image", "name", "freed_bytes"}."""

    async def status(self) -> Result:
        """How the node is: {"peer_id", "addrs", "uptime" s, "peers", "store": {...}, "mirrors": [...] (in short),
        "problems": [...], ...}."""

    async def peers(self) -> list[Result]:
        """{"peer", "addr", "direction", "seconds", "rtt" s or null, "received_bytes", "sent_bytes"} per peer."""

    async def doctor(self, target: str | None, report: Report) -> Result:
        """Look at this node, a peer or an image: {"target", "ok", "exit_code", "seconds", "steps": [{"step", "mark":
        "ok", "warn" or "FAIL", "ms", "text", "peer", "facts"}], "causes": [{"code", "problem", "text", "advice",
        "peer"}]}."""


async def serve(path: Path, node: NodeAPI, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Answer commands on the socket at `path` until cancelled. Started (`task_status`) once clients can connect.

    Whoever calls this holds the home's lock, so a socket that is there already is a dead node's and is replaced.
    Raises `ConfigError` when the path is too long for a socket, `StoreError` when it cannot be made.
    """
    with _listen(path) as listener:
        try:
            limit = trio.CapacityLimiter(MAX_CLIENTS)
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    stream = await _accept(listener)
                    nursery.start_soon(_serve_client, stream, node, limit)
        finally:
            path.unlink(missing_ok=True)


def _listen(path: Path) -> trio.socket.SocketType:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the home's path is too long for its control socket {path} (at most {MAX_SOCKET_PATH} bytes); "
            "give a shorter --home"
        )
    listener = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
    try:
        if path.is_socket():
            path.unlink()
        # Bound under umask 077, so that there is no instant in which others could connect.
        before = os.umask(0o177)
        try:
            _bind(listener, path)
        finally:
            os.umask(before)
        listener.listen(MAX_CLIENTS)
    except OSError as exc:
        listener.close()
        raise StoreError(f"the control socket {path} cannot be made: {exc.strerror}") from exc
    return listener


def _bind(listener: trio.socket.SocketType, path: Path) -> None:
    """Bind without a checkpoint: trio's own bind() may yield, and the umask is the whole process's."""
    with socket.fromfd(listener.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as same:
        same.bind(os.fspath(path))


async def _accept(listener: trio.socket.SocketType) -> trio.SocketStream:
    while True:
        try:
            accepted, _ = await listener.accept()
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ECONNABORTED):
                raise
            log.warning("control: %s", exc)
            await trio.sleep(ACCEPT_PAUSE)
        else:
            return trio.SocketStream(accepted)


async def _serve_client(stream: trio.SocketStream, node: NodeAPI, limit: trio.CapacityLimiter) -> None:
    """One client, whose faults and whose operation's faults end here."""
    try:
        async with stream, limit:
            await _Client(stream, node).run()
    except* (trio.BrokenResourceError, trio.ClosedResourceError):
        log.debug("control: a client went away")
    except* Exception:  # the top of this task: one client must not take the daemon with it
        log.exception("control: serving a client failed")


class _Client:
    """One connection: its request, the operation, and its answers in order."""

    def __init__(self, stream: trio.SocketStream, node: NodeAPI) -> None:
        self._stream = stream
        self._node = node
        self._latest: Progress | None = None
        self._sending = trio.Lock()  # answers and progress share the stream

    async def run(self) -> None:
        try:
            operation, args = await self._request()
        except UsageError as exc:
            await self._send({"error": describe(exc).to_dict()})
            return
        answers: list[dict[str, Any]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            nursery.start_soon(self._send_progress)
            answers = await self._perform(operation, args)
            nursery.cancel_scope.cancel()
        for answer in answers:
            await self._send(answer)

    async def _request(self) -> tuple[str, dict[str, Any]]:
        buffer = bytearray()
        with trio.move_on_after(REQUEST_TIMEOUT) as scope:
            while b"\n" not in buffer:
                if len(buffer) > MAX_REQUEST:
                    raise UsageError(f"the request is longer than {MAX_REQUEST} bytes")
                data = await self._stream.receive_some(64 << 10)
                if not data:
                    raise UsageError("the request is incomplete")
                buffer += data
        if scope.cancelled_caught:
            raise UsageError(f"no request came within {REQUEST_TIMEOUT:.0f} s")
        line, _, rest = buffer.partition(b"\n")
        if rest or len(line) > MAX_REQUEST:
            raise UsageError("a connection carries one request of one line")
        return parse_request(bytes(line))

    async def _perform(self, operation: str, args: dict[str, Any]) -> list[dict[str, Any]]:
        try:
            if _OPERATIONS[operation].streams:
                args = {**args, "tell": self._tell}
            results = await _OPERATIONS[operation].call(self._node, args, self._report)
        except Exception as exc:
            failure = describe(exc)
            if failure.internal:
                log.error("control: %s failed", operation, exc_info=exc)
            return [{"error": failure.to_dict()}]
        return [*({"result": result} for result in results), {"done": True}]

    async def _tell(self, result: Result) -> None:
        try:
            await self._send({"result": result})
        except trio.BrokenResourceError:
            await trio.sleep_forever()  # `_cancel_when_gone` is about to end the operation

    def _report(self, progress: Progress) -> None:
        self._latest = progress  # a single assignment, so any thread may report

    async def _send_progress(self) -> None:
        while True:
            await trio.sleep(PROGRESS_INTERVAL)
            progress, self._latest = self._latest, None
            if progress is not None:
                await self._send({"progress": asdict(progress)})

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        """Whatever else the client sends is ignored; its end of stream ends the operation."""
        with suppress(trio.BrokenResourceError):
            while await self._stream.receive_some(4096):
                pass
        log.info("control: a client left, its operation is cancelled")
        scope.cancel()

    async def _send(self, message: Mapping[str, Any]) -> None:
        async with self._sending:
            await self._stream.send_all(json.dumps(message, separators=(",", ":")).encode() + b"\n")


def parse_request(line: bytes) -> tuple[str, dict[str, Any]]:
    """The operation and its checked arguments, defaults filled in. Raises `UsageError`."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("the request is not JSON") from None
    if not isinstance(request, dict) or not isinstance(request.get("op"), str):
        raise UsageError('a request is {"op": "<operation>", "args": {...}}')
    operation, args = request["op"], request.get("args", {})
    if operation not in _OPERATIONS:
        raise UsageError(f"unknown operation {operation[:40]!r}; the daemon may be an older version of p2pnode")
    if not isinstance(args, dict):
        raise UsageError("a request's args are an object")
    specified = _OPERATIONS[operation].args
    for key in args:
        if key not in specified:
            raise UsageError(f"{operation} has no argument {key[:40]!r}")
    checked: dict[str, Any] = {}
    for key, arg in specified.items():
        value = args.get(key, arg.default)
        if value is ... or not arg.check(value):
            raise UsageError(f"{operation}: the argument {key!r} must be {arg.form}")
        checked[key] = value
    return operation, checked


@dataclass(frozen=True, slots=True)
class _Arg:
    form: str
    check: Callable[[Any], bool]
    default: Any = ...  # no default: the argument is required


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\0" not in value


def _is_path(value: Any) -> bool:
    return _is_text(value) and value.startswith("/")


def _is_url(value: Any) -> bool:
    return _is_text(value) and "://" in value


def _is_peers(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_PEERS and all(map(_is_text, value))


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_KEYS and all(map(_is_text, value))


_PATH = _Arg("an absolute path or null", lambda value: value is None or _is_path(value), None)
_SPEC = _Arg("an image id, link or name", _is_text)
_NAME = _Arg("a text or null", lambda value: value is None or _is_text(value), None)
_FLAG = _Arg("true or false", lambda value: isinstance(value, bool), False)
_KEY_FILES = _Arg(
    f"a list of at most {MAX_KEYS} absolute paths", lambda value: _are_texts(value) and all(map(_is_path, value)), []
)
_POLICY = _Arg(
    f"one of {', '.join(SIGNATURE_POLICIES)}, or null", lambda value: value is None or value in SIGNATURE_POLICIES, None
)
_TRUSTED_KEYS = _Arg(f"a list of at most {MAX_KEYS} public keys", _are_texts, [])
_TIMEOUT = _Arg(
    "a positive number of seconds",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_TIMEOUT,
    DEFAULT_TIMEOUT,
)


@dataclass(frozen=True, slots=True)
class _Operation:
    """`streams`: it is given `tell` and gives results while it goes on; there may be many thousands."""

    call: Callable[[NodeAPI, dict[str, Any], Report], Awaitable[list[Result]]]
    args: Mapping[str, _Arg]
    streams: bool = False


async def _provide(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.provide(**args, report=report)]


async def _publish(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    await node.publish(**args, report=report)
    return []


async def _fetch(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.fetch(**args, report=report)]


async def _mirror(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return await node.mirror(args["things"], timeout=args["timeout"], report=report)


async def _mirrors(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return await node.mirrors()


async def _stop_mirror(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.stop_mirror(args["thing"])]


async def _pin(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.pin(args["spec"])]


async def _unpin(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.unpin(args["spec"])]


async def _images(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return await node.images()


async def _show(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.show(args["spec"])]


async def _verify(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.verify(args["spec"], report)]


async def _remove(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.remove(args["spec"])]


async def _status(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.status()]


async def _peers(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return await node.peers()


async def _doctor(node: NodeAPI, args: dict[str, Any], report: Report) -> list[Result]:
    return [await node.doctor(args["target"], report)]


_OPERATIONS: dict[str, _Operation] = {
    "provide": _Operation(
        _provide,
        {
            "path": _Arg("an absolute path", _is_path),
            "kind": _NAME,
            "name": _NAME,
            "sign_keys": _KEY_FILES,
        },
    ),
    "publish": _Operation(
        _publish,
        {
            "cache": _Arg("an absolute path or a URL", lambda value: _is_path(value) or _is_url(value)),
            "paths": _Arg(
                f"a list of at most {MAX_PATHS} store paths",
                lambda value: isinstance(value, list) and len(value) <= MAX_PATHS and all(map(_is_text, value)),
                [],
            ),
            "name": _NAME,
            "sign_keys": _KEY_FILES,
            "require_signatures": _POLICY,
            "trusted_keys": _TRUSTED_KEYS,
        },
        streams=True,
    ),
    "fetch": _Operation(
        _fetch,
        {
            "spec": _SPEC,
            "out": _PATH,
            "into_store": _FLAG,
            "add_root": _PATH,
            "to_cache": _PATH,
            "sign_keys": _KEY_FILES,
            "require_signatures": _POLICY,
            "trusted_keys": _TRUSTED_KEYS,
            "force": _FLAG,
            "keep_chunks": _FLAG,
            "timeout": _TIMEOUT,
            "peers": _Arg(f"a list of at most {MAX_PEERS} multiaddresses", _is_peers, []),
        },
    ),
    "mirror": _Operation(
        _mirror, {"things": _Arg(f"a list of at most {MAX_KEYS} texts", _are_texts), "timeout": _TIMEOUT}
    ),
    "mirrors": _Operation(_mirrors, {}),
    "stop_mirror": _Operation(_stop_mirror, {"thing": _Arg("a text", _is_text)}),
    "pin": _Operation(_pin, {"spec": _SPEC}),
    "unpin": _Operation(_unpin, {"spec": _SPEC}),
    "images": _Operation(_images, {}),
    "show": _Operation(_show, {"spec": _SPEC}),
    "verify": _Operation(_verify, {"spec": _SPEC}),
    "rm": _Operation(_remove, {"spec": _SPEC}),
    "status": _Operation(_status, {}),
    "peers": _Operation(_peers, {}),
    "doctor": _Operation(_doctor, {"target": _NAME}),
}
