"""The lab's NATs do what their names say: shown with plain sockets, before anything is concluded from them.

RFC 4787 for the terms; RFC 5382 for TCP; RFC 5128 section 3.4 for the simultaneous open.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from swarmlib.lab import Host, Lab, Nat
from swarmlib.process import REPOSITORY, SwarmError

pytestmark = pytest.mark.root

PORT = 4747
SILENCE = 0.15  # s without a packet; nothing in the lab is slower than a few ms
WITHIN = 5.0
CONES = (Nat.FULL_CONE, Nat.PORT_RESTRICTED)


def udp(host: Host, port: int = 0) -> socket.socket:
    return host.socket(socket.SOCK_DGRAM, port)


def received(sock: socket.socket, seconds: float = WITHIN) -> tuple[bytes, tuple[str, int]] | None:
    """The next datagram and its sender, or None if none comes."""
    sock.settimeout(seconds)
    try:
        data, sender = sock.recvfrom(2048)
    except (TimeoutError, ConnectionRefusedError):
        return None
    return data, sender


def seen_from(sock: socket.socket, server: Host, port: int = PORT) -> tuple[str, int]:
    """The address under which a UDP socket appears at a public host."""
    with udp(server, port) as listening:
        sock.sendto(b"?", (server.address, port))
        got = received(listening)
    assert got is not None
    return got[1]


def tcp_seen_from(inside: Host, server: Host) -> tuple[str, int]:
    """The address under which a TCP connection from `PORT` of a host appears at a public host."""
    with server.socket(port=PORT) as listening, inside.socket(port=PORT) as dialling:
        listening.listen()
        dialling.settimeout(WITHIN)
        dialling.connect((server.address, PORT))
        accepted, address = listening.accept()
        accepted.close()
        return str(address[0]), int(address[1])


def connects(dialler: Host, address: tuple[str, int], seconds: float = WITHIN) -> str:
    """What comes of dialling: "connected", "refused" or "silence"."""
    with dialler.socket() as sock:
        sock.settimeout(seconds)
        try:
            sock.connect(address)
        except ConnectionRefusedError:
            return "refused"
        except TimeoutError:
            return "silence"
        return "connected"


def test_public_addresses_are_global_and_private_ones_private(lab: Lab) -> None:
    outer = lab.nat("outer", Nat.PORT_RESTRICTED)
    public, private = lab.host("public"), lab.host("private", outer)
    assert all(ipaddress.ip_address(address).is_global for address in (public.address, outer.address))
    assert ipaddress.ip_address(private.address).is_private


def test_the_lab_has_no_way_out(lab: Lab) -> None:
    inside = lab.host("a", lab.nat("n", Nat.FULL_CONE))
    public = lab.host("public")
    assert connects(inside, ("1.1.1.1", 443), SILENCE) == "silence"
    with public.socket() as sock, pytest.raises(OSError) as refused:
        sock.connect(("1.1.1.1", 443))
    assert refused.value.errno == errno.ENETUNREACH


@pytest.mark.parametrize("kind", Nat)
def test_mapping(lab: Lab, kind: Nat) -> None:
    """Cones keep one port for all destinations; a symmetric NAT takes another for each."""
    servers = [lab.host(f"s{number}") for number in range(2)]
    nat = lab.nat("n", kind)
    inside = lab.host("a", nat)
    with udp(inside, PORT) as sock:
        by_udp = {seen_from(sock, server) for server in servers}
    by_tcp = {tcp_seen_from(inside, server) for server in servers}
    for seen in (by_udp, by_tcp):
        assert {address for address, _ in seen} == {nat.address}
        ports = {port for _, port in seen}
        # Random ports are of some 60,000; that two are the same, or one the old one, happens once in 10,000 runs.
        assert ports == {PORT} if kind in CONES else len(ports) == 2 and PORT not in ports


@pytest.mark.parametrize("kind", Nat)
def test_udp_filtering(lab: Lab, kind: Nat) -> None:
    """Through the mapping made towards one host: who else gets in, from the same host's other port and from others."""
    server, stranger = lab.host("server"), lab.host("stranger")
    nat = lab.nat("n", kind)
    with udp(lab.host("a", nat), PORT) as inside, udp(server, PORT) as known, udp(server) as other_port:
        inside.sendto(b"?", (server.address, PORT))
        got = received(known)
        assert got is not None
        mapped = got[1]
        known.sendto(b"answer", mapped)
        assert received(inside) == (b"answer", (server.address, PORT))
        with udp(stranger) as other_host:
            for sender, text in ((other_port, b"other port"), (other_host, b"other host")):
                sender.sendto(text, mapped)
                heard = received(inside, SILENCE if kind is not Nat.FULL_CONE else WITHIN)
                assert (heard is not None) == (kind is Nat.FULL_CONE)


