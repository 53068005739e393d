# SPDX-License-Identifier: Apache-2.0
"""Mode `vf` on real (emulated) igb cards: VFs made, configured, passed on and given back, and what is refused.

Most tests run the service of `up` in this process, because an emulated processor starts Python slowly; the last one
is the command itself, killed.
"""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pytest

from support.process import Process, run, wait_for
from xdpvhost.config import UpConfig, parse_guests
from xdpvhost.errors import NicError
from xdpvhost.links import sriov, vfconfig, vfio, vfnetdev
from xdpvhost.links.ethtool import link_state
from xdpvhost.links.journal import Journal
from xdpvhost.links.netlink import get_link, set_up
from xdpvhost.links.pci import Function
from xdpvhost.links.undo import handlers
from xdpvhost.modes.vf import MODE
from xdpvhost.qemu import DEFAULT_DEVICE
from xdpvhost.serve_links import LinkService

FRAMES = 23
ETHERTYPE = 0x88B5
BROADCAST = b"\xff" * 6


def mac(number: int) -> str:
    return f"52:54:00:00:00:{number:02x}"


class Up:
    """What `up --mode vf` does, without the process around it. `kill()` is kill -9; `close()` an orderly end."""

    def __init__(self, directory: Path, *guests: str, iface: str = "nic0", vfs: int | None = None, force: bool = False):
        specs = parse_guests(guests, directory, "vf")
        config = UpConfig(ifaces=(iface,), guests=specs, run_dir=directory, mode="vf", vfs=vfs, force=force)
        self.index = get_link(iface).index
        self.journal = Journal(directory / "journal.jsonl", handlers(held=(self.index,)))
        self.service = LinkService(config)
        self.runner = asyncio.Runner()
        adopted = self.service.leftover(self.journal, [self.index]).adopted
        undone = self.journal.replay_undo([entry for entry in self.journal.pending() if entry not in adopted])
        assert all(item.ok for item in undone), undone
        try:
            self.runner.run(self.service.open(self.journal))
        except BaseException:
            self.close()
            raise

    def facts(self, name: str) -> dict[str, Any]:
        spec = next(spec for spec in self.service.guests if spec.name == name)
        assert self.service._uplink is not None
        return self.service._uplink.guest_facts(spec)

    def add(self, spec: str) -> None:
        self.service.add_guest(parse_guests([spec], Path("/run"), "vf")[0])

    def remove(self, name: str) -> None:
        self.runner.run(self.service.remove_guest(name))

    def kill(self) -> None:
        self.runner.close()

    def close(self) -> None:
        self.runner.run(self.service.close())
        self.runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def card(iface: str = "nic0") -> sriov.Card:
    return sriov.card_of(get_link(iface))


def host() -> dict[str, Any]:
    """All that a mode may change, to be compared before and after."""
    links = json.loads(run(["ip", "-j", "-d", "link"]).stdout)
    names = ("ifindex", "ifname", "address", "operstate", "flags", "mtu", "master", "vfinfo_list")
    functions = {
        function.name: (Function(function.name).driver, Function(function.name).override)
        for function in Path("/sys/bus/pci/devices").iterdir()
    }
    settled = [{key: link[key] for key in names if key in link} for link in links]
    for link in settled:
        link["flags"] = sorted(set(link["flags"]) - {"NO-CARRIER", "LOWER_UP"})
        link.pop("operstate", None)
    return {"links": settled, "functions": functions, "vfs": card().count}


