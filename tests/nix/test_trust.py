from __future__ import annotations

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.errors import EXIT_TRUST, ConfigError, NarError, NarInfoError, Untrusted, VerificationFailed
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.content_address import ContentCheck, names_path, proved_by_nar_hash
from p2pnode.nix.hashes import DIGEST_SIZES
from p2pnode.nix.nar_format import nar_string
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import PublicKey, SecretKey
from p2pnode.nix.storepath import CAMethod, ContentAddress, StorePath, make_ca_path, make_fixed_output_path
from p2pnode.nix.trust import Policy, Proof, TrustedKeys, judge, require
from tests.nix.caches import KEYS, OTHER_SECRET, SECRET, TRUSTED, nar, path, text, vector, vectors
from tests.nix.stores import ChrootStore
from tests.nix.test_narinfo import INFOS
from tests.nix.trees import File, make


@pytest.mark.parametrize("each", vectors("accept"))
def test_accepted_vectors(each):
    narinfo = parse(text(each), expect=path(each))
    verdict = require(narinfo.info, narinfo.signatures, KEYS, Policy.ALWAYS)
    assert verdict.trusted and not (verdict.signed_by and verdict.needs_contents)
    if verdict.needs_contents:
        check = ContentCheck(narinfo.info)
        check.feed(nar(narinfo.url))
        check.finish()


@pytest.mark.parametrize("each", [v for v in vectors("reject") if v.values[0]["stage"] == "signature"])
def test_vectors_that_nobody_vouches_for(each):
    try:
        narinfo = parse(text(each), expect=path(each))
    except NarInfoError:
        assert each["name"] in ("sig-not-base64", "sig-short", "sig-empty-name")
        return
    assert not judge(narinfo.info, narinfo.signatures, KEYS).trusted
    for policy in (Policy.ALWAYS, Policy.IF_KEYS):
        with pytest.raises(Untrusted, match=str(narinfo.info.path)) as caught:
            require(narinfo.info, narinfo.signatures, KEYS, policy)
        assert caught.value.exit_code == EXIT_TRUST
        assert "'lab-1'" in str(caught.value)
    assert require(narinfo.info, narinfo.signatures, KEYS, Policy.OFF).proof is Proof.NONE
    assert require(narinfo.info, narinfo.signatures, TrustedKeys(), Policy.IF_KEYS).proof is Proof.NONE


def test_a_ca_path_with_a_wrong_nar_hash_is_refuted_before_its_contents():
    narinfo = parse(text(vector("ca-narhash-wrong")))
    assert names_path(narinfo.info) and not proved_by_nar_hash(narinfo.info)
    assert not judge(narinfo.info, (), KEYS).trusted


def test_the_complaint_names_the_keys_seen():
    plain = parse(text(vector("plain"))).info
    other = OTHER_SECRET.sign(plain)
    with pytest.raises(Untrusted, match=r"signed by 'lab-2' \(trusted here: 'lab-1'\)"):
        require(plain, [other], KEYS, Policy.ALWAYS)
    with pytest.raises(Untrusted, match=r"no signature"):
        require(plain, [], KEYS, Policy.ALWAYS)
    with pytest.raises(Untrusted, match=r"in the name of 'lab-1' is wrong"):
        require(plain, [dataclasses.replace(other, key_name="lab-1")], KEYS, Policy.ALWAYS)
    with pytest.raises(Untrusted, match="no key is trusted here"):
        require(plain, [other], TrustedKeys(), Policy.ALWAYS)


@given(INFOS, st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6))
def test_trusted_if_and_only_if_a_trusted_key_signed_just_this(info, made):
    info = dataclasses.replace(info, ca=None)
    secrets = [SecretKey(f"k{number}", bytes([number]) * 32) for number in range(4)]
    keys = TrustedKeys(secret.public_key() for secret in secrets[:2])
    other = dataclasses.replace(info, nar_size=info.nar_size ^ 1)
    signatures = [secrets[number].sign(info if right else other) for number, right in made]
    verdict = judge(info, signatures, keys)
    good = {f"k{number}" for number, right in made if right and number < 2}
    assert set(verdict.signed_by) == good and verdict.trusted == bool(good)
    assert set(verdict.seen) == {f"k{number}" for number, _ in made}
    assert set(verdict.forged) == {f"k{number}" for number, _ in made if number < 2} - good


def test_of_two_keys_with_one_name_the_first_counts():
    plain = parse(text(vector("plain"))).info
    impostor = PublicKey(TRUSTED.name, OTHER_SECRET.public_key().value)
    assert judge(plain, [SECRET.sign(plain)], TrustedKeys([TRUSTED, impostor])).trusted
    assert not judge(plain, [SECRET.sign(plain)], TrustedKeys([impostor, TRUSTED])).trusted


def test_keys_of_several_sources():
    keys = TrustedKeys.parse(("nix.conf", [str(TRUSTED)]), ("config.toml", [str(OTHER_SECRET.public_key())]))
    assert keys.names == ("lab-1", "lab-2") and keys and not TrustedKeys()
    with pytest.raises(ConfigError, match=r"config\.toml.*'x'"):
        TrustedKeys.parse(("config.toml", ["x:AAAA"]))


# Content addresses


