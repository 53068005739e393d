# SPDX-License-Identifier: Apache-2.0
"""Mode `vf` without a card: SPEC keys, what is printed for QEMU and libvirt, and what `features` says is missing."""

from pathlib import Path

import pytest

from support.golden import check_golden
from support.pcitree import PF, PciTree
from xdpvhost import qemu
from xdpvhost.config import GuestSpec, UpConfig, check_options, format_guest, parse_guest, parse_guests
from xdpvhost.errors import ConfigError
from xdpvhost.links import sriov
from xdpvhost.links.netlink import get_link
from xdpvhost.links.pci import Function
from xdpvhost.links.vfconfig import VfSettings
from xdpvhost.modes.vf import MODE, parse, passthrough_feature

PLAIN = "name=vm1,mac=52:54:00:00:00:01"
FACTS = {"pci": "0000:01:10.2"}


def guest(extra: str = "", base: str = PLAIN) -> GuestSpec:
    return parse_guest(base + extra, mode="vf")


def test_nothing_asked_but_the_address() -> None:
    wish = parse(guest())
    assert (wish.vf, wish.to, wish.netns) == (None, "vfio", None)
    assert wish.settings == VfSettings(mac="52:54:00:00:00:01")


def test_everything_asked() -> None:
    vlan = ",vlan=100,qos=7,vlan-protocol=802.1ad"
    spec = guest(f",vf=3,to=netns:box{vlan},spoof-check=off,trust=on,min-rate=10,max-rate=20,link=enable")
    wish = parse(spec)
    assert (wish.vf, wish.to, wish.netns) == (3, "netns", "box")
    assert wish.settings == VfSettings("52:54:00:00:00:01", 100, 7, "802.1ad", False, True, 10, 20, "enable")
    assert parse_guest(format_guest(spec), mode="vf") == spec


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        (",vlan=4095", "vlan=4095 is not a number from 0 to 4094"),
        (",vlan=-1", "vlan=-1 is not a number"),
        (",vlan=1,qos=8", "qos=8 is not a number from 0 to 7"),
        (",qos=1", r"qos without vlan; add vlan=N \(0 to 4094\)"),
        (",vlan-protocol=802.1ad", "vlan-protocol without vlan"),
        (",vlan=1,vlan-protocol=802.1X", "vlan-protocol=802.1X is unknown; use 802.1Q or 802.1ad"),
        (",spoof-check=yes", "spoof-check=yes is unknown; use on or off"),
        (",trust=1", "trust=1 is unknown; use on or off"),
        (",min-rate=2,max-rate=1", "min-rate=2 is above max-rate=1; give it 1 or less"),
        (",max-rate=1.5", "max-rate=1.5 is not a number"),
        (",link=up", "link=up is unknown; use auto or enable or disable"),
        (",vf=0000000000000070000", "is not a number from 0 to 65535"),
        (",vf=x", "vf=x is not a number from 0 to 65535"),
        (",to=vm", "to=vm is unknown; use vfio, netdev or netns:NAME"),
        (",to=netns", "to=netns is unknown"),
        (",to=netns:", "to=netns: is unknown"),
        (",to=netns:../../proc/1/ns/net", "is unknown; use vfio, netdev or netns:NAME"),
        (",queues=2", "queues=2: a VF has the queues that its card gives it"),
        (",socket=/run/x.sock", "unknown key 'socket' in mode vf; known keys are name, mac, queues, vf, to, vlan"),
    ],
)
def test_what_no_card_can_have(extra: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        guest(extra)


def test_a_group_address() -> None:
    with pytest.raises(ConfigError, match="is a multicast address"):
        guest(base="name=vm1,mac=01:00:5e:00:00:01")


def test_no_limit_is_above_any_guarantee() -> None:
    assert parse(guest(",min-rate=2,max-rate=0")).settings.max_rate == 0


def test_guests_against_each_other() -> None:
    first, second = guest(",vf=1"), guest(",vf=1", "name=vm2,mac=52:54:00:00:00:02")
    with pytest.raises(ConfigError, match="guest 'vm2': vf=1 is taken by guest 'vm1'"):
        MODE.check_new_guest(second, [first])
    MODE.check_new_guest(guest(base="name=vm3,mac=52:54:00:00:00:03"), [first])


@pytest.mark.parametrize(
    ("specs", "error"),
    [
        ([f"{PLAIN},vf=2"], "guest 'vm1': vf=2 with --vfs 2: VFs are counted from 0; use 0 to 1"),
        (
            [f"name=v{n},mac=52:54:00:00:00:0{n}" for n in range(3)],
            "3 guests with --vfs 2: each needs one; give --vfs 3",
        ),
    ],
)
def test_guests_against_the_number_of_vfs(specs: list[str], error: str) -> None:
    config = UpConfig(ifaces=("nic0",), guests=parse_guests(specs, Path("/run"), "vf"), mode="vf", vfs=2)
    with pytest.raises(ConfigError, match=error):
        MODE.check_config(config)


def test_the_option_is_for_this_mode_only() -> None:
    check_options("vf", "qemu", ["vfs", "force"])
    with pytest.raises(ConfigError, match="--vfs: means nothing in mode tap, only in vf"):
        check_options("tap", "qemu", ["vfs"])


def test_qemu() -> None:
    args = MODE.qemu(guest(",vlan=100"), qemu.DEFAULT_DEVICE, FACTS)
    assert not args.files
    check_golden("qemu-vf.txt", qemu.shell(args.args) + "\n")


@pytest.mark.parametrize(("name", "extra"), [("plain", ""), ("vlan", ",vlan=100"), ("qos", ",vlan=100,qos=3")])
def test_libvirt(name: str, extra: str) -> None:
    check_golden(f"libvirt-vf-{name}.xml", MODE.libvirt(guest(extra), qemu.DEFAULT_DEVICE, FACTS) + "\n")


def test_what_no_virtual_machine_can_have() -> None:
    for to in ("netdev", "netns:box"):
        with pytest.raises(ConfigError, match=f"to={to} keeps its VF on the host; a virtual machine wants to=vfio"):
            MODE.qemu(guest(f",to={to}"), qemu.DEFAULT_DEVICE, FACTS)
    with pytest.raises(ConfigError, match="which VF it has is known to the daemon only"):
        MODE.libvirt(guest(), qemu.DEFAULT_DEVICE, None)
    with pytest.raises(ConfigError, match="leave out --queue-size and --packed"):
        MODE.qemu(guest(), qemu.Device(packed=True), FACTS)


def test_feature_of_what_is_no_card() -> None:
    feature = MODE.feature(get_link("lo"))
    assert (feature.name, feature.supported, feature.remedy) == ("mode-vf", False, "use a NIC with SR-IOV")
    assert feature.detail.endswith("is not a PCI device, and only those have VFs")


def test_features(tmp_path: Path) -> None:
    """One after the other is put right."""
    tree = PciTree(tmp_path / "sys")
    tree.card(vfs=1, groups=False)
    card = sriov.check_card(Function(PF, tree.root), "ens1f0")

    def told() -> tuple[bool | None, str, str]:
        feature = passthrough_feature("mode-vf", card)
        return feature.supported, feature.detail, feature.remedy

    only = "up to 7 VFs, 1 now, for to=netdev and to=netns:NAME only: "
    supported, detail, remedy = told()
    assert not supported
    assert detail == only + "the IOMMU is off (no groups in /sys/kernel/iommu_groups); driver vfio-pci is not loaded"
    assert remedy.startswith("switch VT-d or AMD-Vi on")

    tree.function("0000:02:00.0", driver="nvme", group=30)
    tree.driver("vfio-pci")
    vf = tree.root / "bus/pci/devices/0000:01:10.0"
    group = tree.root / "kernel/iommu_groups/30"
    (vf / "iommu_group").symlink_to(group)
    (group / "devices" / vf.name).symlink_to(vf)
    supported, detail, remedy = told()
    assert not supported
    assert detail == only + "PCI function 0000:01:10.0 shares IOMMU group 30 with 0000:02:00.0 (nvme)"
    assert "PCIe ACS" in remedy

    (group / "devices/0000:02:00.0").unlink()
    assert told() == (True, "up to 7 VFs, 1 now; the IOMMU is on, vfio-pci is loaded", "")
