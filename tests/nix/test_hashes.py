from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import NixError
from p2pnode.nix.hashes import (
    NIX32_ALPHABET,
    format_hash,
    format_sha256,
    nix32_decode,
    nix32_encode,
    parse_hash,
    parse_sha256,
)

# printf hello | nix-hash --flat --type sha256 in each form
HELLO = bytes.fromhex("2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")
SPELLINGS = {
    "base16": "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824",
    "base32": "sha256:094qif9n4cq4fdg459qzbhg1c6wywawwaaivx0k0x8xhbyx4vwic",
    "base64": "sha256:LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
    "sri": "sha256-LPJNul+wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ=",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_known_spellings(spelling):
    assert parse_sha256(SPELLINGS[spelling]) == HELLO
    assert format_sha256(HELLO, spelling) == SPELLINGS[spelling]


@settings(deadline=None)
@given(st.sampled_from(["md5", "sha1", "sha256", "sha512"]), st.data())
def test_every_spelling_of_every_digest_is_read_back(algorithm, data):
    size = {"md5": 16, "sha1": 20, "sha256": 32, "sha512": 64}[algorithm]
    digest = data.draw(st.binary(min_size=size, max_size=size))
    for spelling in SPELLINGS:
        assert parse_hash(format_hash(algorithm, digest, spelling)) == (algorithm, digest)


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_nix32_round_trip(data):
    text = nix32_encode(data)
    assert set(text) <= set(NIX32_ALPHABET)
    assert nix32_decode(text, len(data)) == data


@settings(deadline=None)
@given(st.text(alphabet=NIX32_ALPHABET, min_size=52, max_size=52))
def test_a_digest_has_one_nix32_spelling(text):
    if text[0] in "01":
        assert nix32_encode(nix32_decode(text, 32)) == text
    else:
        with pytest.raises(NixError):
            nix32_decode(text, 32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256:",
        "sha256-",
        SPELLINGS["base16"].removeprefix("sha256:"),
        SPELLINGS["base16"][:-1],
        SPELLINGS["base16"][:-1] + "g",
        SPELLINGS["base16"][:-2] + "  ",
        SPELLINGS["base32"].replace("q", "e"),
        "sha256:2" + SPELLINGS["base32"][8:],
        SPELLINGS["base32"].upper(),
        SPELLINGS["base64"][:-1],
        SPELLINGS["base64"].replace("CQ=", "CR="),  # unused bits set
        SPELLINGS["base64"].replace("+", "-"),  # the URL alphabet
        SPELLINGS["base64"].replace("+", "é"),
        SPELLINGS["base64"].replace("L", "\n", 1),
        SPELLINGS["sri"] + "?opt",
        "sha256-" + SPELLINGS["base16"].removeprefix("sha256:"),
        "SHA256:" + SPELLINGS["base16"].removeprefix("sha256:"),
        "sha512:" + SPELLINGS["base16"].removeprefix("sha256:"),
        "blake3:" + SPELLINGS["base16"].removeprefix("sha256:"),
        "sha1:" + "0" * 40,
        " " + SPELLINGS["base16"],
    ],
)
def test_other_spellings_are_refused(text):
    with pytest.raises(NixError):
        parse_sha256(text)