@pytest.fixture(scope="module", autouse=True)
def _driver() -> None:
    for module in ("igbvf", "vfio_iommu_type1"):
        run(["modprobe", module])
    set_up(get_link("wire0").index, True)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A run directory; afterwards there is no journal in it, and the host is as it was."""
    before = host()
    yield tmp_path
    try:
        assert not (tmp_path / "journal.jsonl").exists(), (tmp_path / "journal.jsonl").read_text()
        assert host() == before
    finally:
        for iface in ("nic0", "nic1"):
            if card(iface).count:
                card(iface).set_count(0)


@pytest.fixture
def box() -> Iterator[str]:
    """A network namespace, as a container has one."""
    name = f"box{os.getpid()}"
    run(["ip", "netns", "add", name])
    yield name
    run(["ip", "netns", "del", name], check=False)


def frames(sender: socket.socket, receiver: socket.socket, target: bytes) -> list[bytes]:
    sent = [target + bytes(6) + ETHERTYPE.to_bytes(2, "big") + bytes([n]) * 50 for n in range(FRAMES)]
    for frame in sent:
        sender.send(frame)
    received = [receiver.recv(2048) for _ in sent]
    assert received == sent
    return received


def packet_socket(name: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERTYPE))
    found.bind((name, ETHERTYPE))
    found.settimeout(20)
    return found


def carrier(name: str) -> bool:
    with suppress(OSError):
        return Path(f"/sys/class/net/{name}/carrier").read_text() == "1\n"
    return False


def test_configured_passed_on_and_given_back(directory: Path, box: str) -> None:
    """A VF for a virtual machine, one on the host, one in a container; then guests go one by one."""
    with Up(
        directory,
        f"name=vm1,mac={mac(1)},vlan=100,qos=3,spoof-check=off,trust=on",
        f"name=vm2,mac={mac(2)},to=netdev,vf=2",
        f"name=c1,mac={mac(3)},to=netns:{box}",
        vfs=4,
    ) as up:
        assert card().count == 4
        vm1 = up.facts("vm1")
        asked = {key: value for key, value in vm1.items() if key.endswith("_asked") and value is not None}
        assert asked.keys() == {f"{key}_asked" for key in ("mac", "vlan", "qos", "spoof_check", "trust")}
        assert {key: vm1[key.replace("_asked", "_in_use")] for key in asked} == asked
        assert (vm1["vf"], vm1["driver"], vm1["connected"]) == (0, "vfio-pci", False)
        assert Path(vm1["node"]).is_char_device()
        assert vm1["node_owner"] == "root:root 0600"
        assert (
            list(MODE.qemu(up.service.guests[0], DEFAULT_DEVICE, vm1).args)[1]
            == f"vfio-pci,id=nic-vm1,host={vm1['pci']}"
        )

        vm2, c1 = up.facts("vm2"), up.facts("c1")
        assert (vm2["vf"], vm2["driver"], vm2["mac_in_use"]) == (2, "igbvf", mac(2))
        assert Path(f"/sys/class/net/{vm2['device']}/address").read_text().strip() == mac(2)
        assert (c1["vf"], c1["driver"], c1["netns"]) == (1, "igbvf", box)
        assert mac(3) in run(["ip", "-n", box, "link", "show", c1["device"]]).stdout

        with pytest.raises(NicError, match=r"VF 1 \(.*\): another guest has it"):
            up.add(f"name=vm4,mac={mac(4)},vf=1,to=netdev")
        up.add(f"name=vm4,mac={mac(4)},to=netdev")
        assert up.facts("vm4")["vf"] == 3
        with pytest.raises(NicError, match=r"none of its 4 VFs is free .*VF 3: another guest has it"):
            up.add(f"name=vm5,mac={mac(5)},to=netdev")
        up.remove("vm1")
        now = vfconfig.read_vfs(up.index)[0].settings
        assert (now.vlan, now.qos, now.spoof_check, now.trust) == (0, 0, True, False)
        assert card().vfs()[0].driver == "igbvf"


def test_frames(directory: Path, box: str) -> None:
    """A VF in a container, the host on the physical function and the network: 23 frames each way."""
    with Up(directory, f"name=c1,mac={mac(3)},to=netns:{box}") as up:
        device = up.facts("c1")["device"]
        place = vfnetdev.named(box)
        run(["ip", "-n", box, "link", "set", device, "up"])
        wait_for(lambda: carrier("nic0") and vfnetdev.within(place, lambda: _running(device)), 30, "carriers")
        inside = vfnetdev.within(place, lambda: packet_socket(device))
        with packet_socket("wire0") as wire, packet_socket("nic0") as pf, inside:
            frames(wire, inside, bytes.fromhex(mac(3).replace(":", "")))
            frames(inside, wire, bytes.fromhex("5254004c0003"))
            frames(pf, inside, bytes.fromhex(mac(3).replace(":", "")))
            frames(inside, pf, bytes.fromhex("5254004c0001"))


def _running(name: str) -> bool:
    return link_state(name).up


def test_taken_over_and_undone_after_kill(directory: Path, box: str) -> None:
    """The same wishes: VFs, their settings and drivers stay untouched. Others: all is undone and made anew."""
    guests = (f"name=vm1,mac={mac(1)},vlan=7", f"name=c1,mac={mac(3)},to=netns:{box}")
    Up(directory, *guests).kill()
    first = host()
    up = Up(directory, *guests)
    assert host() == first
    assert (up.facts("vm1")["vf"], up.facts("c1")["vf"], up.facts("c1")["netns"]) == (0, 1, box)
    up.kill()
    with Up(directory, f"name=vm2,mac={mac(2)},to=netdev", vfs=1) as up:
        assert card().count == 1
        assert up.facts("vm2")["driver"] == "igbvf"


def test_a_failure_half_way_leaves_nothing(directory: Path) -> None:
    """igb can't set a VF's carrier; when it says so, the first guest is made already."""
    with pytest.raises(NicError, match=r"VF 1: link=enable: driver igb can't set that: leave it out"):
        Up(directory, f"name=vm1,mac={mac(1)},vlan=5", f"name=vm2,mac={mac(2)},link=enable")


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (vfconfig.VfSettings(min_rate=10), r"min-rate=10, max-rate=0: driver igb refuses it \(Invalid argument\)"),
        (
            vfconfig.VfSettings(vlan=5, vlan_protocol="802.1ad"),
            r"vlan=5, qos=0, vlan-protocol=802.1ad: driver igb refuses it \(Protocol not supported\)",
        ),
    ],
)
def test_what_igb_refuses(directory: Path, wanted: vfconfig.VfSettings, error: str) -> None:
    card().set_count(1)
    index = get_link("nic0").index
    with pytest.raises(NicError, match=error):
        vfconfig.apply("nic0", index, 0, wanted, vfconfig.read_vfs(index)[0].settings)
    card().set_count(0)


def test_the_namespace_of_a_vf_dies(directory: Path, box: str) -> None:
    with Up(directory, f"name=c1,mac={mac(3)},to=netns:{box}") as up:
        address = up.facts("c1")["pci"]
        run(["ip", "netns", "del", box])
        wait_for(lambda: vfnetdev.find(card().vfs()[0]) is not None, 20, f"{address} to be back")
        assert up.facts("c1")["netns"] is None


def test_a_vf_that_a_virtual_machine_has(directory: Path) -> None:
    """Nothing waits for it: a guest isn't removed, an end leaves it in the journal, and `clean` does it later."""
    up = Up(directory, f"name=vm1,mac={mac(1)}")
    facts = up.facts("vm1")
    with open(facts["node"], "rb+", buffering=0):
        assert up.facts("vm1")["connected"]
        with pytest.raises(NicError, match=rf"guest 'vm1': a virtual machine has its VF 0 \(.*pid {os.getpid()}\)"):
            up.remove("vm1")
        up.close()
        assert card().count == 1
        assert {entry.kind for entry in up.journal.pending()} >= {"vf_driver", "sriov_numvfs"}
        with pytest.raises(NicError, match=r"they are used: VF 0 .*a virtual machine has it"):
            sriov.check_count(card(), 2, force=True)
    assert all(item.ok for item in up.journal.replay_undo())


