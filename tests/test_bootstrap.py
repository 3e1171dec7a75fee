"""Tests of ``rt.bootstrap``, ``rt.rendezvous`` and the handshake: real sockets on loopback, ranks as tasks of one loop.

May live here: forming groups and failing to. May not: what happens to a group that has formed (``test_control``).
"""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import struct
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from worlds import PATIENCE, SECRET, config, coordinated, free_ports, listening_to_log, only_neighbours, ring

from rt.bootstrap import HostInfo, Wiring, bootstrap, dials, neighbours
from rt.config import RingConfig
from rt.errors import ConfigError, RendezvousError
from rt.secret import Secret
from transports import handshake, tcp

pytestmark = pytest.mark.asyncio


async def form(configs: list[RingConfig], reachable: Callable[[int, int], bool] | None = None) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*(bootstrap(each, reachable=reachable) for each in configs), return_exceptions=True)


async def dismantle(outcomes: list[Any]) -> None:
    for wiring in outcomes:
        if isinstance(wiring, Wiring):
            for sock in (sock for socks in wiring.data.values() for sock in socks):
                sock.close()
            for _, writer in wiring.control.values():
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()


async def check(wirings: list[Any], pairs: set[tuple[int, int]], connections: int = 1) -> None:
    """Every pair has working connections, and the i-th socket of one end is the i-th of the other."""
    for wiring in wirings:
        assert isinstance(wiring, Wiring), wiring
        assert wiring.direct == pairs
        assert set(wiring.data) == set(wiring.control) == {a + b - wiring.rank for a, b in pairs if wiring.rank in (a, b)}
        assert [host.pid for host in wiring.hosts] == [HostInfo.mine().pid] * wiring.size
        assert {host.network for host in wiring.hosts} == {HostInfo.mine().network}
    for (a, b), i in itertools.product(pairs, range(connections)):
        here, there = wirings[a].data[b][i], wirings[b].data[a][i]
        assert here.getpeername() == there.getsockname()
        assert here.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not here.getblocking() and not here.get_inheritable()
        assert not here.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for a, b in pairs:
        assert len(wirings[a].data[b]) == connections
        tcp.write_frame(wirings[a].control[b][1], 9, b"to b")
        assert await tcp.read_frame(wirings[b].control[a][0]) == (9, b"to b")


def all_pairs(size: int) -> set[tuple[int, int]]:
    return set(itertools.combinations(range(size), 2))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
async def test_coordinator(size: int) -> None:
    wirings = await form(coordinated(size) if size > 1 else [config(0, 1)])
    await check(wirings, all_pairs(size))
    await dismantle(wirings)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_ring_file_with_two_addresses(host: str) -> None:
    wirings = await form(ring(3, host, connections=2))
    await check(wirings, all_pairs(3), connections=2)
    await dismantle(wirings)


async def test_coordinator_on_ipv6_with_three_connections() -> None:
    wirings = await form(coordinated(2, "::1", connections=3))
    await check(wirings, all_pairs(2), connections=3)
    await dismantle(wirings)


async def test_host_name() -> None:
    (port,) = free_ports(1)
    wirings = await form([config(rank, 2, coordinator=("localhost", port)) for rank in range(2)])
    await check(wirings, all_pairs(2))
    await dismantle(wirings)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("by_file", [True, False])
async def test_any_start_order(order: tuple[int, ...], by_file: bool) -> None:
    (port,) = free_ports(1)
    configs = ring(3) if by_file else [config(rank, 3, coordinator=("127.0.0.1", port)) for rank in range(3)]
    with listening_to_log() as log:
        tasks = {}
        for rank in order[:-1]:
            tasks[rank] = asyncio.create_task(bootstrap(configs[rank]))
        awaited = [rank for rank in order[:-1] if (dials(rank, order[-1], 3) if by_file else order[-1] == 0)]
        for rank in awaited:  # each has tried in vain before the last one starts
            await asyncio.to_thread(log.wait_for, f"rank {rank}: rank {order[-1]} at")
        tasks[order[-1]] = asyncio.create_task(bootstrap(configs[order[-1]]))
        wirings = [await tasks[rank] for rank in range(3)]
    await check(wirings, all_pairs(3))
    await dismantle(wirings)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("make", [ring, coordinated])
async def test_only_neighbours_reachable(size: int, make: Callable[[int], list[RingConfig]]) -> None:
    near = only_neighbours(size)
    # The coordinator itself must be reachable from everywhere: its dials carry the same pair of ranks, so let rank 0 be reached.
    reachable = near if make is ring else (lambda a, b: near(a, b) or b == 0)
    wirings = await form(make(size), reachable)
    await check(wirings, {(a, b) for a, b in all_pairs(size) if near(a, b)})
    await dismantle(wirings)


