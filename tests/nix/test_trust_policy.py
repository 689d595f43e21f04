"""Which keys count, and when a path without proof is refused: the table in the module's text, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pnode.errors import ConfigError
from p2pnode.nix.nixconf import DEFAULT_PUBLIC_KEYS, NixConf
from p2pnode.nix.registered import read_secret_keys, signed_with
from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.trust import Policy
from p2pnode.nix.trust_policy import decide, known_keys, of_fetch
from tests.nix.caches import closure

OURS, MACHINES = [str(SecretKey.generate(name).public_key()) for name in ("ours-1", "machine-1")]
PLAIN = NixConf()
WITH_KEY = NixConf({"trusted-public-keys": (*DEFAULT_PUBLIC_KEYS, MACHINES)})
NO_KEYS = NixConf({"trusted-public-keys": ()})
LAX = NixConf({"require-sigs": ("false",)})


@pytest.mark.parametrize(
    ("policy", "ours", "conf", "outside", "inside"),
    [
        (None, [], PLAIN, False, True),
        (None, [], WITH_KEY, False, True),
        (None, [OURS], PLAIN, True, True),
        (None, [], LAX, False, False),
        (None, [OURS], LAX, True, True),
        (None, [], NO_KEYS, False, True),
        (Policy.OFF, [OURS], WITH_KEY, False, False),
        (Policy.IF_KEYS, [], PLAIN, False, True),
        (Policy.IF_KEYS, [], NO_KEYS, False, False),
        (Policy.IF_KEYS, [], WITH_KEY, True, True),
        (Policy.IF_KEYS, [OURS], PLAIN, True, True),
        (Policy.IF_KEYS, [OURS], NO_KEYS, True, True),
        (Policy.ALWAYS, [], NO_KEYS, True, True),
        (Policy.ALWAYS, [], PLAIN, True, True),
    ],
)
def test_the_table(policy: Policy | None, ours: list[str], conf: NixConf, outside: bool, inside: bool) -> None:
    assert decide(policy, ours, [], conf, into_store=False).demanded is outside
    assert decide(policy, ours, [], conf, into_store=True).demanded is inside
    # A key of the command line counts as one of ours.
    assert decide(policy, [], ours, conf, into_store=False).demanded is outside
    assert decide(policy, ours, [], conf, into_store=True).off is (policy is Policy.OFF)


def test_ours_come_before_those_of_nix_conf() -> None:
    other = str(SecretKey.generate("machine-1").public_key())
    trust = decide(None, [other], [OURS], WITH_KEY, into_store=False)
    assert trust.keys.names == ("cache.nixos.org-1", "machine-1", "ours-1")
    signed = closure()[0][0]
    secret = SecretKey.generate("machine-1")
    keys = decide(None, [str(secret.public_key())], [], WITH_KEY, into_store=False).keys
    assert keys.verifying(signed.info, [secret.sign(signed.info)])


def test_malformed_keys() -> None:
    with pytest.raises(ConfigError, match="configuration of p2pnode"):
        decide(None, ["x:AA"], [], PLAIN, into_store=False)
    with pytest.raises(ConfigError, match=r"nix\.conf"):
        decide(None, [], [], NixConf({"trusted-public-keys": ("x",)}), into_store=True)


def test_a_broken_nix_conf_stops_only_what_goes_by_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIX_CONF_DIR", str(tmp_path))
    (tmp_path / "nix.conf").write_text("what is this\n")
    assert of_fetch(None, [OURS], [], into_store=False).keys.names == ("ours-1",)
    assert known_keys([OURS]).names == ("ours-1",)
    with pytest.raises(ConfigError):
        of_fetch(None, [OURS], [], into_store=True)


def test_key_files(tmp_path: Path) -> None:
    key = SecretKey.generate("k-1")
    (tmp_path / "good").write_text(str(key))
    assert read_secret_keys([tmp_path / "good"]) == [key]
    (signed,) = signed_with([key], [closure()[0][0]])
    assert key.public_key().verifies(signed.info, next(s for s in signed.signatures if s.key_name == "k-1"))
    for data in (b"", b"k-1:AA==", b"\xff" * 90, b"x" * 100_000):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(ConfigError, match="bad"):
            read_secret_keys([tmp_path / "bad"])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret_keys([tmp_path / "absent"])