def test_qemu_takes_what_is_printed(directory: Path) -> None:
    """It is stopped before the first instruction: it has the VF then."""
    with Up(directory, f"name=vm1,mac={mac(1)}") as up:
        printed = MODE.qemu(up.service.guests[0], DEFAULT_DEVICE, up.facts("vm1")).args
        fixed = ["-machine", "q35", "-accel", "tcg", "-m", "64M", "-nodefaults", "-display", "none", "-S"]
        with Process(["qemu-system-x86_64", *fixed, *printed], log=directory / "qemu.log") as machine:
            wait_for(lambda: up.facts("vm1")["connected"] or not machine.running, 60, "QEMU to open the VF")
            assert machine.running, machine.log()
            assert up.facts("vm1")["held_by"] == [f"qemu-system-x86, pid {machine.pid}"]
            with pytest.raises(NicError, match="a virtual machine has its VF 0"):
                up.remove("vm1")


def test_vfs_that_are_there_already(directory: Path, box: str) -> None:
    """They are used and stay; what somebody uses isn't; another number needs --force, and is undone."""
    card().set_count(2)
    vf0 = vfnetdev.find(card().vfs()[0])
    assert vf0 is not None
    index = get_link("nic0").index
    old = vfconfig.VfSettings(mac=mac(9), vlan=9)
    vfconfig.apply("nic0", index, 1, old, vfconfig.read_vfs(index)[1].settings)
    run(["ip", "link", "set", vf0[1].name, "name", "taken", "netns", box])
    with pytest.raises(NicError, match=rf"VF 0 \(.*\): its device taken is in namespace {box}"):
        Up(directory, f"name=vm1,mac={mac(1)},vf=0")
    with pytest.raises(NicError, match=rf"and they are used: VF 0 \(.*\): its device .* is in namespace {box}"):
        Up(directory, f"name=vm1,mac={mac(1)}", vfs=3, force=True)
    with Up(directory, f"name=vm1,mac={mac(1)},vlan=5") as up:
        assert up.facts("vm1")["vf"] == 1
    run(["ip", "-n", box, "link", "set", "taken", "netns", "1"])
    assert card().count == 2
    now = vfconfig.read_vfs(index)[1].settings
    assert (now.mac, now.vlan) == (mac(9), 9)
    with pytest.raises(NicError, match=r"give --vfs 2 to use them, or --force to replace them"):
        Up(directory, f"name=vm1,mac={mac(1)}", vfs=3)
    with Up(directory, f"name=vm1,mac={mac(1)}", vfs=3, force=True):
        assert card().count == 3
    assert card().count == 2
    now = vfconfig.read_vfs(index)[1].settings
    assert (now.mac, now.vlan) == (mac(9), 9)
    card().set_count(0)


