"""The node's settings: defaults, then config.toml in the home, then the environment, then the command line.

A plain dataclass and tomllib: importing pydantic-settings alone costs 0.3 s of the 0.4 s `p2pnode --help` may take.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from p2pnode.errors import ConfigError, UsageError
from p2pnode.net import addresses

DEFAULT_LISTEN = ("/ip4/0.0.0.0/tcp/4747",)
MIN_CHUNK, MAX_CHUNK = 4096, 4 << 20  # what a manifest may name as fixed sizes (protocols.manifest, slow to import)
MAX_CONFIG_BYTES = 1 << 20
MAX_LIST = 256
LOG_LEVELS = ("debug", "info", "warning", "error")
REACHABILITY = ("auto", "public", "private")
SIGNATURE_POLICIES = ("off", "if-keys", "always")
_PUBLIC_KEY = re.compile(r"[!-9;-~]{1,256}:[A-Za-z0-9+/]{43}=")
_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

ENV_PREFIX = "P2PNODE_"
COMMAND_VARIABLES = ("P2PNODE_JSON", "P2PNODE_QUIET")  # of the command line, not of the node
OLD_NAMES = {
    "NIX_IMAGE_CACHE_DIR": "home",
    "NIX_IMAGE_CHUNK_SIZE": "chunk_size",
    "NIX_IMAGE_GC_AGE_DAYS": "gc_age_days",
    "NIX_IMAGE_GC_MIN_COPIES": "gc_min_copies",
}
"""Environment variables of this program's predecessor; the new name wins over the old one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings, checked. Made by `load`."""

    home: Path
    listen: tuple[str, ...] = DEFAULT_LISTEN  # multiaddresses to listen on
    announce: tuple[str, ...] = ()  # addresses that lead here though the machine does not know them (forwarded ports)
    bootstrap: tuple[str, ...] = ()  # multiaddresses with /p2p/<peer id> of nodes to join the network through
    mdns: bool = True  # find nodes on the local network
    reachability: str = "auto"  # public or private spares finding out whether strangers can connect to this node
    upnp: bool = True  # ask a gateway for a port when strangers cannot connect
    hole_punching: bool = True  # make relayed connections direct
    relays: tuple[str, ...] = ()  # multiaddresses with /p2p/<peer id> of relays to prefer when strangers cannot connect
    relay: bool = False  # be a relay for others, within the limits below (where 0 is no limit: the last three)
    relay_reservations: int = 512  # nodes that are reachable through this one
    relay_circuits: int = 256  # connections carried at the same time ...
    relay_circuits_per_peer: int = 32
    relay_circuit_bytes: int = 0  # in each direction, after which a connection is ended
    relay_circuit_seconds: int = 0  # after which a connection is ended
    relay_bandwidth: int = 0  # bytes per second, all connections and both directions together
    chunk_size: int = 0  # bytes; 0 cuts by content (FastCDC), anything else at fixed distances
    gc_age_days: int = 30
    gc_min_copies: int = 2
    nix_store: Path | None = None  # root of a chroot store: its paths lie in <root>/nix/store
    trusted_public_keys: tuple[str, ...] = ()  # NAME:BASE64, believed beside those of nix.conf
    require_signatures: str | None = None  # see nix/trust_policy.py for what None means
    sign_keys: tuple[str, ...] = ()  # files of secret keys that sign what is provided and put into caches
    gateway: str = ""  # HOST:PORT where Nix finds a binary cache that is fed by the swarm; empty: none
    gateway_upstreams: tuple[str, ...] = ()  # URLs of binary caches that are asked beside the swarm
    gateway_lookup_seconds: int = 3  # the longest that Nix waits for an answer about a path
    gateway_priority: int = 30  # among Nix's substituters, the lowest first; cache.nixos.org has 40
    gateway_compression: str = "none"  # of the NARs that Nix gets; zstd for a gateway that serves a slow network
    gateway_ipfs_cid: bool = False  # name the root of a NAR's DAG in its narinfo
    publish: bool = False  # tell whoever asks which images this node provides
    mirror_interval: int = 300  # seconds from the end of one look at what is mirrored to the next
    log_level: str = "warning"
    announce_rate: int = 1 << 20  # bytes per second of announcements to one peer
    given: frozenset[str] = frozenset()  # the keys that some source set, as opposed to left at the default


