from __future__ import annotations

import threading

import pytest
import trio
import trio.testing
import zeroconf
from hypothesis import given
from hypothesis import strategies as st

from p2pnode.net import mdns
from p2pnode.net.identity import Identity, peer_id_of
from p2pnode.net.mdns import MAX_ADDRS, SERVICE, read_record, record, run_mdns

ALICE, BOB = (peer_id_of(bytes([n]) * 32) for n in (1, 2))
A = "/ip4/192.0.2.1/tcp/4001"
LOOPBACK = ["127.0.0.1"]  # nothing leaves the machine


def encoded(fields: dict[str, str]) -> dict[bytes, bytes | None]:
    return {key.encode(): value.encode() for key, value in fields.items()}


def test_a_record_says_who_and_where() -> None:
    fields = record(ALICE, "lab", [f"{A}/p2p/{ALICE}", "/ip6/fd00::1/tcp/4001"])
    assert read_record(encoded(fields), BOB, "lab") == (ALICE, [A, "/ip6/fd00::1/tcp/4001"])


def test_own_records_and_other_clusters_are_ignored() -> None:
    fields = encoded(record(ALICE, "lab", [A]))
    assert read_record(fields, ALICE, "lab") is None
    assert read_record(fields, BOB, "") is None


def test_records_are_bounded() -> None:
    many = [f"/ip4/192.0.2.1/tcp/{port}" for port in range(1, 100)]
    long = "/dns4/" + "/".join([".".join(["a" * 60] * 4), "tcp/1"])
    fields = record(ALICE, "", [long, *many])
    assert len(fields) <= 2 + MAX_ADDRS
    assert all(len(f"{key}={value}") <= 255 for key, value in fields.items())


@given(
    st.dictionaries(
        st.sampled_from([b"id", b"cluster", b"a0", b"a1", b"a7", b"a8", b"x"]),
        st.none() | st.binary(max_size=255) | st.sampled_from([ALICE.encode(), A.encode()]),
    )
)
def test_any_record_is_understood_or_ignored(fields: dict[bytes, bytes | None]) -> None:
    seen = read_record(fields, BOB, "")
    if seen is not None:
        assert seen == (ALICE, [A])


async def start(
    nursery: trio.Nursery, peer: str, addr: str, cluster: str
) -> trio.MemoryReceiveChannel[tuple[str, list[str]]]:
    send, receive = trio.open_memory_channel[tuple[str, list[str]]](100)
    main = threading.get_ident()

    def found(peer: str, addrs: list[str]) -> None:
        assert threading.get_ident() == main
        send.send_nowait((peer, addrs))

    async def run(task_status: trio.TaskStatus[None]) -> None:
        await run_mdns(peer, lambda: [addr], found, cluster=cluster, interfaces=LOOPBACK, task_status=task_status)

    await nursery.start(run)
    return receive


async def test_nodes_of_one_cluster_find_each_other_and_leave_cleanly() -> None:
    threads = threading.active_count()
    a, b, c = (Identity.generate().peer_id for _ in range(3))
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            of_a = await start(nursery, a, "/ip4/192.0.2.1/tcp/1", "lab")
            of_c = await start(nursery, c, "/ip4/192.0.2.3/tcp/3", "other")
            of_b = await start(nursery, b, "/ip4/192.0.2.2/tcp/2", "lab")
            assert await of_a.receive() == (b, ["/ip4/192.0.2.2/tcp/2"])
            assert await of_b.receive() == (a, ["/ip4/192.0.2.1/tcp/1"])
            assert of_c.statistics().current_buffer_used == 0
            stopping = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - stopping < 2
        while any("zeroconf" in thread.name.lower() for thread in threading.enumerate()):
            await trio.sleep(0.01)
    assert threading.active_count() <= threads + 10  # trio keeps idle worker threads for a while


@pytest.mark.slow
async def test_hostile_services_do_not_hide_an_honest_one() -> None:
    me, honest = (Identity.generate().peer_id for _ in range(2))
    with trio.fail_after(30):
        hostile = await trio.to_thread.run_sync(lambda: zeroconf.Zeroconf(interfaces=LOOPBACK))
        try:
            bad = [
                {},
                {"id": "rubbish", "a0": A},
                {"id": me, "a0": A},
                {"id": ALICE, "a0": "/ip4/0.0.0.0/tcp/1"},
                {"id": ALICE, "cluster": "other", "a0": A},
            ]
            for number, fields in enumerate(bad):
                info = zeroconf.ServiceInfo(
                    SERVICE,
                    f"bad{number}.{SERVICE}",
                    port=1,
                    properties=fields,
                    server=f"bad{number}.local.",
                    parsed_addresses=["127.0.0.1"],
                )
                await trio.to_thread.run_sync(
                    lambda info=info: hostile.register_service(info, cooperating_responders=True)
                )
            async with trio.open_nursery() as nursery:
                seen = await start(nursery, me, "/ip4/192.0.2.1/tcp/1", "")
                await start(nursery, honest, "/ip4/192.0.2.2/tcp/2", "")
                assert await seen.receive() == (honest, ["/ip4/192.0.2.2/tcp/2"])
                nursery.cancel_scope.cancel()
        finally:
            await trio.to_thread.run_sync(hostile.close)


async def test_without_multicast_there_is_a_warning_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(10):
        await run_mdns(ALICE, lambda: [A], lambda peer, addrs: None, interfaces=["198.51.100.1"])
    assert "local network" in caplog.text


async def test_a_flood_of_names_is_dropped_at_the_bound(caplog: pytest.LogCaptureFixture) -> None:
    send, receive = trio.open_memory_channel[str](mdns.MAX_PENDING)
    on_change = mdns._listener(send, trio.lowlevel.current_trio_token())

    def flood() -> None:
        for number in range(mdns.MAX_PENDING * 3):
            on_change(None, SERVICE, f"{number}.{SERVICE}", zeroconf.ServiceStateChange.Added)
            on_change(None, SERVICE, f"gone{number}.{SERVICE}", zeroconf.ServiceStateChange.Removed)

    await trio.to_thread.run_sync(flood)
    await trio.testing.wait_all_tasks_blocked()
    assert receive.statistics().current_buffer_used == mdns.MAX_PENDING
