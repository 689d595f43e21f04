from __future__ import annotations

from pathlib import Path

import pytest

from p2pnode import config
from p2pnode.errors import ConfigError


def test_defaults(tmp_path: Path) -> None:
    loaded = config.load(tmp_path, environ={})
    assert (loaded.gateway, loaded.gateway_upstreams, loaded.gateway_lookup_seconds) == ("", (), 3)


def test_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('gateway_upstreams = ["https://cache.nixos.org"]\ngateway_priority = 20\n')
    loaded = config.load(tmp_path, {"gateway": "[::1]:5080"}, environ={"P2PNODE_GATEWAY_COMPRESSION": "zstd"})
    assert loaded.gateway == "[::1]:5080" and loaded.gateway_upstreams == ("https://cache.nixos.org",)
    assert loaded.gateway_priority == 20 and loaded.gateway_compression == "zstd"


@pytest.mark.parametrize("value", ["5080", ":5080", "127.0.0.1", "127.0.0.1:http", "127.0.0.1:65536", "127.0.0.1:-1"])
def test_addresses_that_are_none(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        config.load(tmp_path, {"gateway": value}, environ={})
