from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols import dagcbor, reach
from protocols.errors import ProtocolError
from protocols.reach import Dial, Forward, Outcome, Result

NONCE = bytes(range(32))
PORTS = st.integers(1, 65535)
NONCES = st.binary(min_size=32, max_size=32)
IPS = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
MESSAGES = st.one_of(
    st.builds(Dial, PORTS, NONCES),
    st.builds(Forward, IPS, PORTS, NONCES),
    st.builds(Result, st.sampled_from(Outcome), IPS),
)


@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: reach.Message) -> None:
    frame = reach.encode(message)
    body = frame[reach.HEADER :]
    assert reach.body_size(frame[: reach.HEADER]) == len(body) <= reach.MAX_FRAME
    assert reach.decode(body) == message


def test_the_bytes_are_those_of_the_grammar() -> None:
    assert reach.encode(Result(Outcome.REACHED, bytes([192, 0, 2, 7]))).hex() == (
        "0022a3617466726573756c7462697044c0000207676f7574636f6d656772656163686564"
    )


@pytest.mark.parametrize(
    "fields",
    [
        [],
        {},
        {"t": "dial", "port": 4747},
        {"t": "dial", "port": 0, "nonce": NONCE},
        {"t": "dial", "port": 65536, "nonce": NONCE},
        {"t": "dial", "port": True, "nonce": NONCE},
        {"t": "dial", "port": 4747, "nonce": NONCE[1:]},
        {"t": "dial", "port": 4747, "nonce": NONCE, "ip": bytes(4)},
        {"t": "forward", "port": 4747, "nonce": NONCE, "ip": bytes(5)},
        {"t": "forward", "port": 4747, "nonce": NONCE, "ip": "192.0.2.7"},
        {"t": "result", "outcome": "maybe", "ip": bytes(4)},
        {"t": "result", "outcome": [], "ip": bytes(4)},
        {"t": ["dial"], "port": 4747, "nonce": NONCE},
        {"t": "other", "port": 4747, "nonce": NONCE},
    ],
)
def test_malformed_messages_are_refused(fields: object) -> None:
    with pytest.raises(ProtocolError):
        reach.decode(dagcbor.encode(fields))


@given(st.binary(max_size=300))
def test_nothing_but_a_protocol_error_escapes(data: bytes) -> None:
    try:
        reach.decode(data)
        reach.body_size(data[:2])
    except ProtocolError:
        pass


@pytest.mark.parametrize("size", [0, 257, 65535])
def test_a_frame_of_impossible_size_is_refused_before_it_is_read(size: int) -> None:
    with pytest.raises(ProtocolError):
        reach.body_size(size.to_bytes(2, "big"))
