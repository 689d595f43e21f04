from __future__ import annotations

import pytest

from protocols.cid import CID, Codec
from protocols.errors import FrameError
from protocols.exchange import messages as m
from protocols.exchange.session import MAX_INTERESTS, Session, State

ROOT = CID.of(Codec.DAG_CBOR, b"root")
KEY = CID.of(Codec.RAW, b"x").to_bytes()
OTHERS: list[m.Message] = [
    m.Interest(ROOT),
    m.Availability(ROOT, 1),
    m.Have(ROOT, ((0, 1),)),
    m.Records(ROOT, {}),
    m.Want((KEY,)),
    m.Block(KEY, m.Encoding.RAW, 1, (b"x",)),
    m.DontHave((KEY,)),
    m.Cancel((KEY,)),
    m.Busy(1),
]


def wire(*messages: m.Message) -> bytes:
    return b"".join(bytes(part) for message in messages for part in m.encode(message))


def opened() -> Session:
    session = Session("test/1")
    assert list(session.receive(wire(m.Hello())))
    return session


def test_greeting_opens_the_other_side() -> None:
    session = Session("a")
    for part in Session("b/2").greeting():
        list(session.receive(part))
    assert session.state is State.OPEN
    assert session.hello is not None and session.hello.agent == "b/2"


@pytest.mark.parametrize("message", OTHERS, ids=lambda v: type(v).__name__)
def test_table(message: m.Message) -> None:
    with pytest.raises(FrameError, match="before HELLO"):
        list(Session("x").receive(wire(message)))
    session = opened()
    assert [type(got) for got in session.receive(wire(message))] == [type(message)]
    assert session.state is State.OPEN
    assert list(session.receive(wire(m.Goodbye("bye"), message, m.Hello()))) == [m.Goodbye("bye")]
    assert session.state is State.DONE
    assert not list(session.receive(wire(message)))


def test_second_hello_other_version_and_unoffered_encoding_end_it() -> None:
    with pytest.raises(FrameError, match="second HELLO"):
        list(opened().receive(wire(m.Hello())))
    with pytest.raises(FrameError, match="version 2"):
        list(Session("x").receive(wire(m.Hello(version=2))))
    with pytest.raises(FrameError, match="DELTA"):
        list(opened().receive(wire(m.Block(KEY, m.Encoding.DELTA, 1, (b"x",)))))


def test_goodbye_may_come_first() -> None:
    session = Session("x")
    assert list(session.receive(wire(m.Goodbye("full"))))
    assert session.state is State.DONE


def test_interests_are_bounded() -> None:
    session = opened()
    roots = [CID.of(Codec.DAG_CBOR, bytes([i // 256, i % 256])) for i in range(MAX_INTERESTS + 1)]
    list(session.receive(wire(*map(m.Interest, roots[:-1]), m.Interest(roots[0]))))
    with pytest.raises(FrameError, match="interest"):
        list(session.receive(wire(m.Interest(roots[-1]))))
    session = opened()
    list(session.receive(wire(*map(m.Interest, roots[:-1]), m.Interest(roots[0], False), m.Interest(roots[-1]))))
    assert len(session.interests) == MAX_INTERESTS


def test_receiving_block_is_true_from_first_to_last_byte() -> None:
    session = opened()
    data = wire(m.Block(KEY, m.Encoding.RAW, 4, (b"abcd",)))
    assert not session.receiving_block
    for byte in data[:-1]:
        assert not list(session.receive(bytes([byte])))
        assert session.receiving_block
    assert list(session.receive(data[-1:]))
    assert not session.receiving_block