def test_more_than_the_card_has(directory: Path) -> None:
    with pytest.raises(NicError, match=r"nic0: 8 VFs asked for, and the card can have 7; give --vfs 7"):
        Up(directory, f"name=vm1,mac={mac(1)}", vfs=8)


def test_a_group_with_others_in_it(directory: Path) -> None:
    """nic1's port has no ACS. A virtual machine can't have its VFs, a container can."""
    with pytest.raises(NicError, match=r"shares IOMMU group \d+ with 0000:02:00\.0 \(igb\).*ACS"):
        Up(directory, f"name=vm1,mac={mac(1)}", iface="nic1")
    with Up(directory, f"name=vm1,mac={mac(1)},to=netdev", iface="nic1"):
        feature = MODE.feature(get_link("nic1"))
        assert feature.supported is False
        assert "for to=netdev and to=netns:NAME only" in feature.detail
        assert "shares IOMMU group" in feature.detail


def test_a_module_that_is_not_loaded(directory: Path) -> None:
    run(["modprobe", "-r", "vfio_pci"])
    try:
        feature = MODE.feature(get_link("nic0"))
        assert (feature.supported, feature.remedy) == (False, "`modprobe vfio-pci`")
        with pytest.raises(NicError, match=r"driver vfio-pci is not loaded: `modprobe vfio-pci`"):
            Up(directory, f"name=vm1,mac={mac(1)}")
    finally:
        run(["modprobe", "vfio_pci"])
    feature = MODE.feature(get_link("nic0"))
    assert (feature.supported, feature.detail) == (True, "up to 7 VFs, 0 now; the IOMMU is on, vfio-pci is loaded")


def test_no_card_at_all(directory: Path) -> None:
    with pytest.raises(NicError, match=r"wire0: virtio_net is not a PCI device"):
        Up(directory, iface="wire0")
    assert vfio.holders(card().function) == []


def test_the_command_killed_and_cleaned(directory: Path) -> None:
    """`up`, kill -9, and what `clean` does: the one test of the whole command here."""
    options = ["--run-dir", str(directory), "--metrics", "none", "--guest", f"name=vm1,mac={mac(1)},vlan=5"]
    log = directory / "up.log"
    with Process([".venv/bin/xdpvhost", "up", "--iface", "nic0", "--mode", "vf", *options], log=log) as up:
        up.wait_line("ready: nic0 in mode vf, 1 guests", 60)
        up.kill()
    undone = Journal(directory / "journal.jsonl", handlers()).replay_undo()
    assert all(item.ok for item in undone)
    assert "interface nic0: 0 VFs" in [item.detail for item in undone]


@pytest.mark.machine("bare")
def test_without_an_iommu(tmp_path: Path) -> None:
    feature = MODE.feature(get_link("nic0"))
    assert feature.supported is False
    assert "up to 7 VFs, 0 now, for to=netdev and to=netns:NAME only: the IOMMU is off" in feature.detail
    assert "in a virtual machine: give it an IOMMU, with QEMU" in feature.remedy
    with pytest.raises(NicError, match=r"the IOMMU is off .*: switch VT-d or AMD-Vi on in the firmware's setup"):
        Up(tmp_path, f"name=vm1,mac={mac(1)}")
    assert card().count == 0
    with Up(tmp_path, f"name=vm1,mac={mac(1)},to=netdev") as up:
        assert up.facts("vm1")["driver"] == "igbvf"
    assert card().count == 0