async def test_one_missing_cable() -> None:
    wirings = await form(ring(5), lambda a, b: {a, b} != {1, 3})
    await check(wirings, all_pairs(5) - {(1, 3)})
    await dismantle(wirings)


@pytest.mark.parametrize("size", range(2, 9))
async def test_exactly_one_dials(size: int) -> None:
    for a, b in all_pairs(size):
        assert dials(a, b, size) != dials(b, a, size)
    if size > 2:
        assert all(dials(rank, (rank + 1) % size, size) for rank in range(size))
    assert neighbours(0, 2) == {1} and neighbours(0, size) == {1, size - 1}


async def test_missing_rank_of_ring_file_is_named_with_addresses() -> None:
    configs = ring(4, connections=2, connect_timeout=0.5)
    outcomes = await form(configs[:3])
    assert all(isinstance(outcome, RendezvousError) for outcome in outcomes)
    assert configs[0].addresses is not None
    for dialler in (1, 2):
        text = str(outcomes[dialler])
        assert f"rank {dialler}/4" in text and "0.5 s" in text and "rank 3:" in text
        for host, port in configs[0].addresses[3]:
            assert f"{host}:{port}: Connection refused" in text
        assert "rank 0:" not in text
    waiting = str(outcomes[0])
    assert "rank 3: it has not connected to" in waiting and f":{configs[0].addresses[0][0][1]}" in waiting


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5])
async def test_missing_rank_is_named_alone_by_ranks_that_see_only_their_neighbours(first: int) -> None:
    configs = ring(6)
    configs[first] = replace(configs[first], connect_timeout=0.4)
    outcomes = await form([each for each in configs if each.rank != 4], only_neighbours(6))
    for outcome in outcomes:
        assert isinstance(outcome, RendezvousError)
        assert f"rank {first}/6" in str(outcome)
        assert re.findall(r"^  rank (\d):", str(outcome), re.MULTILINE) == ["4"]


async def test_a_rank_that_does_not_answer_is_named_with_the_address_tried() -> None:
    # A listener whose queue is full: the kernel drops what asks for connections, without a word.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent, socket.create_connection(silent.getsockname()[:2]):
        configs = ring(2, connect_timeout=0.3)
        assert configs[0].addresses is not None
        where = (configs[0].addresses[0], (silent.getsockname()[:2],))
        (outcome,) = await form([replace(configs[0], addresses=where)])
    assert f"rank 1: 127.0.0.1:{where[1][0][1]}: no answer" in str(outcome)


async def test_missing_rank_with_coordinator_is_named_by_all() -> None:
    outcomes = await form(coordinated(4, connect_timeout=0.5)[:3])
    for outcome in outcomes:
        assert isinstance(outcome, RendezvousError)
        assert "rank 3: not heard of" in str(outcome) and "rank 1:" not in str(outcome) and "rank 2:" not in str(outcome)


async def test_missing_coordinator() -> None:
    (port,) = free_ports(1)
    (outcome,) = await form([config(1, 2, coordinator=("127.0.0.1", port), connect_timeout=0.3)])
    assert isinstance(outcome, RendezvousError)
    assert f"rank 0: 127.0.0.1:{port}: Connection refused" in str(outcome)


async def test_forming_again_on_an_inherited_listener() -> None:
    configs = coordinated(2)
    for _ in range(2):
        early = asyncio.create_task(bootstrap(configs[1]))
        wirings = [await bootstrap(configs[0]), await early]
        await check(wirings, all_pairs(2))
        await dismantle(wirings)


async def test_inherited_descriptor_that_is_none() -> None:
    mine, _ = coordinated(2)
    with pytest.raises(ConfigError, match=r"test: found descriptor 99999 .* expected a listening socket"):
        await bootstrap(replace(mine, coordinator_fd=99999))


async def test_coordinator_that_does_not_answer_is_named() -> None:
    configs = coordinated(2, connect_timeout=0.3)
    with pytest.raises(RendezvousError, match=r"rank 0: 127\.0\.0\.1:\d+: connected, but no answer to the handshake"):
        await bootstrap(configs[1])


