"""Links that a person can paste: `p2pnode:<image-id>?peer=<multiaddr>&peer=...&name=<name>`.

A link needs no DHT: it names the image and peers that had it when the link was made. Parsing is strict, as a link that
is half understood would fetch from nobody; the name is only a suggestion and therefore cleaned instead of refused.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from p2pnode.errors import UsageError
from p2pnode.net import addresses
from protocols.cid import CID, TEXT_SIZE, Codec
from protocols.errors import CIDError

SCHEME = "p2pnode:"
MAX_PEERS = 32
MAX_NAME = 255  # bytes: what file systems allow
MAX_LINK = 32 << 10  # characters; 32 addresses of full length and a name fit


@dataclass(frozen=True, slots=True)
class Link:
    """An image, and who may have it. `peers` are multiaddresses ending in /p2p/<peer id>, without duplicates."""

    image: CID
    peers: tuple[str, ...] = ()
    name: str | None = None

    def __str__(self) -> str:
        return format(self.image, self.peers, self.name)


def parse(text: str) -> Link:
    """Parse a link, or a bare image id (a link without peers). Raises `UsageError` saying what is wrong with it."""
    text = text.strip()
    if len(text) > MAX_LINK:
        raise UsageError(f"the link is longer than {MAX_LINK} characters")
    if not text.startswith(SCHEME):
        return Link(parse_image_id(text))
    image_text, _, query = text.removeprefix(SCHEME).partition("?")
    image = parse_image_id(image_text)
    peers: dict[str, None] = {}
    name: str | None = None
    for item in query.split("&") if query else ():
        key, separator, value = item.partition("=")
        if not separator:
            raise UsageError(f"the link is malformed at {_brief(item)}: expected peer=<multiaddress> or name=<name>")
        if key == "peer":
            peers[_peer(_unquote(value))] = None
            if len(peers) > MAX_PEERS:
                raise UsageError(f"the link names more than {MAX_PEERS} peers")
        elif key == "name":
            if name is not None:
                raise UsageError("the link has more than one name")
            name = clean_name(_unquote(value))
        else:
            raise UsageError(f"the link has an unknown part {_brief(key)}; a newer version of p2pnode may have made it")
    return Link(image, tuple(peers), name)


@dataclass(frozen=True, slots=True)
class Publisher:
    """A node, of which all that it publishes is meant. `addrs` are multiaddresses ending in /p2p/<peer>."""

    peer: str
    addrs: tuple[str, ...] = ()


def parse_thing(text: str) -> Link | Publisher:
    """What can be mirrored: a link, an image id, a peer id, or a multiaddress with /p2p/<peer id>.

    Raises `UsageError`.
    """
    text = text.strip()
    if text.startswith("/"):
        address = addresses.parse(text)
        if address.peer is None:
            raise UsageError(f"the address {_brief(text)} does not end in /p2p/<peer id>, so no publisher is named")
        return Publisher(address.peer, (str(address),))
    if text.startswith(SCHEME):
        return parse(text)
    try:
        return Publisher(addresses.check_peer_id(text))
    except UsageError:
        pass
    try:
        return Link(parse_image_id(text))
    except UsageError as exc:
        raise UsageError(
            f"{_brief(text)} is no link, image id, peer id or address with /p2p/<peer id> ({exc})"
        ) from None


def format(image: CID, peers: Sequence[str] = (), name: str | None = None) -> str:
    """The text of a link. `parse` gives the same image, peers (the first 32) and, if it was clean, name back."""
    parts = [f"peer={quote(peer, safe='/:.')}" for peer in list(dict.fromkeys(peers))[:MAX_PEERS]]
    if name is not None and (cleaned := clean_name(name)) is not None:
        parts.append(f"name={quote(cleaned, safe='')}")
    return f"{SCHEME}{image}" + (f"?{'&'.join(parts)}" if parts else "")


def parse_image_id(text: str) -> CID:
    """The CID of an image in its text form. Raises `UsageError`."""
    try:
        cid = CID.parse(text)
    except CIDError as exc:
        hint = ""
        if len(text) != TEXT_SIZE:
            hint = f" (this has {len(text)} characters)"
        raise UsageError(f"{_brief(text)} is not an image id: {exc}{hint}") from None
    if cid.codec is not Codec.DAG_CBOR:
        raise UsageError(f"{_brief(text)} is the id of a chunk, not of an image")
    return cid


def clean_name(text: str) -> str | None:
    """A name from a stranger, fit for a terminal and a file system: None when nothing usable is left of it.

    Control, format, surrogate and unassigned characters go (terminal escapes, bidirectional overrides), path
    separators become underscores, leading dots go, and at most 255 bytes of UTF-8 stay.
    """
    kept = "".join(
        "_" if char in "/\\" else char
        for char in unicodedata.normalize("NFC", text)
        if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    )
    kept = kept.strip().lstrip(".").strip()
    return kept.encode()[:MAX_NAME].decode(errors="ignore").rstrip() or None


def _peer(text: str) -> str:
    address = addresses.parse(text)
    if address.peer is None:
        raise UsageError(f"the link's address {text!r} does not end in /p2p/<peer id>, so nobody could be recognised")
    return str(address)


def _unquote(text: str) -> str:
    if not text.isascii():
        raise UsageError(f"the link is malformed at {_brief(text)}: only ASCII characters may stand in a link")
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise UsageError(f"the link is malformed at {_brief(text)}: it is not UTF-8") from None


def _brief(text: str) -> str:
    return repr(text if len(text) <= 70 else text[:67] + "...")
