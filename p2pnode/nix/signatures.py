"""Ed25519 signatures of store paths, and the keys that make and check them.

Source: libstore/path-info.cc and libutil/signature/local-keys.cc of Nix 2.36. Signed is the text::

    1;/nix/store/HASH-NAME;sha256:NAR HASH IN NIX32;NAR SIZE;/nix/store/REF,/nix/store/REF

References are full paths, sorted, a self reference included. Deriver, `ca` and where the NAR lies are not signed, and
neither is the name of the key: it only says which key to try. Keys and signatures are spelled `NAME:BASE64`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2pnode.errors import SignatureError
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import format_sha256

MAX_KEY_NAME = 256
"""Characters of a key's name. Nix has no limit; cache names with a number after them, as is the custom, have 20."""

_KEY_NAME = re.compile(rf"[!-9;-~]{{1,{MAX_KEY_NAME}}}")  # printable ASCII but ':' and blanks, which end it everywhere
_SEED = _PUBLIC = 32
_SIGNATURE = 64


@dataclass(frozen=True, slots=True, order=True)
class Signature:
    """`value`: 64 bytes. Holding one proves nothing; `PublicKey.verifies` does."""

    key_name: str
    value: bytes

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read `NAME:BASE64`. Raises SignatureError."""
        return cls(*_parse(text, "signature", _SIGNATURE))

    def __str__(self) -> str:
        return _format(self.key_name, self.value)


@dataclass(frozen=True, slots=True)
class SignedInfo:
    """One store path as caches and daemons exchange it: what is registered about it, and who vouches for that.

    `info.ca` is a claim here, as are the signatures: `trust.judge` checks both.
    """

    info: PathInfo
    signatures: tuple[Signature, ...] = ()


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A key that signatures are checked with. `value`: 32 bytes."""

    name: str
    value: bytes

    @classmethod
    def parse(cls, text: str) -> PublicKey:
        """Read `NAME:BASE64`, as in trusted-public-keys. Raises SignatureError."""
        return cls(*_parse(text, "public key", _PUBLIC))

    def __str__(self) -> str:
        return _format(self.name, self.value)

    def verifies(self, info: PathInfo, signature: Signature) -> bool:
        """Whether this key made `signature` over `info`, in the key's own name."""
        if signature.key_name != self.name:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.value).verify(signature.value, fingerprint(info))
        except (InvalidSignature, ValueError):  # ValueError: the 32 bytes are no point of the curve
            return False
        return True


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A key that signs. `seed`: 32 bytes, never shown by repr()."""

    name: str
    seed: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> SecretKey:
        """Read a secret key file: `NAME:BASE64` of seed and public key. Raises SignatureError."""
        name, value = _parse(text.strip(), "secret key", _SEED + _PUBLIC)
        key = cls(name, value[:_SEED])
        if key.public_key().value != value[_SEED:]:
            raise SignatureError(f"the secret key {name!r} is damaged: its two halves do not belong together")
        return key

    @classmethod
    def generate(cls, name: str) -> SecretKey:
        """A new key from the system's random source. Raises SignatureError for a name that cannot be one."""
        _check_name(name, "secret key")
        return cls(name, Ed25519PrivateKey.generate().private_bytes_raw())

    def __str__(self) -> str:
        """The key file's contents: whoever reads them can sign."""
        return _format(self.name, self.seed + self.public_key().value)

    def public_key(self) -> PublicKey:
        return PublicKey(self.name, Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw())

    def sign(self, info: PathInfo) -> Signature:
        """The signature over `info`; the same every time (RFC 8032), so signing again adds nothing."""
        return Signature(self.name, Ed25519PrivateKey.from_private_bytes(self.seed).sign(fingerprint(info)))


def fingerprint(info: PathInfo) -> bytes:
    """The text that is signed."""
    references = ",".join(str(path) for path in sorted(set(info.references)))
    return f"1;{info.path};{format_sha256(info.nar_hash)};{info.nar_size};{references}".encode()


def merged(*groups: Iterable[Signature]) -> tuple[Signature, ...]:
    """All distinct signatures, sorted: what several sources say about one path, in one order on every machine."""
    return tuple(sorted({signature for group in groups for signature in group}))


def _parse(text: str, what: str, size: int) -> tuple[str, bytes]:
    name, colon, encoded = text.partition(":")
    if not colon:
        raise SignatureError(f"a {what} has the form NAME:BASE64, and this one has no colon in it")
    _check_name(name, what)
    try:
        value = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):  # ValueError: a character beyond ASCII
        raise SignatureError(f"the {what} of {name!r} is not base 64") from None
    # Encoding again catches unused bits that are not zero: one signature must not have several spellings.
    if len(value) != size or base64.b64encode(value).decode() != encoded:
        raise SignatureError(f"the {what} of {name!r} is not the base 64 of {size} bytes")
    return name, value


def _check_name(name: str, what: str) -> None:
    if not _KEY_NAME.fullmatch(name):
        raise SignatureError(f"a {what} cannot have the name {name[:80]!r}: 1 to {MAX_KEY_NAME} printable characters")


def _format(name: str, value: bytes) -> str:
    return f"{name}:{base64.b64encode(value).decode()}"