async def test_duplicate_rank_is_told_and_the_others_go_on() -> None:
    configs = coordinated(3)
    with listening_to_log() as log:
        first = [asyncio.create_task(bootstrap(configs[rank])) for rank in (0, 1)]
        second = asyncio.create_task(bootstrap(configs[1]))
        done, _ = await asyncio.wait([*first, second], timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
        loser = done.pop()
        assert isinstance(loser.exception(), RendezvousError)
        assert "another process" in str(loser.exception()) and "already joined as rank 1" in str(loser.exception())
        assert log.count("says that it is rank 1") == 1
        winner = second if loser is first[1] else first[1]
        third = asyncio.create_task(bootstrap(configs[2]))
        wirings = [await first[0], await winner, await third]
    await check(wirings, all_pairs(3))
    await dismantle(wirings)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"secret": Secret(b"another secret", "test")}, "the secrets differ"),
        ({"secret": Secret(None, "test")}, "one side has a secret and the other has none"),
        ({"job": "another"}, "another job"),
        ({"size": 3}, "it has world size 2, this process 3"),
    ],
)
async def test_a_stranger_is_told_and_the_real_rank_gets_in(fields: dict[str, Any], told: str) -> None:
    configs = coordinated(2)
    with listening_to_log() as log:
        waiting = asyncio.create_task(bootstrap(configs[0]))
        with pytest.raises(RendezvousError, match=told):
            await bootstrap(replace(configs[1], **fields))
        assert log.count("rank 0: dropped a connection from 127.0.0.1:") == 1
        wirings = [await asyncio.create_task(bootstrap(configs[1])), await waiting][::-1]
    await check(wirings, all_pairs(2))
    await dismantle(wirings)


async def test_what_became_of_connections_stands_in_the_error_of_who_waited() -> None:
    configs = coordinated(2, connect_timeout=2.0)
    waiting = asyncio.create_task(bootstrap(replace(configs[0], secret=replace(SECRET, of_this_host=True))))
    with pytest.raises(RendezvousError, match="the secrets differ"):
        await bootstrap(replace(configs[1], secret=Secret(b"another secret", "test")))
    with pytest.raises(RendezvousError) as caught:
        await waiting
    *_, absent, dropped, hint = str(caught.value).splitlines()
    assert absent == "  rank 1: not heard of"
    assert re.match(r"  a connection from 127.0.0.1:\d+ was dropped: .*the secrets differ", dropped)
    assert hint.startswith("  this rank has its host's own secret: with other hosts all need RT_SECRET_FILE")


async def test_group_without_secret() -> None:
    wirings = await form(coordinated(2, secret=Secret(None, "test")))
    await check(wirings, all_pairs(2))
    await dismantle(wirings)


async def test_wrong_rank_at_an_address() -> None:
    configs = ring(2, connect_timeout=5)
    assert configs[0].addresses is not None
    listener = tcp.listen(socket.AF_INET, ("127.0.0.1", 0))
    acceptor = handshake.Acceptor(identity(configs[1], rank=7, size=2), lambda hello: None, lambda hello, sock: sock.close())
    acceptor.add([listener])
    swapped = (configs[0].addresses[0], (listener.getsockname()[:2],))
    with pytest.raises(RendezvousError, match="it is rank 7, not the rank that was expected"):
        await bootstrap(replace(configs[0], addresses=swapped))
    await acceptor.close()


def identity(of: RingConfig, **fields: Any) -> handshake.Identity:
    return handshake.Identity(**{"rank": of.rank, "size": of.size, "job": of.job, "secret": of.secret, **fields})


async def test_other_protocol_version_is_told() -> None:
    configs = coordinated(2)
    assert configs[1].coordinator is not None
    waiting = asyncio.create_task(bootstrap(configs[0]))
    reader, writer = await asyncio.open_connection(*configs[1].coordinator)
    hello = handshake.Hello.of(identity(configs[1]), 0, handshake.Purpose.RENDEZVOUS, 0)
    writer.write(replace(hello, version=9, byte_order=0).pack())
    magic, reason, version = struct.unpack_from("!4sHxxI", await reader.readexactly(56))
    assert (magic, reason, version) == (b"rtNO", handshake.Reason.VERSION, handshake.VERSION)
    assert await reader.read() == b""
    writer.close()
    wirings = [await asyncio.create_task(bootstrap(configs[1])), await waiting][::-1]
    await dismantle(wirings)


async def test_proofs_cannot_be_replayed_or_reflected() -> None:
    configs = coordinated(2)
    assert configs[1].coordinator is not None
    waiting = asyncio.create_task(bootstrap(configs[0]))
    reader, writer = await asyncio.open_connection(*configs[1].coordinator)
    hello = handshake.Hello.of(identity(configs[1]), 0, handshake.Purpose.RENDEZVOUS, 0).pack()
    writer.write(hello)
    theirs = await reader.readexactly(56)
    writer.write(b"rtPR" + configs[1].secret.mac(b"accept", hello, theirs) + bytes(20))  # right key, the other side's role
    assert (await reader.readexactly(56))[:4] == b"rtNO"
    writer.close()
    wirings = [await asyncio.create_task(bootstrap(configs[1])), await waiting][::-1]
    await dismantle(wirings)


