from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.gateway.routes import Kind, Route, Span, Unsatisfiable, matches, nar_url, route, span
from p2pnode.nix.hashes import nix32_encode


@given(st.binary(min_size=20, max_size=20), st.binary(min_size=32, max_size=32), st.booleans())
def test_what_we_name_is_what_we_recognise(part: bytes, nar_hash: bytes, zstd: bool) -> None:
    assert route(f"/{nix32_encode(part)}.narinfo") == Route(Kind.NARINFO, part)
    kind = Kind.NAR_ZSTD if zstd else Kind.NAR
    assert route("/" + nar_url(nar_hash, zstd=zstd)) == Route(kind, nar_hash)
    assert route(f"http://host:1/{nar_url(nar_hash, zstd=zstd)}?x=y") == Route(kind, nar_hash)


@given(st.text(max_size=100))
def test_nothing_else_is_recognised(text: str) -> None:
    found = route("/" + text)
    assert found is None or "/" + text.partition("?")[0] in ("/nix-cache-info",)


def test_a_long_target_is_not_looked_at() -> None:
    assert route("/nix-cache-info?" + "x" * 3000) is None
    assert route("/nix-cache-info?" + "x" * 300) == Route(Kind.CACHE_INFO)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, None),
        ("bytes=0-", Span(0, 100)),
        ("bytes=0-0", Span(0, 1)),
        ("bytes=99-", Span(99, 100)),
        ("bytes=5-1000", Span(5, 100)),
        ("bytes=-5", Span(95, 100)),
        ("bytes=-500", Span(0, 100)),
        ("bytes=5-3", None),
        ("bytes=0-1,3-4", None),
        ("bytes=-", None),
        ("bytes=a-b", None),
        ("lines=0-1", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_ranges(header: str | None, expected: Span | None) -> None:
    assert span(header, 100) == expected


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_ranges_behind_the_end(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        span(header, 100)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (None, False),
        ('"a"', True),
        ('W/"a"', True),
        ("*", True),
        ('"b", "a"', True),
        ('"b"', False),
        ("a", False),
        ("", False),
    ],
)
def test_entity_tags(header: str | None, expected: bool) -> None:
    assert matches(header, '"a"') == expected
