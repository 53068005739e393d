# SPDX-License-Identifier: Apache-2.0
"""The control virtqueue, through the real data plane and switch: what a guest asks for is what it receives."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.control import (
    ANNOUNCE,
    BASE,
    ERR,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_GUEST_ANNOUNCE,
    F_RSS,
    FILTERS,
    MAC,
    MQ,
    OFFLOADS,
    OK,
    PROTOCOL,
    RX,
    VLAN,
    ControlGuest,
    tables,
)  # fmt: skip
from support.frontend import (
    F_CSUM,
    F_CTRL_VQ,
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_HASH_REPORT,
    F_HOST_TSO4,
    F_MQ,
    F_MRG_RXBUF,
    P_DEVICE_STATE,
    FrontEnd,
    NetDevice,
)  # fmt: skip
from support.plane import Plane
from support.process import wait_for
from support.virtqueue import Queue
from xdpvhost.vhost.wire import Request

MAC1, MAC2, MAC3 = (bytes((0x52, 0x54, 0, 0, 0, number)) for number in (1, 2, 3))
OTHER, GROUP, GROUP2 = (bytes.fromhex(mac) for mac in ("525400000a0a", "01005e0000fb", "333300000001"))
STATE = PROTOCOL | P_DEVICE_STATE
EVERYBODY = b"\xff" * 6

_numbers = itertools.count(1)


def frame(to: bytes, vlan: int | None = None, source: bytes = MAC2) -> bytes:
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    return to + source + tag + b"\x88\xb5" + struct.pack(">I", next(_numbers)) + bytes(40)


class Pair:
    """A guest with a control virtqueue, and another one that sends to it."""

    def __init__(self, plane: Plane, guest: ControlGuest, sender: NetDevice) -> None:
        self.plane, self.guest, self.sender = plane, guest, sender
        self.port = plane.switch.guests["vm1"].port

    def arrive(self, *frames: bytes) -> list[bytes]:
        """Those of these frames that the guest receives: the sender gets its buffers back after that."""
        for data in frames:
            self.sender.send(data)
        returned: list[int] = []
        wait_for(lambda: returned.append(self.sender.sent()) or sum(returned) == len(frames), 5, "the sender's buffers")
        got = [data for _, data in self.guest.received()]
        return sorted(got, key=frames.index)  # a burst of several destinations arrives one after the other


def pair_of(plane: Plane, path: Path, features: int = FILTERS, mac_change: str = "deny") -> Iterator[Pair]:
    plane.guest(mac_change=mac_change)
    plane.guest()
    with (
        ControlGuest(path / "vm1.sock", features=features, protocol_features=PROTOCOL) as guest,
        NetDevice(path / "vm2.sock", features=BASE | F_CSUM | F_HOST_TSO4) as sender,
    ):
        guest.up_with_control()
        sender.up()
        guest.post(64)
        sender.post(64)
        yield Pair(plane, guest, sender)


@pytest.fixture(params=[1, 2], ids=["one worker", "two workers"])
def plane(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Plane]:
    with Plane(tmp_path, workers=request.param) as plane:
        yield plane


@pytest.fixture
def pair(plane: Plane, tmp_path: Path) -> Iterator[Pair]:
    yield from pair_of(plane, tmp_path)


@pytest.fixture
def trusted(plane: Plane, tmp_path: Path) -> Iterator[Pair]:
    yield from pair_of(plane, tmp_path, mac_change="allow")


@pytest.fixture
def four(tmp_path: Path) -> Iterator[Plane]:
    with Plane(tmp_path) as plane:
        plane.guest(4, mac_change="allow")
        yield plane


class TestDeviceState:
    """What a guest has set goes with it to another back-end, which it does not tell again."""

    def test_pairs_and_addresses_travel(self, four: Plane, tmp_path: Path) -> None:
        features = FILTERS | F_MQ
        with ControlGuest(four.path("vm1"), features=features, protocol_features=STATE, pairs=4) as guest:
            guest.up_with_control()
            assert guest.command(MQ, 0, struct.pack("<H", 3)) == OK
            assert guest.command(MAC, 0, tables([OTHER], [])) == OK
            for index in range(len(guest.queues)):
                guest.front.get_base(index)
            guest.front.get_base(8)
            state = guest.front.save_state()
            assert state is not None
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        with Plane(elsewhere) as plane:
            entry = plane.guest(4, mac_change="allow")
            with FrontEnd.connect(plane.path("vm1")) as front:
                front.set_protocol_features(STATE)
                assert front.load_state(state)
                assert entry.port.ctrl.pairs == 3
                assert entry.addresses == (MAC1, (OTHER,))
                front.tell(Request.RESET_DEVICE)
                front.sync()
                assert (entry.port.ctrl.pairs, entry.addresses) == (1, (MAC1, ()))

    def test_a_guest_that_has_set_nothing_has_no_state(self, four: Plane) -> None:
        with FrontEnd.connect(four.path("vm1")) as front:
            front.set_protocol_features(STATE)
            state = front.save_state()
            assert state == b"XVST" + struct.pack("=II", 1, 0)
            assert front.load_state(state)

    @pytest.mark.parametrize(
        "state",
        [
            b"{",
            b"[]",
            b'{"pairs": 0}',
            b'{"pairs": 5}',
            b'{"pairs": 99999999999999999999}',
            b'{"pairs": 1, "mac": "AAAA"}',
            b'{"pairs": 1, "mac": "////////"}',
            b'{"pairs": 1, "others": ["AAAAAAAA"]}',
            b'{"pairs": 1, "rules": 1}',
            b'{"pairs": 1, "others": [' + b", ".join([b'"UlQAAAAJ"'] * 17) + b"]}",
            b'{"pairs": 1, "mac": "UlQAAAAC"}',
        ],
        ids=repr,
    )
    def test_a_hostile_state_changes_nothing(self, four: Plane, state: bytes) -> None:
        """The last one asks for another guest's address."""
        four.guest()
        entry = four.switch.guests["vm1"]
        with FrontEnd.connect(four.path("vm1")) as front:
            front.set_protocol_features(STATE)
            assert not front.load_state(b"XVST" + struct.pack("=II", 1, len(state)) + state)
            assert (entry.port.ctrl.pairs, entry.addresses) == (1, (MAC1, ()))
            front.sync()


