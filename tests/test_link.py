import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import link
from p2pnode.errors import UsageError
from protocols.cid import CID, Codec

IMAGE = CID.of(Codec.DAG_CBOR, b"an image")
PEER = "12D3KooWRimWGdCxiJ1tQkGNr32WBUs5AVYkz3cxjZzMNQ9jukFw"
ADDR = f"/ip4/192.0.2.7/tcp/4747/p2p/{PEER}"


def test_bare_id() -> None:
    assert link.parse(f" {IMAGE}\n") == link.Link(IMAGE)


def test_whole_link() -> None:
    text = f"p2pnode:{IMAGE}?peer={ADDR}&peer=/dns4/a.example/tcp/1/p2p/{PEER}&name=my%20disk.img"
    assert link.parse(text) == link.Link(IMAGE, (ADDR, f"/dns4/a.example/tcp/1/p2p/{PEER}"), "my disk.img")


def test_percent_encoded_and_repeated_peers() -> None:
    encoded = ADDR.replace("/", "%2F")
    assert link.parse(f"p2pnode:{IMAGE}?peer={encoded}&peer={ADDR}").peers == (ADDR,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not an image id"),
        ("bafy", "59 characters"),
        (str(IMAGE)[:-1], "58 characters"),
        (str(IMAGE)[:-3] + "0ab", "letters"),
        (str(IMAGE).upper(), "starts with b"),
        (str(CID.of(Codec.RAW, b"x")), "chunk"),
        ("https://example.org", "not an image id"),
        (f"p2pnode:{IMAGE}?peer", "malformed"),
        (f"p2pnode:{IMAGE}?peer=", "address"),
        (f"p2pnode:{IMAGE}?peer=/ip4/192.0.2.7/tcp/4747", "/p2p/"),
        (f"p2pnode:{IMAGE}?peer=/ip4/300.0.0.1/tcp/1/p2p/{PEER}", "300.0.0.1"),
        (f"p2pnode:{IMAGE}?peer=/ip4/192.0.2.7/udp/1/p2p/{PEER}", "udp"),
        (f"p2pnode:{IMAGE}?peer={ADDR}x", "peer id"),
        (f"p2pnode:{IMAGE}?colour=red", "unknown part"),
        (f"p2pnode:{IMAGE}?name=a&name=b", "more than one name"),
        (f"p2pnode:{IMAGE}?name=%ff", "UTF-8"),
        (f"p2pnode:{IMAGE}?name=ä", "ASCII"),
        (f"p2pnode:{IMAGE}?name=" + "a" * 40_000, "longer"),
        (f"p2pnode:{IMAGE}?" + "&".join(f"peer=/ip4/192.0.2.{n}/tcp/1/p2p/{PEER}" for n in range(33)), "more than 32"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        link.parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("disk.img", "disk.img"),
        ("../../etc/passwd", "_.._etc_passwd"),
        ("\x1b[31mred\x07", "[31mred"),
        ("a\u202egmi.exe", "agmi.exe"),
        (".hidden", "hidden"),
        ("..", None),
        (" \n", None),
        ("ä" * 200, "ä" * 127),
    ],
)
def test_names_are_cleaned(name: str, clean: str | None) -> None:
    assert link.clean_name(name) == clean
    assert link.parse(link.format(IMAGE, (), name)).name == clean


@given(st.text())
def test_cleaning_is_idempotent_and_safe(name: str) -> None:
    clean = link.clean_name(name)
    if clean is not None:
        assert link.clean_name(clean) == clean
        assert clean.isprintable() or all(char.isprintable() or char.isspace() for char in clean)
        assert "/" not in clean
        assert clean not in (".", "..")
        assert 0 < len(clean.encode()) <= 255


@given(st.binary(min_size=1, max_size=8), st.lists(st.integers(1, 65535), max_size=32, unique=True), st.text())
def test_round_trip(data: bytes, ports: list[int], name: str) -> None:
    made = link.Link(
        CID.of(Codec.DAG_CBOR, data), tuple(f"/ip4/192.0.2.7/tcp/{p}/p2p/{PEER}" for p in ports), link.clean_name(name)
    )
    assert link.parse(str(made)) == made


@given(st.text(max_size=300))
def test_anything_else_is_a_usage_error(text: str) -> None:
    for candidate in (text, f"p2pnode:{text}", f"p2pnode:{IMAGE}?{text}", f"p2pnode:{IMAGE}?peer={text}"):
        try:
            link.parse(candidate)
        except UsageError as exc:
            assert str(exc)


PEER = "12D3KooWSMTjKMnLmfEDoZhQH2RniDbw9jce1aNK6SnAkHVEPGaR"


def test_things_to_mirror() -> None:
    image = "bafyr4ihfsrdbtbfhtqupjvfxdil7j2k5ujol2h4kirv4pq5vbqo3kz7hbu"
    address = f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}"
    assert link.parse_thing(f" {image}\n") == link.Link(link.parse_image_id(image))
    assert link.parse_thing(f"p2pnode:{image}?name=x") == link.Link(link.parse_image_id(image), (), "x")
    assert link.parse_thing(PEER) == link.Publisher(PEER)
    assert link.parse_thing(address) == link.Publisher(PEER, (address,))
    for text in ("", "/", "/ip4/192.0.2.1/tcp/1", "web.img", PEER[:-1], image[:-1], "p2pnode:", "1" * 1000, "\x1b[31m"):
        with pytest.raises(UsageError):
            link.parse_thing(text)
