"""What the Nix store on this machine has registered about paths, with signatures where it can be asked for them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio

from p2pnode.errors import ConfigError, DaemonError, DaemonUnavailable, NixMissing, SignatureError
from p2pnode.nix.cli import NixStore
from p2pnode.nix.into_store import open_session
from p2pnode.nix.signatures import SecretKey, SignedInfo, merged
from p2pnode.nix.storepath import StorePath

log = logging.getLogger(__name__)

MAX_KEY_FILE = 4096  # bytes; a name of 256 characters and 88 of base 64 take a tenth of it


def daemon_socket() -> Path | None:
    """The daemon that the environment names, as Nix's own commands take it."""
    named = os.environ.get("NIX_DAEMON_SOCKET_PATH")
    return Path(named) if named else None


async def registered(paths: Iterable[StorePath], store_root: Path | None) -> list[SignedInfo]:
    """What is registered about valid `paths`, in their order; `store_root`: of a chroot store.

    Without a daemon, or one of our own, the `nix-store` command is asked, which knows of no signatures. Raises NixError
    for a path that is not valid.
    """
    wanted = list(paths)
    try:
        async with open_session(socket=daemon_socket(), store_root=store_root) as session:
            return await session.path_info(wanted)
    except (DaemonError, DaemonUnavailable, NixMissing) as error:
        log.info("signatures cannot be read from the Nix store: %s", error)
    infos = await trio.to_thread.run_sync(lambda: NixStore(store_root).path_info(wanted))
    return [SignedInfo(info) for info in infos]


def read_secret_keys(files: Iterable[str | os.PathLike[str]]) -> list[SecretKey]:
    """Keys to sign with, of the form that `nix-store --generate-binary-cache-key` makes. Raises ConfigError."""
    keys = []
    for path in files:
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_KEY_FILE + 1)
            keys.append(SecretKey.parse(data.decode("ascii") if len(data) <= MAX_KEY_FILE else ""))
        except OSError as error:
            raise ConfigError(f"the signing key {os.fspath(path)} cannot be read: {error.strerror}") from error
        except (UnicodeDecodeError, SignatureError) as error:
            reason = str(error) if isinstance(error, SignatureError) else "it is not text"
            raise ConfigError(f"{os.fspath(path)} is not a signing key: {reason}") from None
    return keys


def signed_with(keys: Sequence[SecretKey], paths: Iterable[SignedInfo]) -> list[SignedInfo]:
    """`paths` with the signatures of `keys` added."""
    return [SignedInfo(each.info, merged(each.signatures, (key.sign(each.info) for key in keys))) for each in paths]