class TestFilter:
    def test_multicast_table(self, pair: Pair) -> None:
        one, two, mine = frame(GROUP), frame(GROUP2), frame(MAC1)
        assert pair.arrive(one, two, mine) == [mine], "after a reset: its own address and broadcast"
        assert pair.guest.command(MAC, 0, tables([], [GROUP])) == OK
        assert pair.arrive(one, two, mine) == [one, mine]
        assert pair.guest.command(MAC, 0, tables([], [GROUP2])) == OK
        assert pair.arrive(one, two, mine) == [two, mine]
        assert pair.port.rx_counters(0).drops[9] == 4

    def test_more_groups_than_there_is_room_for(self, pair: Pair) -> None:
        many = [bytes((1, 0, 0x5E, 1, n >> 8, n & 255)) for n in range(2500)]
        assert pair.guest.command(MAC, 0, tables([], many)) == OK
        wanted = [frame(many[0]), frame(many[-1]), frame(GROUP)]
        assert pair.arrive(*wanted) == wanted

    def test_modes(self, pair: Pair) -> None:
        group, mine = frame(GROUP), frame(MAC1)
        for code, expected in ((1, [group, mine]), (3, [mine]), (4, []), (0, [group, mine])):
            assert pair.guest.command(RX, code, b"\1") == OK
            assert pair.arrive(group, mine) == expected
        assert pair.guest.command(RX, 6, b"\1") == ERR
        assert pair.guest.command(RX, 0, b"") == ERR

    def test_vlans(self, pair: Pair) -> None:
        tagged, plain = frame(MAC1, vlan=23), frame(MAC1)
        assert pair.arrive(tagged, plain) == [plain]
        assert pair.guest.command(VLAN, 0, struct.pack("<H", 23)) == OK
        assert pair.arrive(tagged, frame(MAC1, vlan=24), plain) == [tagged, plain]
        assert pair.guest.command(VLAN, 1, struct.pack("<H", 23)) == OK
        assert pair.arrive(tagged, plain) == [plain]

    def test_a_new_driver_begins_with_an_empty_filter(self, pair: Pair) -> None:
        """As User-Mode Linux does it: all rings go, the same features come again."""
        group = frame(GROUP)
        assert pair.guest.command(RX, 0, b"\1") == OK
        assert pair.arrive(group) == [group]
        front, guest = pair.guest.front, pair.guest
        for index in range(3):
            front.get_base(index)
        front.set_features(guest.features)
        for queue in (*guest.queues, guest.ctrl):
            queue.close()
        *guest.queues, guest.ctrl = (Queue(guest.memory, size) for size in (256, 256, 16))
        for index, queue in enumerate([*guest.queues, guest.ctrl]):
            front.set_queue(index, queue)
        front.sync()
        guest.post(8)
        assert pair.arrive(group) == []

    def test_a_front_end_that_keeps_its_control_virtqueue_gets_everything(self, plane: Plane, tmp_path: Path) -> None:
        plane.guest()
        plane.guest()
        with NetDevice(tmp_path / "vm1.sock", features=BASE) as one, NetDevice(tmp_path / "vm2.sock") as two:
            one.up()
            two.up()
            one.post(8)
            frames = [frame(GROUP), frame(MAC1, vlan=7), frame(EVERYBODY, vlan=9)]
            for data in frames:
                two.send(data)
            assert sorted(got for _, got in one.receive(3)) == sorted(frames)