def file_nar(data: bytes, executable: bool = False) -> bytes:
    tokens = [b"nix-archive-1", b"(", b"type", b"regular", *([b"executable", b""] if executable else []), b"contents"]
    return b"".join(map(nar_string, [*tokens, data, b")"]))


def info_of(address: ContentAddress, stored: bytes, references: tuple[StorePath, ...] = ()) -> PathInfo:
    path = make_ca_path(address, "some-name", references)
    return PathInfo(path, hashlib.sha256(stored).digest(), len(stored), references, None, str(address))


@pytest.mark.parametrize(
    "method, algorithm",
    [
        (CAMethod.TEXT, "sha256"),
        *((method, name) for method in (CAMethod.FLAT, CAMethod.RECURSIVE) for name in DIGEST_SIZES),
    ],
)
@pytest.mark.parametrize("step", [1, 7, 4096])
def test_contents_decide(method, algorithm, step):
    data = b"some contents " * 20
    stored = file_nar(data)
    hashed = stored if method is CAMethod.RECURSIVE else data
    info = info_of(ContentAddress(method, algorithm, hashlib.new(algorithm, hashed).digest()), stored)
    verdict = judge(info, (), KEYS)
    assert verdict.proof is Proof.CONTENT
    assert verdict.needs_contents == ((method, algorithm) != (CAMethod.RECURSIVE, "sha256"))

    def fed(stream: bytes) -> ContentCheck:
        check = ContentCheck(info)
        for at in range(0, len(stream), step):
            check.feed(stream[at : at + step])
        return check

    fed(stored).finish()
    with pytest.raises(VerificationFailed, match="some-name"):
        fed(file_nar(data.replace(b"some", b"sone", 1))).finish()
    if method is not CAMethod.RECURSIVE:
        with pytest.raises(NarError, match="executable"):
            fed(file_nar(data, executable=True))
        with pytest.raises(NarError):
            fed(stored[:-8]).finish()


def test_a_content_address_that_gives_another_path_proves_nothing():
    stored = file_nar(b"x")
    info = info_of(ContentAddress(CAMethod.RECURSIVE, "sha256", hashlib.sha256(stored).digest()), stored)
    assert proved_by_nar_hash(info)
    reference = StorePath("0" * 32, "r")
    for changed in (
        dataclasses.replace(info, path=StorePath(info.path.digest, "other")),
        dataclasses.replace(info, references=(reference,)),
        dataclasses.replace(info, references=(info.path,)),
        dataclasses.replace(info, ca=None),
        dataclasses.replace(info, ca="fixed:r:sha256:" + "0" * 52),
        dataclasses.replace(info, ca="fixed:sha256:" + "0" * 52, references=(reference,)),
        dataclasses.replace(info, ca="nonsense"),
    ):
        assert not names_path(changed) and not judge(changed, (), KEYS).trusted
        with pytest.raises(VerificationFailed):
            ContentCheck(changed)


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=6), st.integers(1, 64), st.booleans())
def test_self_references_in_both_variants(parts, step, with_offsets):
    """The hash is taken over a stream made with NULs for the digest, which is only known afterwards."""
    blank = bytes(32).join(parts)
    offsets, at = [], 0
    for part in parts[:-1]:
        at += len(part)
        offsets.append(at)
        at += 32
    suffix = b"".join(b"|%d" % offset for offset in offsets) if with_offsets else b""
    address = ContentAddress(CAMethod.RECURSIVE, "sha256", hashlib.sha256(blank + suffix).digest())
    own = make_fixed_output_path(address, "self", self_reference=True)
    stream = own.digest.encode().join(parts)
    info = PathInfo(own, hashlib.sha256(stream).digest(), len(stream), (own,), None, str(address))
    assert judge(info, (), KEYS).needs_contents

    def check(stream: bytes) -> None:
        check = ContentCheck(info)
        for at in range(0, len(stream), step):
            check.feed(stream[at : at + step])
        check.finish()

    check(stream)
    with pytest.raises(VerificationFailed):
        check(stream + b"x")


def test_the_vector_that_refers_to_itself_is_checked_with_nix_own_hash():
    narinfo = parse(text(vector("ca-self-reference")))
    stored = nar(narinfo.url)
    for cut in range(0, len(stored), 13):  # an occurrence may be cut by the pieces of a stream
        check = ContentCheck(narinfo.info)
        check.feed(stored[:cut])
        check.feed(stored[cut:])
        check.finish()


@pytest.mark.nix
def test_what_nix_adds_proves_itself(tmp_path):
    store = ChrootStore(tmp_path / "store")
    make({b"a": File(b"x" * 5000, True), b"b": {b"c": File(b"", False)}}, tmp_path / "tree")
    (tmp_path / "flat").write_bytes(b"contents")
    added = [store.add(tmp_path / "tree"), store.add(tmp_path / "flat")]
    for algorithm in ("md5", "sha1", "sha256", "sha512"):
        added.append(StorePath.parse(store.nix_store("--add-fixed", algorithm, tmp_path / "flat").strip()))
        added.append(
            StorePath.parse(store.nix_store("--add-fixed", "--recursive", algorithm, tmp_path / "tree").strip())
        )
    for said in store.info(*dict.fromkeys(added)):
        assert judge(said.info, said.signatures, KEYS).proof is Proof.CONTENT
        check = ContentCheck(said.info)
        check.feed(store.run_bytes("nix-store", "--dump", str(store.real(said.info.path))))
        check.finish()
