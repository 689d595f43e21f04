import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor
from protocols.announce import messages as m
from protocols.errors import FrameError, ProtocolError

keys = st.binary(min_size=m.MIN_KEY, max_size=m.MAX_KEY)
addrs = st.lists(st.from_regex(r"/[a-z0-9/.:]{1,100}", fullmatch=True), max_size=m.MAX_ADDRS).map(tuple)
peer_ids = st.from_regex(r"[1-9A-Za-z]{1,60}", fullmatch=True)
infos = st.builds(m.PeerInfo, peer_ids, addrs)


def founds() -> st.SearchStrategy[m.Message]:
    pool = st.lists(infos, min_size=1, max_size=6, unique_by=lambda info: info.peer)
    return pool.flatmap(
        lambda peers: st.builds(
            m.Found,
            st.lists(st.lists(st.sampled_from(peers), max_size=5, unique=True).map(tuple), max_size=5).map(tuple),
            st.lists(infos, max_size=3).map(tuple),
        )
    )


messages: st.SearchStrategy[m.Message] = st.one_of(
    st.builds(m.Hello, addrs),
    st.builds(m.Announce, st.lists(keys, max_size=9).map(tuple), st.integers(1, m.MAX_TTL)),
    st.builds(m.Withdraw, st.none() | st.lists(keys, max_size=9).map(tuple)),
    st.builds(m.Find, st.lists(keys, max_size=9).map(tuple), st.none() | st.binary(min_size=32, max_size=32)),
    st.builds(m.Ack, st.integers(0, m.MAX_KEYS)),
    st.builds(m.Ack, st.integers(0, m.MAX_KEYS), st.sampled_from(m.Refusal), st.integers(0, m.MAX_RETRY_AFTER)),
    founds(),
)


def key(number: int) -> bytes:
    return b"nar" + hashlib.sha256(str(number).encode()).digest()


@given(st.lists(messages, max_size=5), st.integers(1, 50))
def test_messages_survive_the_wire_in_any_pieces(sent: list[m.Message], piece: int) -> None:
    wire = b"".join(map(m.encode, sent))
    buffer = m.FrameBuffer()
    got = []
    for at in range(0, len(wire), piece):
        buffer.feed(wire[at : at + piece])
        while (payload := buffer.next_frame()) is not None:
            got.append(m.decode(payload))
    assert got == sent
    assert not buffer.partial


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_protocol_errors(data: bytes) -> None:
    try:
        message = m.decode(data)
    except ProtocolError:
        return
    assert m.encode(message)[m.HEADER :] == data


@given(messages, st.data())
def test_a_changed_byte_gives_a_message_or_a_protocol_error(message: m.Message, data: st.DataObject) -> None:
    payload = bytearray(m.encode(message)[m.HEADER :])
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] ^= data.draw(st.integers(1, 255))
    try:
        decoded = m.decode(bytes(payload))
    except ProtocolError:
        return
    assert isinstance(decoded, m.Message)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.binary(max_size=70) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.sampled_from(["hello", "announce", "withdraw", "find", "ack", "found"]),
    st.dictionaries(
        st.sampled_from(
            ["keys", "ttl", "addrs", "target", "accepted", "refusal", "retry_after", "peers", "providers", "closer"]
        ),
        values,
        max_size=5,
    ),
)
def test_well_formed_cbor_of_the_wrong_shape_is_a_protocol_error(kind: str, fields: dict[str, object]) -> None:
    payload = dagcbor.encode({"t": kind, **fields})
    try:
        message = m.decode(payload)
    except ProtocolError:
        return
    assert m.encode(message)[m.HEADER :] == payload


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"addrs": []},
        {"t": "hello"},
        {"t": "hello", "addrs": [], "more": 1},
        {"t": "hello", "addrs": ["ip4/1.2.3.4"]},
        {"t": "hello", "addrs": ["/ip4/1.2.3.4/tcp/ 1"]},
        {"t": "hello", "addrs": ["/a"] * 17},
        {"t": "hello", "addrs": ["/" + "a" * 256]},
        {"t": "hello", "addrs": ["/" + "a" * 250] * 9},
        {"t": "announce", "keys": [b"short"], "ttl": 60},
        {"t": "announce", "keys": [b"x" * 65], "ttl": 60},
        {"t": "announce", "keys": [b"x" * 36] * (m.MAX_KEYS + 1), "ttl": 60},
        {"t": "announce", "keys": [], "ttl": 0},
        {"t": "announce", "keys": [], "ttl": m.MAX_TTL + 1},
        {"t": "announce", "keys": [], "ttl": True},
        {"t": "withdraw"},
        {"t": "find", "keys": [b"x" * 32] * 65, "target": None},
        {"t": "find", "keys": []},
        {"t": "find", "keys": [], "target": b"x" * 31},
        {"t": "ack", "accepted": -1},
        {"t": "ack", "accepted": 0, "refusal": "mood", "retry_after": 1},
        {"t": "ack", "accepted": 0, "refusal": "rate"},
        {"t": "found", "peers": [], "providers": [[0]], "closer": []},
        {"t": "found", "peers": [["a", []]], "providers": [[0, 0]], "closer": []},
        {"t": "found", "peers": [["a", []], ["a", []]], "providers": [], "closer": []},
        {"t": "found", "peers": [], "providers": [], "closer": [["", []]]},
        {"t": "found", "peers": [], "providers": [], "closer": [["a", []]] * 21},
    ],
)
def test_what_breaks_the_format_is_refused(value: object) -> None:
    with pytest.raises(FrameError):
        m.decode(dagcbor.encode(value))


def test_an_oversized_frame_is_refused_by_its_header_alone() -> None:
    buffer = m.FrameBuffer()
    buffer.feed((m.MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError):
        buffer.next_frame()


@given(st.lists(st.integers(m.MIN_KEY, m.MAX_KEY), max_size=30), st.integers(1, 600))
def test_batches_keep_every_key_in_order_and_fit_a_frame(lengths: list[int], repeat: int) -> None:
    all_keys = [bytes([index % 256]) * length for index, length in enumerate(lengths * repeat)]
    cut = m.batches(all_keys)
    assert [key for batch in cut for key in batch] == all_keys
    for batch in cut:
        assert m.decode(m.encode(m.Announce(batch, m.MAX_TTL))[m.HEADER :]) == m.Announce(batch, m.MAX_TTL)


def test_the_largest_answer_is_cut_to_a_frame_and_serves_every_key() -> None:
    full = tuple("/" + f"{number}".rjust(127, "a") for number in range(m.MAX_ADDRS))
    providers = [[m.PeerInfo(f"peer{row}.{column}", full) for column in range(20)] for row in range(64)]
    found = m.fit(providers, [m.PeerInfo(f"closer{number}", full) for number in range(30)])
    assert len(m.encode(found)) <= m.MAX_FRAME + m.HEADER
    assert all(found.providers)
    assert len(found.closer) == m.MAX_CLOSER
    shared = m.fit([[m.PeerInfo(f"peer{column}", full) for column in range(20)]] * 64, [])
    assert all(len(row) == 20 for row in shared.providers)


def test_our_own_addresses_are_made_to_fit() -> None:
    many = [f"/ip4/10.0.0.{number}/tcp/4001" for number in range(40)]
    assert m.clean_addrs(many) == tuple(many[:16])
    assert m.clean_addrs(["/a", "/a", "nonsense", "/" + "x" * 300]) == ("/a",)
    long = ["/" + "x" * 200 + str(number) for number in range(16)]
    assert m.decode(m.encode(m.Hello(m.clean_addrs(long)))[m.HEADER :]) == m.Hello(m.clean_addrs(long))