class TestAddress:
    def test_change(self, trusted: Pair) -> None:
        assert trusted.arrive(frame(OTHER)) == []
        assert trusted.guest.command(MAC, 1, OTHER) == OK
        assert trusted.guest.config()[0] == OTHER
        new = frame(OTHER)
        assert trusted.arrive(new, frame(MAC1)) == [new]
        assert trusted.guest.command(MAC, 1, MAC1) == OK
        mine = frame(MAC1)
        assert trusted.arrive(new, mine) == [mine]
        assert trusted.guest.config()[0] == MAC1

    def test_unicast_table(self, trusted: Pair) -> None:
        new, mine = frame(OTHER), frame(MAC1)
        assert trusted.guest.command(MAC, 0, tables([OTHER], [])) == OK
        assert trusted.arrive(new, mine) == [new, mine]
        assert trusted.guest.command(MAC, 0, tables([], [])) == OK
        assert trusted.arrive(new, mine) == [mine]

    def test_not_what_is_another_guests(self, trusted: Pair) -> None:
        entry = trusted.plane.guest()
        assert entry.mac == MAC3
        for taken in (MAC2, MAC3):
            assert trusted.guest.command(MAC, 1, taken) == ERR
            assert trusted.guest.command(MAC, 0, tables([OTHER, taken], [])) == ERR
        assert trusted.guest.config()[0] == MAC1
        mine = frame(MAC1)
        assert trusted.arrive(frame(OTHER), mine) == [mine]

    def test_not_what_another_guest_listens_to(self, trusted: Pair, tmp_path: Path) -> None:
        trusted.plane.guest(mac_change="allow")
        assert trusted.guest.command(MAC, 1, OTHER) == OK
        with ControlGuest(tmp_path / "vm3.sock", features=FILTERS) as third:
            third.up_with_control()
            assert third.command(MAC, 1, OTHER) == ERR
            assert third.command(MAC, 1, MAC1) == ERR, "it stays reserved"

    def test_not_what_a_device_of_the_machine_has(self, trusted: Pair) -> None:
        addresses = {
            bytes.fromhex(p.read_text().strip().replace(":", "")) for p in Path("/sys/class/net").glob("*/address")
        }
        for address in [a for a in addresses if len(a) == 6 and any(a)]:
            assert trusted.guest.command(MAC, 1, address) == ERR

    def test_denied_unless_the_spec_allows_it(self, pair: Pair) -> None:
        assert pair.guest.command(MAC, 1, OTHER) == ERR
        assert pair.guest.command(MAC, 1, MAC1) == OK, "which is no change"
        group = frame(GROUP)
        assert pair.guest.command(MAC, 0, tables([OTHER], [GROUP])) == ERR
        assert pair.arrive(group, frame(OTHER)) == [group], "the groups are its own business"
        refused = pair.port.ctrl.refused
        wait_for(lambda: refused[MAC] == 2, 5, "the counter")

    def test_the_end_of_the_session_gives_it_back(self, trusted: Pair, tmp_path: Path) -> None:
        entry = trusted.plane.switch.guests["vm1"]
        assert trusted.guest.command(MAC, 1, OTHER) == OK
        assert entry.listens_to == {MAC1, OTHER}
        trusted.guest.front.close()
        wait_for(lambda: not entry.connected, 5, "the session to end")
        assert entry.listens_to == {MAC1}
        assert entry.mac == MAC1

    def test_a_bug_of_ours_is_a_refusal(self, trusted: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """And the next request is served again."""

        def broken(*_: object) -> None:
            raise RuntimeError("asked to fail")

        with monkeypatch.context() as patch:
            patch.setattr("xdpvhost.switch.check_addresses", broken)
            assert trusted.guest.command(MAC, 1, OTHER) == ERR
        assert trusted.guest.command(MAC, 1, OTHER) == OK

    def test_many_changes(self, trusted: Pair) -> None:
        """Each is answered, and what is steered to the guest is what it asked for last."""
        for number in range(20):
            mac = bytes((0x52, 0x54, 0, 1, 0, number))
            assert trusted.guest.command(MAC, 1, mac) == OK
        new = frame(mac)
        assert trusted.arrive(new, frame(MAC1)) == [new]


class TestQueues:
    def test_rss_keeps_a_flow_in_its_queue_and_reports_the_hash(self, plane: Plane, tmp_path: Path) -> None:
        plane.guest(4)
        plane.guest()
        features = BASE | F_CTRL_VQ | F_MQ | F_RSS | F_HASH_REPORT | F_MRG_RXBUF
        with (
            ControlGuest(tmp_path / "vm1.sock", features=features, pairs=4, protocol_features=PROTOCOL) as one,
            NetDevice(tmp_path / "vm2.sock", features=BASE) as two,
        ):
            one.up_with_control()
            two.up()
            assert one.config()[-3:] == (40, 128, 0x1FF)
            for pair in range(4):
                one.post(64, pair=pair)
            table = [n % 4 for n in range(128)]
            key = random.Random(1).randbytes(40)
            config = struct.pack("<IHH128HHB", 0x1FF, 127, 0, *table, 4, 40) + key
            assert one.command(MQ, 1, config) == OK
            flows = [udp(1000 + n) for n in range(32)]
            for data in (*flows, *flows):
                two.send(data)
            got: list[tuple[int, bytes, bytes]] = []

            def all_there() -> bool:
                for pair in range(4):
                    got.extend((pair, header, data) for header, data in one.received(pair))
                return len(got) == 64

            wait_for(all_there, 5, "64 frames")
            assert sorted(data for _, _, data in got) == sorted(flows * 2)
            assert len({(pair, data) for pair, _, data in got}) == 32, "each flow in one queue"
            assert len({pair for pair, _, _ in got}) == 4
            for pair, header, data in got:
                value, report = struct.unpack_from("<IH", header, 12)
                assert (value, report) == (toeplitz(key, data[26:34] + data[34:38]), 3)
                assert table[value & 127] == pair

    def test_128_pairs(self, tmp_path: Path) -> None:
        """The front-end has its own control virtqueue: an index for it would not fit into SET_VRING_KICK."""
        with Plane(tmp_path, workers=2) as plane:
            plane.guest(128)
            plane.guest()
            with (
                NetDevice(
                    tmp_path / "vm1.sock", features=BASE | F_MQ, pairs=128, queue_size=64, memory_size=16 << 20
                ) as one,
                NetDevice(tmp_path / "vm2.sock", features=BASE) as two,
            ):
                one.up()
                assert one.front.ask_u64(Request.GET_QUEUE_NUM) == 128
                assert not one.front.ask_u64(Request.GET_FEATURES) & (F_CTRL_VQ | F_CTRL_RX | F_CTRL_MAC_ADDR | F_RSS)
                two.up()
                two.post(200)
                sent = [frame(MAC2, source=MAC1) for _ in range(128)]
                for pair, data in enumerate(sent):
                    one.send(data, pair=pair)
                assert sorted(data for _, data in two.receive(128)) == sorted(sent)
                for pair in range(126):  # any number may be enabled at run time
                    one.front.enable(2 * pair, False)
                one.front.sync()
                one.post(4, pair=127)
                one.post(4, pair=126)
                two.send(frame(MAC1))
                found: list[bytes] = []
                wait_for(
                    lambda: found.extend(d for p in (126, 127) for _, d in one.received(p)) or found, 5, "the frame"
                )

    def test_127_pairs_with_our_control_virtqueue(self, tmp_path: Path) -> None:
        with Plane(tmp_path) as plane:
            plane.guest(127)
            features = BASE | F_MQ | F_CTRL_VQ
            with ControlGuest(
                tmp_path / "vm1.sock", features=features, pairs=127, queue_size=64, memory_size=16 << 20
            ) as one:
                one.up_with_control()
                for pairs, answer in ((127, OK), (1, OK), (64, OK), (128, ERR), (0, ERR)):
                    assert one.command(MQ, 0, struct.pack("<H", pairs)) == answer
                assert plane.switch.guests["vm1"].port.ctrl.pairs == 64


class TestOffloads:
    def test_off_and_on_at_run_time(self, plane: Plane, tmp_path: Path) -> None:
        """On: one large frame with an open checksum. Off: segments, each with its own checksum, finished."""
        features = BASE | F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM | F_GUEST_TSO4 | F_MRG_RXBUF
        for pair in pair_of(plane, tmp_path, features):
            header = struct.pack("<BBHHHHH", 1, 1, 54, 1000, 34, 16, 0)
            whole = tcp(2500)
            pair.sender.send(whole, header)
            ((got_header, got),) = pair.guest.receive(1)
            assert (got_header[:2], got) == (b"\1\1", whole)

            assert pair.guest.command(OFFLOADS, 0, struct.pack("<Q", 0)) == OK
            pair.sender.send(whole, header)
            segments = pair.guest.receive(3)
            assert [head[:2] for head, _ in segments] == [b"\0\0"] * 3
            assert b"".join(data[54:] for _, data in segments) == whole[54:]
            assert all(tcp_checksum_is_right(data) for _, data in segments)

            assert pair.guest.command(OFFLOADS, 0, struct.pack("<Q", F_GUEST_CSUM)) == OK
            pair.sender.send(whole, header)
            assert [head[:2] for head, _ in pair.guest.receive(3)] == [b"\1\0"] * 3

            assert pair.guest.command(OFFLOADS, 0, struct.pack("<Q", F_GUEST_CSUM | F_GUEST_TSO4)) == OK
            pair.sender.send(whole, header)
            assert pair.guest.receive(1)[0][1] == whole
            assert pair.guest.command(OFFLOADS, 0, struct.pack("<Q", 1 << 8)) == ERR, "not negotiated"


class TestConfigSpace:
    def test_speed_and_status(self, pair: Pair) -> None:
        assert pair.guest.config() == (MAC1, 1, 1, 1500, 10000, 1, 40, 128, 0x1FF)

    def test_a_driver_that_is_taken_over_is_asked_to_announce_itself(self, plane: Plane, tmp_path: Path) -> None:
        """Its rings go on where they were: it was configured, and known to the network, elsewhere."""
        plane.guest()
        features = FILTERS | F_GUEST_ANNOUNCE
        with ControlGuest(tmp_path / "vm1.sock", features=features, protocol_features=PROTOCOL) as guest:
            guest.up_with_control()
            assert guest.command(RX, 1, b"\0") == OK
            assert guest.config()[1] == 1
            guest.front.close()
            guest.up()
            guest.front.set_queue(2, guest.ctrl, guest.ctrl.used_idx)
            guest.front.enable(2)
            guest.front.sync()
            assert guest.config()[1] == 3
            assert guest.command(ANNOUNCE, 0) == OK
            assert guest.config()[1] == 1


def udp(port: int) -> bytes:
    ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 48, 1, 0, 64, 17, 0, bytes((10, 0, 0, 2)), bytes((10, 0, 0, 1)))
    return MAC1 + MAC2 + b"\x08\x00" + ip + struct.pack(">HHHH", port, 53, 28, 0) + bytes(20)


def tcp(size: int) -> bytes:
    """With the pseudo-header's sum only."""
    addresses = bytes((10, 0, 0, 2, 10, 0, 0, 1))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + size, 1, 0, 64, 6, 0) + addresses
    pseudo = ones_sum(addresses + struct.pack(">HH", 6, 20 + size))
    head = struct.pack(">HHIIBBHHH", 1000, 80, 7, 9, 0x50, 0x10, 1000, pseudo, 0)
    return MAC1 + MAC2 + b"\x08\x00" + ip + head + random.Random(size).randbytes(size)


def ones_sum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total += data[-1] << 8 if len(data) % 2 else 0
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def tcp_checksum_is_right(data: bytes) -> bool:
    return ones_sum(data[26:34] + struct.pack(">HH", 6, len(data) - 34) + data[34:]) == 0xFFFF


def toeplitz(key: bytes, data: bytes) -> int:
    """Bit by bit, as it is defined."""
    bits, value = int.from_bytes(key, "big"), 0
    for at in range(8 * len(data)):
        if data[at // 8] >> (7 - at % 8) & 1:
            value ^= bits >> (8 * len(key) - 32 - at) & 0xFFFFFFFF
    return value
