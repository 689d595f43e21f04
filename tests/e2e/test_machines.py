"""Whole machines in network namespaces: stock Nix, whose only substituter is the gateway on its own loopback.

What one machine's Nix has, another's installs, whoever is slow, gone, lying or unsigned meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from swarmlib import lab as laboratory
from swarmlib.crossing import Node, Site, until
from swarmlib.lab import Lab

from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.storepath import StorePath
from tests.e2e.machines import KEY, Publisher, closure, consumer, http_server, publisher, wait_announced

pytestmark = [pytest.mark.nix, pytest.mark.root, pytest.mark.slow]

MIB = 1 << 20
MIN_CHUNK = 64 << 10
OTHER = SecretKey.generate("stranger-1")
FORGED = SecretKey(KEY.name, OTHER.seed)


@pytest.fixture(scope="module")
def _namespaces() -> None:
    reason = laboratory.available()
    if reason is not None:
        pytest.skip(f"network namespaces with nftables: {reason}")


@pytest.fixture
def site(_namespaces: None, tmp_path: Path) -> Iterator[Site]:
    with Lab() as lab, Site(lab, tmp_path) as site:
        yield site


@pytest.fixture
def via(site: Site) -> list[Node]:
    """Where all meet: a node that has nothing."""
    return [site.node("meeting")]


def quiet(stderr: str) -> bool:
    """Whether Nix had nothing to complain about."""
    said = [line for line in stderr.splitlines() if "--add-root" not in line]
    return not any(word in line for line in said for word in ("error", "warning", "retry", "unable"))


@pytest.mark.parametrize("how", ["realise", "copy"])
def test_an_empty_machine_installs_what_another_has(site: Site, via: list[Node], how: str) -> None:
    p = publisher(site, "p", closure("one", 40, 12 * MIB), via=via)
    c = consumer(site, "c", via=via)
    done = c.install(p.top, how)
    assert done.returncode == 0 and quiet(done.stderr), done.stderr
    c.check(p)
    assert c.received().keys() == {p.node.peer_id}


def three(site: Site, via: list[Node], seed: str, size: int, rate: str) -> list[Publisher]:
    """Three that have the same."""
    parts = closure(seed, 30, size)
    return [publisher(site, label, parts, via=via, rate=rate) for label in ("p", "q", "r")]


def test_all_who_have_a_closure_give_of_it(site: Site, via: list[Node]) -> None:
    publishers = three(site, via, "three", 24 * MIB, "40mbit")
    c = consumer(site, "c", via=via)
    done = c.install(publishers[0].top)
    assert done.returncode == 0 and quiet(done.stderr), done.stderr
    c.check(publishers[0])
    received = c.received()
    print(f"received: {received}")
    assert received.keys() == {each.node.peer_id for each in publishers}
    assert min(received.values()) > 0.15 * sum(received.values())


@pytest.mark.parametrize("how", ["killed", "silent"])
def test_a_machine_that_is_gone_midway_is_not_noticed_by_nix(site: Site, via: list[Node], how: str) -> None:
    publishers = three(site, via, "gone", 24 * MIB, "20mbit")
    c = consumer(site, "c", via=via)
    victim = publishers[1].node
    running = c.begin(publishers[0].top)
    until(lambda: c.received().get(victim.peer_id, 0) > MIB, 60, "something has come from the one that will die")
    assert running.poll() is None and sum(c.received().values()) < 16 * MIB
    if how == "killed":
        victim.daemon.kill()
    else:
        victim.host.cut()  # the power is gone, and nobody is told
    done = running.wait(120)
    assert done.code == 0 and quiet(done.stderr), done.stderr
    print(f"{how}: {done.seconds:.1f} s")
    c.check(publishers[0])


def spoil(p: Publisher, count: int) -> StorePath:
    """Flip a bit in each chunk of the `count` largest files of a store, as a failing disk does: their times stay.

    Returns the path with the largest.
    """
    files = [each for each in (p.nix.root / "nix/store").rglob("*") if each.is_file() and not each.is_symlink()]
    files.sort(key=lambda each: each.stat().st_size, reverse=True)
    for file in files[:count]:
        before = file.stat()
        data = bytearray(file.read_bytes())
        for offset in range(0, len(data), MIN_CHUNK):
            data[offset] ^= 1
        file.chmod(0o644)
        file.write_bytes(data)
        file.chmod(0o444)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    return next(path for path in p.paths if files[0].is_relative_to(p.nix.real(path)))


def test_a_changed_byte_is_not_noticed_by_nix_where_others_have_it_right(site: Site, via: list[Node]) -> None:
    publishers = three(site, via, "changed", 24 * MIB, "40mbit")
    spoil(publishers[0], 40)  # whatever it is asked for, nearly
    c = consumer(site, "c", via=via)
    done = c.install(publishers[0].top)
    assert done.returncode == 0 and quiet(done.stderr), done.stderr
    c.check(publishers[1])
    assert publishers[0].node.status()["problems"]  # it was asked, looked, and said nothing of what it found


def test_a_changed_byte_of_the_only_copy_is_an_error_that_nix_tells(site: Site, via: list[Node]) -> None:
    p = publisher(site, "p", closure("changed alone", 30, 12 * MIB), via=via)
    spoilt = spoil(p, 1)
    c = consumer(site, "c", via=via)
    done = c.install(p.top)
    assert done.returncode != 0 and "error:" in done.stderr and f"'{spoilt}'" in done.stderr, done.stderr
    assert spoilt not in c.nix.valid() and p.top not in c.nix.valid()
    for path in c.nix.valid():
        c.nix.nix("store", "verify", "--option", "trusted-public-keys", str(KEY.public_key()), str(path))


@pytest.mark.parametrize("key", [None, OTHER, FORGED], ids=["unsigned", "strange", "forged"])
def test_what_the_trusted_key_has_not_signed_is_refused(site: Site, via: list[Node], key: SecretKey | None) -> None:
    p = publisher(site, "p", closure("untrusted", 12, MIB), via=via, key=key)
    c = consumer(site, "c", via=via)
    for how in ("realise", "copy"):
        done = c.install(p.top, how)
        assert done.returncode != 0 and str(p.top) in done.stderr, done.stderr
    assert "not offered" in c.node.daemon.log or "is not trusted" in c.node.daemon.log
    # A gateway that lets everything through: Nix refuses by itself, and says why.
    lax = consumer(site, "d", via=via, require_signatures="off")
    for how, said in (("realise", "is not signed by any of the keys"), ("copy", "lacks a valid signature")):
        done = lax.install(p.top, how)
        assert done.returncode != 0 and said in done.stderr, done.stderr
    assert not c.nix.valid() and not lax.nix.valid()


def test_the_narinfos_of_an_upstream_cache_and_the_nars_of_the_swarm(
    site: Site, via: list[Node], tmp_path: Path
) -> None:
    p = publisher(site, "p", closure("upstream", 30, 12 * MIB), via=via, key=None)
    cache, nars, key = tmp_path / "cache", tmp_path / "nars", tmp_path / "key"
    key.write_text(str(KEY))
    p.nix.copy_to(f"file://{cache}?secret-key={key}&compression=zstd", p.top)
    (cache / "nar").rename(nars)  # signed narinfos, and nothing else
    host = site.lab.host("upstream")
    with http_server(host, cache) as server:
        c = consumer(site, "c", via=via, gateway_upstreams=[server.url])
        done = c.install(p.top)
        assert done.returncode == 0 and quiet(done.stderr), done.stderr
        assert not [each for each in server.requests if "/nar/" in each]
        assert sum(c.received().values()) > 12 * MIB
        c.check(p)
        p.node.daemon.stop()
        c.node.daemon.stop()

        # Now the swarm is empty and the NARs are back.
        nars.rename(cache / "nar")
        d = consumer(site, "d", via=via, gateway_upstreams=[server.url])
        done = d.install(p.top)
        assert done.returncode == 0 and quiet(done.stderr), done.stderr
        assert len([each for each in server.requests if "/nar/" in each]) == len(p.paths)
        d.check(p)
    # The cache is gone. What it gave is had from the node that got it.
    wait_announced(d.node)
    e = consumer(site, "e", via=via)
    done = e.install(p.top)
    assert done.returncode == 0 and quiet(done.stderr), done.stderr
    e.check(p)
    assert e.received().keys() == {d.node.peer_id}