@pytest.mark.parametrize("kind", Nat)
@pytest.mark.parametrize("refuse", [False, True])
def test_tcp_filtering(lab: Lab, kind: Nat, refuse: bool) -> None:
    """A listener that has dialled out from its port can be dialled by strangers behind a full cone only."""
    server, stranger = lab.host("server"), lab.host("stranger")
    nat = lab.nat("n", kind, refuse=refuse)
    inside = lab.host("a", nat)
    outside = "refused" if refuse else "silence"
    with inside.socket(port=PORT) as listening:
        listening.listen()
        assert connects(stranger, (nat.address, PORT), SILENCE) == outside
        mapped = tcp_seen_from(inside, server)
        assert connects(stranger, mapped, SILENCE) == ("connected" if kind is Nat.FULL_CONE else outside)


def test_two_hosts_behind_one_nat_are_neighbours_and_share_its_address(lab: Lab) -> None:
    server = lab.host("server")
    nat = lab.nat("n", Nat.PORT_RESTRICTED)
    a, b = lab.host("a", nat), lab.host("b", nat)
    with udp(a, PORT) as first, udp(b, PORT) as second:
        at_server = seen_from(first, server), seen_from(second, server)
        assert [address for address, _ in at_server] == [nat.address] * 2
        assert at_server[0][1] == PORT and at_server[1][1] != PORT
        first.sendto(b"neighbour", (b.address, PORT))
        assert received(second) == (b"neighbour", (a.address, PORT))


@pytest.mark.parametrize("kind", [Nat.PORT_RESTRICTED, Nat.SYMMETRIC])
def test_double_nat(lab: Lab, kind: Nat) -> None:
    server = lab.host("server")
    outer = lab.nat("outer", Nat.PORT_RESTRICTED, network="100.64.7.0/24")
    inner = lab.nat("inner", kind, behind=outer)
    inside = lab.host("a", inner)
    assert inner.address.startswith("100.64.7.")
    address, port = tcp_seen_from(inside, server)
    assert address == outer.address
    assert (port == PORT) == (kind in CONES)


def test_a_forwarded_port(lab: Lab) -> None:
    stranger = lab.host("stranger")
    nat = lab.nat("n", Nat.SYMMETRIC)
    inside = lab.host("a", nat)
    with inside.socket(port=PORT) as listening:
        listening.listen()
        assert connects(stranger, (nat.address, 80), SILENCE) == "silence"
        nat.forward(80, inside, PORT)
        assert connects(stranger, (nat.address, 80)) == "connected"


def test_blocked_from_each_other(lab: Lab) -> None:
    left, right = lab.nat("left", Nat.FULL_CONE), lab.nat("right", Nat.FULL_CONE)
    a, b, server = lab.host("a", left), lab.host("b", right), lab.host("server")
    with b.socket(port=PORT) as listening:
        listening.listen()
        mapped = tcp_seen_from(b, server)
        left.block(right)
        assert connects(a, mapped, SILENCE) == "silence"
        assert tcp_seen_from(a, server)[0] == left.address
        left.block()
        assert connects(a, mapped) == "connected"


