from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pnode import config
from p2pnode.errors import ConfigError
from protocols import manifest
from protocols.relay import RelayLimits

PEER = "12D3KooWRimWGdCxiJ1tQkGNr32WBUs5AVYkz3cxjZzMNQ9jukFw"


def test_defaults(tmp_path: Path) -> None:
    loaded = config.load(tmp_path, {}, {})
    assert loaded == config.Config(home=tmp_path, given=frozenset({"home"}))
    assert loaded.listen == ("/ip4/0.0.0.0/tcp/4747",)


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("gc_age_days = 1\ngc_min_copies = 1\nmdns = false\nchunk_size = 4096\n")
    environ = {"P2PNODE_GC_MIN_COPIES": "2", "NIX_IMAGE_CHUNK_SIZE": "8192", "P2PNODE_CHUNK_SIZE": "16384"}
    loaded = config.load(tmp_path, {"gc_age_days": None, "mdns": True}, environ)
    assert (loaded.gc_age_days, loaded.gc_min_copies, loaded.mdns, loaded.chunk_size) == (1, 2, True, 16384)
    assert loaded.given == {"home", "gc_age_days", "gc_min_copies", "mdns", "chunk_size"}


def test_old_names(tmp_path: Path) -> None:
    environ = {
        "NIX_IMAGE_CACHE_DIR": str(tmp_path),
        "NIX_IMAGE_CHUNK_SIZE": "1048576",
        "NIX_IMAGE_GC_AGE_DAYS": "9",
        "NIX_IMAGE_GC_MIN_COPIES": "3",
    }
    loaded = config.load(None, {}, environ)
    assert (loaded.home, loaded.chunk_size, loaded.gc_age_days, loaded.gc_min_copies) == (tmp_path, 1 << 20, 9, 3)
    assert config.load(None, {}, environ | {"P2PNODE_HOME": str(tmp_path / "new")}).home == tmp_path / "new"
    assert config.load(tmp_path / "option", {}, environ).home == tmp_path / "option"


def test_lists_from_the_environment(tmp_path: Path) -> None:
    addrs = f"/ip4/192.0.2.7/tcp/1/p2p/{PEER},/dns4/a.example/tcp/2/p2p/{PEER}"
    loaded = config.load(tmp_path, {}, {"P2PNODE_BOOTSTRAP": addrs})
    assert list(loaded.bootstrap) == addrs.split(",")


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("lisen = []", ["lisen", "did you mean 'listen'"]),
        ("home = '/x'", ["home", "--home"]),
        ("listen = 3", ["listen", "list"]),
        ("listen = ['/ip4/1.2.3.4/udp/1']", ["listen", "udp"]),
        ("bootstrap = ['/ip4/192.0.2.7/tcp/1']", ["bootstrap", "/p2p/"]),
        ("mdns = 1", ["mdns", "true or false"]),
        ("reachability = 'maybe'", ["reachability", "auto, public, private"]),
        ("relays = ['/ip4/192.0.2.7/tcp/1']", ["relays", "/p2p/"]),
        ("relay_bandwidth = -1", ["relay_bandwidth", "bytes per second"]),
        ("chunk_size = 4095", ["chunk_size", "4096"]),
        ("chunk_size = 4194305", ["chunk_size", "4194304"]),
        ("chunk_size = true", ["chunk_size"]),
        ("gc_age_days = -1", ["gc_age_days"]),
        ("gc_age_days = 1.5", ["gc_age_days"]),
        ("log_level = 'loud'", ["log_level", "debug"]),
        ("nix_store = ''", ["nix_store"]),
        ("trusted_public_keys = ['x:AA==']", ["trusted_public_keys", "NAME:BASE64"]),
        ("require_signatures = 'sometimes'", ["require_signatures", "if-keys"]),
        ("sign_keys = ['key']", ["sign_keys", "absolute"]),
        ("announce_rate = 0", ["announce_rate"]),
        ("x = = 1", ["TOML"]),
        ("a = " + "[" * 5000, ["TOML"]),
    ],
)
def test_bad_files(tmp_path: Path, toml: str, words: list[str]) -> None:
    path = tmp_path / "config.toml"
    path.write_text(toml)
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path, {}, {})
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("P2PNODE_MDNS", "maybe"),
        ("P2PNODE_CHUNK_SIZE", "big"),
        ("P2PNODE_CHUNK_SIZE", "٣٠٠٠٠"),
        ("NIX_IMAGE_GC_AGE_DAYS", "-3"),
        ("P2PNODE_LISTN", "x"),
    ],
)
def test_bad_environment(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config.load(tmp_path, {}, {name: value})


def test_variables_of_others_are_left_alone(tmp_path: Path) -> None:
    environ = {"P2PNODE_PORT": "tcp://10.0.0.1:80", "P2PNODE_SERVICE_HOST": "10.0.0.1", "P2PNODE_JSON": "1"}
    assert config.load(tmp_path, {}, environ) == config.load(tmp_path, {}, {})


def test_unknown_override(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the command line"):
        config.load(tmp_path, {"colour": 1}, {})


def test_limits_are_those_of_the_format() -> None:
    assert config.MAX_CHUNK == manifest.MAX_CHUNK
    manifest.Chunking.from_value(["fixed", config.MIN_CHUNK])


@given(st.text(max_size=200))
def test_any_text_loads_or_is_a_config_error(text: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            config.load(Path(directory), {}, {})
        except ConfigError as exc:
            assert "\n" not in str(exc).replace(directory, "") or "TOML" in str(exc)


def test_the_relays_limits_are_the_protocols_own(tmp_path: Path) -> None:
    """Written twice, as reading the configuration must not import the protocols."""
    loaded, limits = config.load(tmp_path, {}, {}), RelayLimits()
    assert (loaded.relay_reservations, loaded.relay_circuits) == (limits.max_reservations, limits.max_circuits)
    assert loaded.relay_circuits_per_peer == limits.max_circuits_per_peer
    assert (loaded.relay_circuit_bytes, loaded.relay_circuit_seconds) == (limits.circuit_bytes, limits.circuit_seconds)
    assert loaded.relay_bandwidth == limits.bandwidth
