from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import NarInfoError
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.hashes import NIX32_ALPHABET
from p2pnode.nix.narinfo import MAX_NARINFO, MAX_SIGNATURES, NarInfo, parse
from p2pnode.nix.signatures import Signature
from p2pnode.nix.storepath import StorePath
from tests.nix.caches import path, text, vector, vectors

NAMES = st.from_regex(r"[0-9a-zA-Z+_?=][0-9a-zA-Z+._?=-]{0,40}", fullmatch=True)
PATHS = st.builds(StorePath, st.text(NIX32_ALPHABET, min_size=32, max_size=32), NAMES)
DIGESTS = st.binary(min_size=32, max_size=32)
SIGNATURES = st.builds(Signature, st.from_regex(r"[!-9;-~]{1,30}", fullmatch=True), st.binary(min_size=64, max_size=64))
INFOS = st.builds(
    PathInfo,
    path=PATHS,
    nar_hash=DIGESTS,
    nar_size=st.integers(1, 2**63 - 1),
    references=st.lists(PATHS, unique=True, max_size=5).map(lambda paths: tuple(sorted(paths))),
    deriver=st.none() | PATHS,
    ca=st.none()
    | st.sampled_from(
        ["fixed:r:sha256:1a41jhdhw3x3wmj4f0xg4v4p1pj4j9f6k70966i7ayspp2rhwnzy", "text:sha256:" + "0" * 52]
    ),
)
NARINFOS = st.builds(
    NarInfo,
    info=INFOS,
    signatures=st.lists(SIGNATURES, max_size=3).map(tuple),
    url=st.from_regex(r"nar/[0-9a-z]{1,60}\.nar(\.zst)?(\?[a-z=]+)?", fullmatch=True),
    compression=st.sampled_from(["none", "xz", "zstd", "bzip2", "gzip", "br", "lzip"]),
    file_hash=st.none() | st.tuples(st.just("sha256"), DIGESTS),
    file_size=st.none() | st.integers(0, 2**63 - 1),
    ipfs_cid=st.none() | st.just("bafyreigh2akiscaildcqabsyg3dfr6chu3fgpregiymsck7e7aqa4s52zy"),
)


@pytest.mark.parametrize("each", vectors("accept"))
def test_accepted_vectors(each):
    narinfo = parse(text(each), expect=path(each))
    assert narinfo.info.path == path(each)
    assert parse(text(each).decode(), expect=path(each).digest) == narinfo
    assert parse(narinfo.format(), expect=path(each)) == narinfo


@pytest.mark.parametrize("each", [v for v in vectors("reject") if v.values[0]["stage"] in ("parse", "identity")])
def test_rejected_vectors(each):
    with pytest.raises(NarInfoError):
        parse(text(each), expect=path(each))


def test_what_a_plain_one_says():
    narinfo = parse(text(vector("plain")))
    info = narinfo.info
    assert str(info.path) == "/nix/store/szx47aljd1j60hay02cciicyqnmgk5hn-appb"
    assert narinfo.url == "nar/0mhby85dckxfbn34msaah8rw98v53v2rg1m8if051sr7xqh7y1n7.nar"
    assert (narinfo.compression, narinfo.file_size, info.nar_size) == ("none", 552, 552)
    assert narinfo.file_hash == ("sha256", info.nar_hash)
    assert [str(each) for each in info.references] == ["/nix/store/ycpj7vr6z82hk6qb0zdjcwdmf1z4sr4a-liba"]
    assert str(info.deriver) == "/nix/store/3gx6zynhkk16mdcc94xw9fj738qfnylw-appb.drv"
    assert [each.key_name for each in narinfo.signatures] == ["lab-1"]
    assert info.ca is None and narinfo.ipfs_cid is None
    assert narinfo.format().encode() == text(vector("plain"))


def test_no_compression_means_bzip2():
    lines = text(vector("plain")).splitlines(keepends=True)
    without = b"".join(line for line in lines if not line.startswith(b"Compression"))
    assert parse(without).compression == "bzip2"


def test_spellings_of_one_hash_are_one_narinfo():
    plain = parse(text(vector("plain")))
    for name in ("hash-base16", "hash-base64", "hash-sri", "order", "unknown-field"):
        assert dataclasses.replace(parse(text(vector(name))), file_hash=None) == dataclasses.replace(
            plain, file_hash=None
        )


@given(NARINFOS)
def test_round_trip(narinfo):
    assert parse(narinfo.format(), expect=narinfo.info.path) == narinfo


@given(NARINFOS, st.data())
def test_cut_anywhere_but_after_a_line_it_is_refused(narinfo, data):
    whole = narinfo.format()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    if not cut.endswith("\n"):
        with pytest.raises(NarInfoError):
            parse(cut)


@given(st.binary(max_size=300) | st.text(max_size=300))
def test_noise_is_refused_by_name(noise):
    with pytest.raises(NarInfoError):
        parse(noise)


@given(NARINFOS, st.integers(0, 10**6), st.integers(0, 255))
def test_a_changed_byte_changes_the_meaning_or_is_refused(narinfo, where, value):
    """Never an error of another kind, whatever a cache sends."""
    changed = bytearray(narinfo.format().encode())
    changed[where % len(changed)] = value
    try:
        parse(bytes(changed))
    except NarInfoError as error:
        assert len(str(error)) < 700


@pytest.mark.parametrize("line", ["URL: nar/b.nar", "NarSize: 552", "StorePath: /nix/store/" + "0" * 32 + "-x"])
def test_two_lines_of_one_key(line):
    with pytest.raises(NarInfoError, match="two lines"):
        parse(text(vector("plain")) + line.encode() + b"\n")


@pytest.mark.parametrize("blank", ["\u00a0", "\u2003", "\u0085", "\u2028"])
def test_references_are_separated_by_blanks_of_ascii_alone(blank):
    """As Nix reads them: else we would see two references where it sees a name that cannot be."""
    plain = text(vector("plain")).decode()
    with pytest.raises(NarInfoError, match="not a store path"):
        parse(plain.replace("References: ", f"References: {'0' * 32}-x{blank}"))


def test_bounds():
    plain = text(vector("plain"))
    with pytest.raises(NarInfoError, match="larger than"):
        parse(plain + b"X: " + b"x" * MAX_NARINFO + b"\n")
    sig = next(line for line in plain.splitlines(keepends=True) if line.startswith(b"Sig"))
    assert len(parse(plain + sig * (MAX_SIGNATURES - 1)).signatures) == MAX_SIGNATURES
    with pytest.raises(NarInfoError, match="signatures"):
        parse(plain + sig * MAX_SIGNATURES)