async def test_garbage_half_hellos_and_silence_do_not_disturb() -> None:
    configs = coordinated(3)
    assert configs[0].coordinator is not None
    with listening_to_log() as log:
        waiting = [asyncio.create_task(bootstrap(configs[rank])) for rank in (0, 1)]
        writers = []
        for words in [b"GET / HTTP/1.1\r\n" + b"x" * 100, b"rtHI\x01\x01"] + [b""] * 200:
            _, writer = await asyncio.open_connection(*configs[0].coordinator)
            writer.write(words)
            if words.startswith(b"rtHI"):
                writer.write_eof()
            writers.append(writer)
        await asyncio.to_thread(log.wait_for, "too many unfinished handshakes", 100)
        wirings = [*[await asyncio.create_task(bootstrap(configs[2]))], *[await each for each in waiting]]
        wirings.sort(key=lambda wiring: wiring.rank)
        assert log.count("does not speak the protocol") == 1
        assert log.count("after 6 B of the handshake") == 1
    await check(wirings, all_pairs(3))
    await dismantle(wirings)
    for writer in writers:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def test_silent_connection_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.05)
    configs = coordinated(2)
    assert configs[0].coordinator is not None
    waiting = asyncio.create_task(bootstrap(configs[0]))
    reader, writer = await asyncio.open_connection(*configs[0].coordinator)
    async with asyncio.timeout(PATIENCE):
        assert await reader.read() == b""
    writer.close()
    wirings = [await asyncio.create_task(bootstrap(configs[1])), await waiting][::-1]
    await dismantle(wirings)


async def test_address_of_another_host() -> None:
    configs = ring(2)
    assert configs[0].addresses is not None
    foreign = ((("192.0.2.1", 4000),), configs[0].addresses[1])
    with pytest.raises(
        ConfigError, match=r"entry 0 of the ring file, 192\.0\.2\.1:4000: this host does not have that address; expected rank 0"
    ):
        await bootstrap(replace(configs[0], addresses=foreign))


async def test_port_taken() -> None:
    configs = ring(2)
    assert configs[0].addresses is not None
    with tcp.listen(socket.AF_INET, configs[0].addresses[0][0]), pytest.raises(ConfigError, match=r"entry 0 .* the port is taken"):
        await bootstrap(configs[0])


async def test_a_rank_that_gives_up_tells_the_others() -> None:
    """Rank 2 cannot reach its neighbour, rank 3; rank 3 gives up first, and nobody needs to wait for a deadline of his own."""
    configs = ring(4)
    configs[3] = replace(configs[3], connect_timeout=0.3)
    outcomes = await form(configs, lambda a, b: (a, b) != (2, 3))
    assert all(isinstance(outcome, RendezvousError) for outcome in outcomes)
    assert "rank 3/4: the group did not form within 0.3 s" in str(outcomes[3]) and "rank 2: it has not connected to" in str(outcomes[3])
    assert str(outcomes[0]) == str(outcomes[1]) == str(outcomes[2]) == str(outcomes[3])


async def test_through_torchruns_store(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, bytes] = {}
    written = asyncio.Event()
    loop = asyncio.get_running_loop()

    class TCPStore:
        def __init__(self, host: str, port: int, *, is_master: bool, timeout: Any) -> None:
            assert (host, port, is_master) == ("127.0.0.1", 29400, False)

        def set(self, key: str, value: str) -> None:
            values[key] = value.encode()
            loop.call_soon_threadsafe(written.set)

        def get(self, key: str) -> bytes:
            asyncio.run_coroutine_threadsafe(written.wait(), loop).result(PATIENCE)
            return values[key]

    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))
    module = types.ModuleType("torch.distributed")
    module.TCPStore = TCPStore  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.distributed", module)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run7")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setattr("rt.rendezvous._stores", itertools.repeat(0))  # here both ranks live in one process
    wirings = await form([config(rank, 2, store=("127.0.0.1", 29400)) for rank in range(2)])
    await check(wirings, all_pairs(2))
    assert list(values) == ["rt/run7/2/a test/0"]
    await dismantle(wirings)


async def test_torchrun_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    (outcome,) = await form([config(0, 2, store=("127.0.0.1", 29400))])
    assert isinstance(outcome, ConfigError) and "cannot import torch" in str(outcome) and "RT_COORDINATOR" in str(outcome)