def load(
    home: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """The settings of this node.

    `home` and `overrides` come from the command line (keys of `Config`; None values mean "not given"), `environ` is
    os.environ unless given. Raises `ConfigError` naming the source and the key.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    from_environ = dict(_from_environ(environ))
    chosen_home = home if home is not None else from_environ.pop("home", None) or default_home(environ)
    values["home"] = Path(os.path.abspath(Path(chosen_home).expanduser()))
    from_environ.pop("home", None)
    values |= _from_file(values["home"] / "config.toml")
    values |= from_environ
    for key, value in (overrides or {}).items():
        if value is not None:
            values[key] = _check(key, value, "the command line", key)
    return Config(**values, given=frozenset(values))


def default_home(environ: Mapping[str, str]) -> Path:
    """Where a node lives when nobody says: /var/lib/p2pnode for root, else in the user's data directory.

    https://specifications.freedesktop.org/basedir-spec/latest/
    """
    if os.geteuid() == 0:
        return Path("/var/lib/p2pnode")
    data = environ.get("XDG_DATA_HOME", "")
    return (Path(data) if data.startswith("/") else Path("~/.local/share").expanduser()) / "p2pnode"


def _from_file(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    if len(raw) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes, which no configuration needs")
    try:
        table = tomllib.loads(raw.decode())
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text") from exc
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key == "home":
            raise ConfigError(f"{path}: 'home' cannot be set in the home itself; use --home or P2PNODE_HOME")
        if key not in _KEYS:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(key, _KEYS)}")
        values[key] = _check(key, value, str(path), key)
    return values


def _from_environ(environ: Mapping[str, str]) -> Iterable[tuple[str, Any]]:
    for name, key in OLD_NAMES.items():
        if environ.get(name):
            yield key, _check(key, _from_text(key, environ[name]), "the environment", name)
    known = {ENV_PREFIX + key.upper(): key for key in _KEYS}
    for name, text in environ.items():
        if name in known:
            if text:  # an empty variable counts as unset, as in most shells' habits
                yield known[name], _check(known[name], _from_text(known[name], text), "the environment", name)
        elif name.startswith(ENV_PREFIX) and name not in COMMAND_VARIABLES and (nearest := _nearest_variable(name)):
            # Only near misses are refused: others have P2PNODE_ variables too (Kubernetes sets P2PNODE_PORT in every
            # pod beside a service called p2pnode).
            raise ConfigError(f"the environment: unknown variable {name!r}; did you mean {nearest!r}?")


def _nearest_variable(name: str) -> str | None:
    near = difflib.get_close_matches(name.removeprefix(ENV_PREFIX).lower(), _KEYS, n=1, cutoff=0.8)
    return ENV_PREFIX + near[0].upper() if near else None


def _from_text(key: str, text: str) -> object:
    """An environment variable's text as TOML would have given it; text that does not fit is left for the check."""
    kind = _KEYS[key].kind
    if kind is list:
        return text.replace(",", " ").split()
    if kind is bool:
        return _BOOLEANS.get(text.strip().lower(), text)
    if kind is int:
        digits = text.strip()
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 20 else text
    return text


def _check(key: str, value: object, source: str, name: str) -> Any:
    """`value` in the form `Config` holds it. Raises `ConfigError`."""
    if key not in _KEYS:
        raise ConfigError(f"{source}: unknown key {name!r}{_nearest(key, _KEYS)}")
    try:
        return _KEYS[key].check(value)
    except (ValueError, UsageError) as exc:
        raise ConfigError(f"{source}: {name} is {_brief(value)}, but {exc}") from None


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _nearest(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _integer(low: int, high: int, unit: str, also: int | None = None) -> Callable[[object], int]:
    alternative = "" if also is None else f", or {also}"

    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not (low <= value <= high or value == also):
            raise ValueError(f"must be a whole number of {unit} from {low} to {high}{alternative}")
        return value

    return check


def _list(check_each: Callable[[str], object], what: str = "multiaddresses") -> Callable[[object], tuple[str, ...]]:
    def check(value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"must be a list of {what}")
        if len(value) > MAX_LIST:
            raise ValueError(f"must have at most {MAX_LIST} entries")
        for each in value:
            check_each(each)
        return tuple(value)

    return check


def _with_peer(text: str) -> None:
    if addresses.parse(text).peer is None:
        raise UsageError(f"address {text!r} must end in /p2p/<peer id>")


def _public_key(text: str) -> None:
    # The form alone: whether it is a key, cryptography knows, which takes too long to import here.
    if not _PUBLIC_KEY.fullmatch(text):
        raise ValueError(f"{text[:100]!r} must have the form NAME:BASE64, with the 44 characters of an Ed25519 key")


def _absolute_file(text: str) -> None:
    if not text.startswith("/") or "\0" in text:
        raise ValueError(f"{text[:200]!r} must be the absolute path of a file")


def _directory(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError("must be the path of a directory")
    return Path(os.path.abspath(Path(value).expanduser()))


def _one_of(words: Sequence[str]) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return value.lower()

    return check


def _host_port(value: object) -> str:
    host, colon, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if value != "" and not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise ValueError("must be HOST:PORT, such as 127.0.0.1:5080")
    return str(value)


def _urls(value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each for each in value):
        raise ValueError("must be a list of URLs of binary caches")
    if len(value) > MAX_LIST:
        raise ValueError(f"must have at most {MAX_LIST} entries")
    return tuple(value)


class _Key(NamedTuple):
    kind: type  # what an environment variable's text is turned into before the check
    check: Callable[[object], Any]


_KEYS: dict[str, _Key] = {
    "home": _Key(str, _directory),
    "listen": _Key(list, _list(addresses.parse_listen)),
    "announce": _Key(list, _list(addresses.parse)),
    "bootstrap": _Key(list, _list(_with_peer)),
    "mdns": _Key(bool, _boolean),
    "reachability": _Key(str, _one_of(REACHABILITY)),
    "upnp": _Key(bool, _boolean),
    "hole_punching": _Key(bool, _boolean),
    "relays": _Key(list, _list(_with_peer)),
    "relay": _Key(bool, _boolean),
    "relay_reservations": _Key(int, _integer(0, 100_000, "reservations")),
    "relay_circuits": _Key(int, _integer(0, 100_000, "circuits")),
    "relay_circuits_per_peer": _Key(int, _integer(0, 100_000, "circuits")),
    "relay_circuit_bytes": _Key(int, _integer(0, 1 << 50, "bytes")),
    "relay_circuit_seconds": _Key(int, _integer(0, 366 * 86400, "seconds")),
    "relay_bandwidth": _Key(int, _integer(0, 1 << 40, "bytes per second")),
    "chunk_size": _Key(int, _integer(MIN_CHUNK, MAX_CHUNK, "bytes", also=0)),
    "gc_age_days": _Key(int, _integer(0, 36_500, "days")),
    "gc_min_copies": _Key(int, _integer(0, 1_000, "copies")),
    "nix_store": _Key(str, _directory),
    "trusted_public_keys": _Key(list, _list(_public_key, "public keys")),
    "require_signatures": _Key(str, _one_of(SIGNATURE_POLICIES)),
    "sign_keys": _Key(list, _list(_absolute_file, "absolute paths")),
    "gateway": _Key(str, _host_port),
    "gateway_upstreams": _Key(list, _urls),
    "gateway_lookup_seconds": _Key(int, _integer(0, 60, "seconds")),
    "gateway_priority": _Key(int, _integer(0, 10_000, "steps")),
    "gateway_compression": _Key(str, _one_of(("none", "zstd"))),
    "gateway_ipfs_cid": _Key(bool, _boolean),
    "publish": _Key(bool, _boolean),
    "mirror_interval": _Key(int, _integer(1, 366 * 86400, "seconds")),
    "log_level": _Key(str, _one_of(LOG_LEVELS)),
    "announce_rate": _Key(int, _integer(1 << 10, 1 << 30, "bytes per second")),
}
