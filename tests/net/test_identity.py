from __future__ import annotations

import logging
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from p2pnode.errors import ConfigError
from p2pnode.net.identity import FILE_NAME, Identity


def test_peer_id_and_file_are_the_librarys(tmp_path: Path) -> None:
    from libp2p.crypto.ed25519 import create_new_key_pair
    from libp2p.peer.id import ID

    identity = Identity.load(tmp_path)
    pair = create_new_key_pair(identity.seed)
    assert str(ID.from_pubkey(pair.public_key)) == identity.peer_id
    assert pair.public_key.to_bytes() == identity.public_key


def test_known_vector() -> None:
    """The Ed25519 example of the peer id specification (libp2p/specs, peer-ids.md, test vectors)."""
    private = bytes.fromhex(
        "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
        "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
    )
    identity = Identity.from_seed(private[4:36])
    assert identity.public_key == private[36:]
    assert identity.peer_id == "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"


def test_created_once_private_and_whole(tmp_path: Path) -> None:
    first = Identity.load(tmp_path / "home")
    assert Identity.load(tmp_path / "home") == first
    path = tmp_path / "home" / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [FILE_NAME]
    assert first.seed.hex() not in repr(first)


def test_of_two_first_starts_one_identity_remains(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from p2pnode.net.identity import Identity
print(Identity.load(Path(sys.argv[1])).peer_id)
"""
    processes = [subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) for _ in range(4)]
    ids = {process.communicate(timeout=60)[0] for process in processes}
    assert ids == {Identity.load(tmp_path).peer_id.encode() + b"\n"}


@pytest.mark.parametrize("data", [b"", b"rubbish", b"\x08\x01\x12\x40" + bytes(64), b"\x08\x01\x12\x40" + bytes(65)])
def test_a_bad_file_is_named_and_kept(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=str(path)):
        Identity.load(tmp_path)
    assert path.read_bytes() == data


def test_a_readable_key_is_closed_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    identity = Identity.load(tmp_path)
    path = tmp_path / FILE_NAME
    path.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert Identity.load(tmp_path) == identity
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "0644" in caplog.text


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="identity"):
        Identity.load(tmp_path / "file")


@pytest.mark.parametrize("module", ["identity", "addresses", "addressbook", "dialler", "mdns", "transport"])
def test_cheap_modules_do_not_import_libp2p(module: str) -> None:
    code = f"import sys, p2pnode.net.{module}; sys.exit('libp2p' in sys.modules or 'zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
