"""Who this node is: an Ed25519 key in the home, and the peer id that follows from it.

The file holds libp2p's PrivateKey message (https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md): type
Ed25519, then seed and public key; go-libp2p and kubo read and write the same 68 bytes. The peer id is computed here by
hand because importing libp2p for it would cost every command more than a second.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

import base58

from p2pnode.errors import ConfigError

log = logging.getLogger(__name__)

FILE_NAME = "identity.key"
_PRIVATE_HEADER = b"\x08\x01\x12\x40"  # protobuf: Type = Ed25519, Data = 64 bytes (seed, public key)
_PUBLIC_HEADER = b"\x08\x01\x12\x20"  # protobuf: Type = Ed25519, Data = 32 bytes
_FILE_BYTES = len(_PRIVATE_HEADER) + 64


def peer_id_of(public_key: bytes) -> str:
    """The peer id of a raw 32-byte Ed25519 public key: base58 of an identity multihash of its protobuf."""
    message = _PUBLIC_HEADER + public_key
    text: bytes = base58.b58encode(bytes([0x00, len(message)]) + message)
    return text.decode("ascii")


@dataclass(frozen=True, slots=True)
class Identity:
    """A node's key pair. The seed never appears in a repr."""

    seed: bytes = field(repr=False)  # 32 bytes, secret
    public_key: bytes = field(repr=False)  # 32 bytes
    peer_id: str

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        public_key = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
        return cls(seed, public_key, peer_id_of(public_key))

    @classmethod
    def generate(cls) -> Identity:
        return cls.from_seed(secrets.token_bytes(32))

    @classmethod
    def load(cls, home: Path) -> Identity:
        """The identity kept in `home`, made on first use. Raises `ConfigError` when the file is not usable."""
        path = home / FILE_NAME
        try:
            return cls._read(path)
        except FileNotFoundError:
            _create(path, cls.generate())
            return cls._read(path)  # not necessarily ours: another process may have been first

    @classmethod
    def _read(cls, path: Path) -> Identity:
        try:
            with path.open("rb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                data = file.read(_FILE_BYTES + 1)
                if mode & 0o077:
                    log.warning("%s could be read by others (mode %04o); setting it to 0600", path, mode)
                    os.fchmod(file.fileno(), 0o600)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise ConfigError(f"the identity {path} cannot be read: {exc.strerror}") from exc
        if len(data) != _FILE_BYTES or not data.startswith(_PRIVATE_HEADER):
            raise ConfigError(f"{path} is not an Ed25519 identity; restore it, or move it away to get a new peer id")
        identity = cls.from_seed(data[4:36])
        if identity.public_key != data[36:]:
            raise ConfigError(f"{path} is damaged: its two halves do not belong together; restore it or move it away")
        return identity


def _create(path: Path, identity: Identity) -> None:
    """Write the file so that it is either whole or absent, and never replaces one that appeared meanwhile."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(_PRIVATE_HEADER + identity.seed + identity.public_key)
                file.flush()
                os.fsync(file.fileno())
            # A link, unlike a rename, fails when the name is taken: of two first starts one wins and both use its key.
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
        finally:
            temporary.unlink()
    except OSError as exc:
        raise ConfigError(f"the identity {path} cannot be created: {exc.strerror}") from exc