def test_a_host_firewall_lets_answers_in_only(lab: Lab) -> None:
    server, walled = lab.host("server"), lab.host("walled")
    walled.firewall()
    with walled.socket(port=PORT) as listening:
        listening.listen()
        assert connects(server, (walled.address, PORT), SILENCE) == "silence"
    assert tcp_seen_from(walled, server) == (walled.address, PORT)


def punch(a: Host, a_seen: str, b: Host, b_seen: str, seconds: float) -> bool:
    """TCP simultaneous open from `PORT` to `PORT`, each side dialling the other's outer address until it answers."""
    deadline = time.monotonic() + seconds
    sides = [(a, b_seen), (b, a_seen)]
    with contextlib.ExitStack() as stack:
        dialling: dict[socket.socket, tuple[Host, str]] = {}
        connected: list[socket.socket] = []
        while time.monotonic() < deadline and len(connected) < 2:
            for host, target in sides:
                if (host, target) not in dialling.values():
                    sock = stack.enter_context(host.socket(port=PORT))
                    sock.setblocking(False)
                    sock.connect_ex((target, PORT))
                    dialling[sock] = host, target
            _, writable, _ = select.select([], [sock for sock in dialling if sock not in connected], [], 0.05)
            for sock in writable:
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    connected.append(sock)
                else:
                    del dialling[sock]
                    sock.close()
        if len(connected) < 2:
            return False
        for sock in connected:
            sock.setblocking(True)
            sock.settimeout(WITHIN)
        connected[0].sendall(b"through")
        return connected[1].recv(16) == b"through"


@pytest.mark.parametrize("refuse", [False, True])
@pytest.mark.parametrize(
    ("left", "right"), [(Nat.PORT_RESTRICTED, Nat.PORT_RESTRICTED), (Nat.FULL_CONE, Nat.SYMMETRIC)]
)
def test_simultaneous_open_goes_through(lab: Lab, left: Nat, right: Nat, refuse: bool) -> None:
    """Through two port restricted NATs by each other's predicted address.

    From behind a symmetric one the port cannot be predicted, but a full cone lets it in: an ordinary dial. Where a RST
    answers a SYN that comes too early, the two must cross on their way: there has to be a way.
    """
    near, far = (lab.nat(label, kind, refuse=refuse, delay=0.02) for label, kind in (("l", left), ("r", right)))
    a, b = lab.host("a", near), lab.host("b", far)
    if right is Nat.SYMMETRIC:
        with a.socket(port=PORT) as listening:
            listening.listen()
            tcp_seen_from(a, lab.host("server"))
            assert connects(b, (near.address, PORT)) == "connected"
    else:
        assert punch(a, near.address, b, far.address, WITHIN)


@pytest.mark.parametrize("left", [Nat.SYMMETRIC, Nat.PORT_RESTRICTED])
def test_simultaneous_open_fails_against_a_symmetric_nat(lab: Lab, left: Nat) -> None:
    near, far = (lab.nat(label, kind, refuse=True, delay=0.02) for label, kind in (("l", left), ("r", Nat.SYMMETRIC)))
    assert not punch(lab.host("a", near), near.address, lab.host("b", far), far.address, 1.0)


def test_simultaneous_open_through_a_double_nat(lab: Lab) -> None:
    outer = lab.nat("outer", Nat.PORT_RESTRICTED)
    inner = lab.nat("inner", Nat.PORT_RESTRICTED, behind=outer)
    other = lab.nat("other", Nat.PORT_RESTRICTED)
    assert punch(lab.host("a", inner), outer.address, lab.host("b", other), other.address, WITHIN)


