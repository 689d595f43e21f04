from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import SignatureError
from p2pnode.nix.hashes import nix32_encode, parse_sha256
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import PublicKey, SecretKey, Signature, fingerprint, merged
from p2pnode.nix.storepath import StorePath
from tests.nix.caches import INDEX, OTHER_SECRET, SECRET, TRUSTED, text, vector, vectors
from tests.nix.stores import NIX, ChrootStore, info_of_json
from tests.nix.test_narinfo import INFOS

SEEDS = st.binary(min_size=32, max_size=32)


@pytest.mark.parametrize(
    "each", [each for each in vectors("accept") if each.values[0]["path"] in INDEX["fingerprints"]]
)
def test_fingerprints_and_signatures_of_the_vectors(each):
    said = INDEX["fingerprints"][each["path"]]
    info = parse(text(each)).info
    assert fingerprint(info) == said["fingerprint"].encode()
    assert str(SECRET.sign(info)) == said["sig"]


@pytest.mark.parametrize("kind", INDEX["secret_keys"])
def test_key_files(kind):
    secret = SecretKey.parse(INDEX["secret_keys"][kind])
    assert str(secret) == INDEX["secret_keys"][kind]
    assert str(secret.public_key()) == INDEX["public_keys"][kind]
    assert SecretKey.parse(f"{secret}\n") == secret
    assert PublicKey.parse(str(secret.public_key())) == secret.public_key()


def test_a_secret_is_not_shown():
    assert SECRET.seed.hex() not in repr(SECRET) and repr(SECRET.seed) not in repr(SECRET)


def test_a_secret_key_whose_halves_differ_is_refused():
    mixed = Signature("k", SECRET.seed + OTHER_SECRET.public_key().value)  # 64 bytes, spelled the same way
    with pytest.raises(SignatureError, match="damaged"):
        SecretKey.parse(str(mixed))


@pytest.mark.parametrize(
    "spelled",
    ["", "k", "k:", ":AAAA", "k:!!!!", "k:AAAA", "a b:" + "A" * 86 + "==", "k:" + "A" * 85 + "B==", "k\n:AA=="],
)
def test_malformed(spelled):
    for kind in (Signature, PublicKey, SecretKey):
        with pytest.raises(SignatureError):
            kind.parse(spelled)


@given(SEEDS, INFOS)
def test_sign_and_verify(seed, info):
    secret = SecretKey("some-1", seed)
    signature = secret.sign(info)
    assert Signature.parse(str(signature)) == signature
    public = secret.public_key()
    assert public.verifies(info, signature)
    assert public.verifies(dataclasses.replace(info, deriver=None, ca=None), signature)  # neither is signed
    assert public.verifies(dataclasses.replace(info, references=info.references[::-1] * 2), signature)  # a set
    assert not public.verifies(dataclasses.replace(info, nar_size=info.nar_size ^ 1), signature)
    assert not public.verifies(dataclasses.replace(info, nar_hash=bytes(byte ^ 1 for byte in info.nar_hash)), signature)
    assert not public.verifies(
        dataclasses.replace(info, path=StorePath(info.path.digest, info.path.name + "x")), signature
    )
    more = (*info.references, StorePath("0" * 32, "more"))
    assert not public.verifies(dataclasses.replace(info, references=more), signature)
    assert not TRUSTED.verifies(info, signature)
    assert not public.verifies(info, dataclasses.replace(signature, key_name="some-2"))


def test_a_key_that_is_no_point_verifies_nothing():
    info = parse(text(vector("plain"))).info
    for value in (bytes(32), b"\xff" * 32, b"\x02" + bytes(31)):
        assert not PublicKey(SECRET.name, value).verifies(info, SECRET.sign(info))


def test_merged():
    info = parse(text(vector("plain"))).info
    one, two = SECRET.sign(info), OTHER_SECRET.sign(info)
    assert merged([two, one], [one]) == merged([one], [two]) == (one, two)


@pytest.mark.nix
class TestAgainstNix:
    def test_generated_keys_are_read_by_each_other(self, tmp_path):
        theirs = subprocess.run(
            [*NIX, "key", "generate-secret", "--key-name", "their-1"], check=True, capture_output=True, text=True
        ).stdout
        public = subprocess.run(
            [*NIX, "key", "convert-secret-to-public"], input=theirs, check=True, capture_output=True, text=True
        ).stdout
        assert str(SecretKey.parse(theirs).public_key()) == public.strip()
        ours = SecretKey.generate("our-1")
        public = subprocess.run(
            [*NIX, "key", "convert-secret-to-public"], input=str(ours), check=True, capture_output=True, text=True
        ).stdout
        assert PublicKey.parse(public.strip()) == ours.public_key()

    @settings(max_examples=20, deadline=None)
    @given(st.binary(min_size=32, max_size=32))
    def test_base32(self, digest):
        for command in (
            ["nix-hash", "--type", "sha256", "--to-base32"],
            [*NIX, "hash", "to-base32", "--type", "sha256"],
        ):
            printed = subprocess.run(
                [*command, digest.hex()], check=True, capture_output=True, text=True
            ).stdout.strip()
            assert printed == nix32_encode(digest)
        assert parse_sha256(f"sha256:{printed}") == digest

    def test_the_same_signatures_as_nix_makes(self, tmp_path):
        """A store with random trees, signed by Nix and by us with one key; then verified by Nix with ours."""
        store = ChrootStore(tmp_path)
        keys = [SecretKey.generate(f"key-{number}") for number in range(3)]
        paths = []
        for number in range(6):
            tree = tmp_path / f"tree{number}"
            tree.mkdir()
            (tree / "f").write_bytes(os.urandom(number * 37))
            paths.append(store.nix_store("--add", tree).strip())
        for number, key in enumerate(keys):
            (tmp_path / f"sec{number}").write_text(str(key))
            store.nix("store", "sign", "-k", tmp_path / f"sec{number}", *paths)
        for said in json.loads(store.nix("path-info", "--json", *paths)):
            info = info_of_json(said)
            ours = sorted(str(key.sign(info)) for key in keys)
            assert sorted(said["signatures"]) == ours
            for signature in map(Signature.parse, said["signatures"]):
                assert any(key.public_key().verifies(info, signature) for key in keys)

    def test_our_signatures_satisfy_nix_store_verify(self, tmp_path):
        store = ChrootStore(tmp_path)
        source = Path(tmp_path, "file")
        source.write_bytes(b"contents\n")
        added = store.nix_store("--add", source).strip()
        info = info_of_json(json.loads(store.nix("path-info", "--json", added))[0])
        key = SecretKey.generate("ours-1")
        cache = tmp_path / "cache"
        store.copy_to(f"file://{cache}?compression=none", added)
        narinfo_file = cache / f"{info.path.digest}.narinfo"
        narinfo = parse(narinfo_file.read_bytes(), expect=info.path)
        signed = dataclasses.replace(narinfo, signatures=(key.sign(narinfo.info),))
        narinfo_file.write_text(dataclasses.replace(signed, info=dataclasses.replace(signed.info, ca=None)).format())
        verify = [*NIX, "store", "verify", "--store", f"file://{cache}", "--sigs-needed", "1", added]
        for trusted, status in ((key.public_key(), 0), (TRUSTED, 2)):
            command = [*verify, "--option", "trusted-public-keys", str(trusted)]
            assert subprocess.run(command, capture_output=True, env=store.environ, check=False).returncode == status
