"""Reservation vouchers: a relay's signed word that a peer has a reservation.

https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md#reservation-vouchers, in a signed envelope (RFC 0002).
Nobody has to check them, and go-libp2p refuses a reservation whose voucher is wrong, but not one without.
"""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from libp2p.peer.pb.crypto_pb2 import KeyType
from libp2p.peer.pb.envelope_pb2 import Envelope
from libp2p.relay.circuit_v2.pb.circuit_pb2 import Voucher
from libp2p.utils.varint import encode_uvarint

from p2pnode.net.identity import Identity
from p2pnode.net.relay.wire import peer_bytes

DOMAIN = b"libp2p-relay-rsvp"
PAYLOAD_TYPE = b"\x03\x02"


def make_voucher(relay: Identity, peer: str, expires: int) -> bytes:
    """`expires` in Unix seconds."""
    payload = Voucher(relay=peer_bytes(relay.peer_id), peer=peer_bytes(peer), expiration=expires).SerializeToString()
    envelope = Envelope(payload_type=PAYLOAD_TYPE, payload=payload)
    envelope.public_key.Type = KeyType.Ed25519
    envelope.public_key.Data = relay.public_key
    envelope.signature = Ed25519PrivateKey.from_private_bytes(relay.seed).sign(_signed(payload))
    data: bytes = envelope.SerializeToString()
    return data


def _signed(payload: bytes) -> bytes:
    return b"".join(encode_uvarint(len(part)) + part for part in (DOMAIN, PAYLOAD_TYPE, payload))