def test_counters_rates_and_delays(lab: Lab) -> None:
    """1 MiB at 80 Mbit/s takes 0.1 s and is counted; a round trip through a delay takes twice that."""
    size = 1 << 20
    slow, fast, far = lab.host("slow", rate="80mbit"), lab.host("fast"), lab.host("far", delay=0.05)
    with slow.socket(port=PORT) as listening, fast.socket() as dialling:
        listening.listen()
        dialling.connect((slow.address, PORT))
        accepted, _ = listening.accept()
        before, began = slow.counters(), time.monotonic()
        sender = threading.Thread(target=dialling.sendall, args=[bytes(size)])
        sender.start()
        with accepted:
            left = size
            while left:
                left -= len(accepted.recv(1 << 16))
        sender.join()
        seconds = time.monotonic() - began
        passed = slow.counters() - before
    assert size <= passed.received < 1.1 * size
    assert passed.sent < 0.1 * size
    assert 0.08 < seconds < 0.5  # the bucket lets 128 KiB through at once

    with far.socket(port=PORT) as listening:
        listening.listen()
        assert connects(fast, (far.address, PORT)) == "connected"  # finds the neighbour's MAC address, too
        began = time.monotonic()
        assert connects(fast, (far.address, PORT)) == "connected"
        assert 0.1 <= time.monotonic() - began < 0.2


def test_cut_unplugged_readdressed(lab: Lab) -> None:
    server, moving = lab.host("server"), lab.host("moving")
    with server.socket(port=PORT) as listening:
        listening.listen()
        target = (server.address, PORT)
        assert connects(moving, target) == "connected"
        moving.cut()
        assert connects(moving, target, SILENCE) == "silence"
        assert "NO-CARRIER" not in moving.run("ip", "link", "show", "eth0")
        moving.mend()
        assert connects(moving, target) == "connected"
        moving.unplug()
        assert "NO-CARRIER" in moving.run("ip", "link", "show", "eth0")
        moving.mend()
        before = moving.address
        assert moving.readdress() != before
        assert before not in moving.run("ip", "address")
        assert connects(moving, target) == "connected"


def test_a_rebooted_nat_has_forgotten_its_mappings(lab: Lab) -> None:
    server = lab.host("server")
    nat = lab.nat("n", Nat.PORT_RESTRICTED)
    with udp(lab.host("a", nat), PORT) as inside, udp(server, PORT) as known:
        inside.sendto(b"?", (server.address, PORT))
        got = received(known)
        assert got is not None
        nat.reboot()
        known.sendto(b"late", got[1])
        assert received(inside, SILENCE) is None


def test_what_a_killed_run_left_is_removed_by_the_next(lab: Lab) -> None:
    program = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from swarmlib.lab import Lab, Nat\n"
        "lab = Lab().__enter__()\n"
        "host = lab.host('a', lab.nat('n', Nat.SYMMETRIC), delay=0.01)\n"
        "import subprocess\n"
        "sleep = subprocess.Popen([*host.prefix, 'sleep', '600'])\n"
        "print(host.netns.name, sleep.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(REPOSITORY / "scripts")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with run:
        assert run.stdout is not None
        name, sleep = run.stdout.readline().decode().split()
        assert Path("/run/netns", name).exists()
        run.kill()
    with Lab():
        pass
    assert not Path("/run/netns", name).exists()
    deadline = time.monotonic() + WITHIN
    while Path(f"/proc/{sleep}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{sleep}").exists()


def test_a_lab_that_failed_leaves_nothing() -> None:
    from swarmlib import lab as laboratory

    if laboratory.available() is not None:
        pytest.skip(str(laboratory.available()))
    before = ours()
    with pytest.raises(SwarmError, match="rate"), Lab() as lab:
        lab.host("a", lab.nat("n", Nat.FULL_CONE), rate="a lot")
    assert ours() == before


def ours() -> set[str]:
    return {path.name for path in Path("/run/netns").glob(f"p2p{os.getpid()}-*")}
