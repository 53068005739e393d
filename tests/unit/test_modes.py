# SPDX-License-Identifier: Apache-2.0
"""Modes of links without the machine: SPEC keys, options, QEMU arguments and libvirt elements against golden files."""

from __future__ import annotations

import os
import stat
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from support.golden import check_golden
from xdpvhost import config, modes
from xdpvhost.config import GuestSpec, Mode, UpConfig, check_options, differing, format_guest, parse_cpus, wishes
from xdpvhost.errors import ConfigError
from xdpvhost.feature import Feature
from xdpvhost.links import opened, vhostnet
from xdpvhost.links.netlink import Link
from xdpvhost.links.tap import Owner
from xdpvhost.modes import keys, mode_for
from xdpvhost.qemu import Device, shell
from xdpvhost.serve_links import LinkService
from xdpvhost.serve_tap import TapService

ONE = "name=vm1,mac=52:54:00:00:00:01"
FOUR = "name=vm-4,mac=52:54:00:00:00:04,queues=4"
LINK_MODES: tuple[Mode, ...] = ("tap", "vhost-net", "macvtap", "emulated")


def guest(mode: Mode, text: str = ONE) -> GuestSpec:
    return config.parse_guest(text, mode=mode)


@pytest.mark.parametrize(
    ("golden", "mode", "spec", "device", "facts"),
    [
        ("mode-tap", "tap", ONE, Device(), None),
        ("mode-tap-device", "tap", f"{FOUR},tap=mine", Device(1024, packed=True), None),
        ("mode-vhost-net", "vhost-net", FOUR, Device(), None),
        ("mode-macvtap", "macvtap", ONE, Device(), None),
        ("mode-macvtap-known", "macvtap", FOUR, Device(256), {"node": "/dev/tap23"}),
        ("mode-emulated", "emulated", ONE, Device(), None),
    ],
)
def test_qemu_and_libvirt(golden: str, mode: Mode, spec: str, device: Device, facts: dict[str, str] | None) -> None:
    parsed, how = guest(mode, spec), mode_for(mode)
    net = how.qemu(parsed, device, facts)
    check_golden(f"{golden}.txt", shell(net.args, net.files) + "\n")
    xml = how.libvirt(parsed, device, facts)
    check_golden(f"{golden}.xml", xml + "\n")
    target = ET.fromstring(xml).find("target")
    assert target is not None
    assert target.get("dev") == keys.device_name(parsed)


def test_every_mode_is_known() -> None:
    assert {mode.name for mode in modes.link_modes()} >= set(LINK_MODES)
    for mode in modes.link_modes():
        assert mode_for(mode.name) is mode


@pytest.mark.parametrize("mode", LINK_MODES)
def test_specs_survive_a_round_trip(mode: Mode) -> None:
    for text in (ONE, f"{ONE},tap=mine,owner=root,group=0"):
        spec = guest(mode, text)
        assert guest(mode, format_guest(spec)) == spec


@pytest.mark.parametrize(
    ("mode", "spec", "words"),
    [
        ("macvtap", f"{ONE},address=192.0.2.1", "unknown key 'address' in mode macvtap; known keys are name, mac"),
        ("vhost-net", f"{ONE},socket=/x", "unknown key 'socket' in mode vhost-net"),
        ("tap", f"{ONE},address=192.0.2.1+x", "'x' is no IP address"),
        ("tap", f"{ONE},address=224.0.0.1", "no address that can be routed"),
        ("tap", f"{ONE},address=192.0.2.1+192.0.2.1", "is there twice"),
        ("tap", f"{ONE},tap=a b", "is no name for an interface"),
        ("tap", f"{ONE},tap=sixteen-bytes-xx", "is no name for an interface"),
        ("macvtap", f"{ONE},tap=..", "is no name for an interface"),
        ("emulated", f"{ONE},queues=2", "e1000e has one"),
    ],
)
def test_bad_specs(mode: Mode, spec: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        guest(mode, spec)
    assert words in str(caught.value)


def test_keys_of_the_data_plane_are_not_for_qemus_taps() -> None:
    specs = (guest("tap", f"{ONE},vlan=10"),)
    with pytest.raises(ConfigError, match="vlan= is for guests that the data plane serves"):
        LinkService(UpConfig(("eth0",), specs, mode="tap"))
    assert TapService(UpConfig(("eth0",), specs, mode="tap", serve="vhost-user")).needs


def test_a_device_that_qemu_opens_is_not_changed() -> None:
    service = LinkService(UpConfig(("eth0",), mode="vhost-net"))
    with pytest.raises(ConfigError, match="'vm1': in mode vhost-net nothing can be changed"):
        service.set_guest("vm1", {"owner": "root"})


def test_device_names_fit_and_differ() -> None:
    long = [f"name=web-server-number-{n},mac=52:54:00:00:00:01" for n in (1, 2)]
    one, two = (keys.device_name(guest("tap", text)) for text in long)
    assert keys.device_name(guest("tap")) == "tap-vm1"
    assert one != two
    assert all(len(name) == 15 and name.startswith("tap-web-") for name in (one, two))


@pytest.mark.parametrize(
    ("mode", "name", "good"),
    [
        ("xdp", "workers", True),
        ("tap", "workers", False),
        ("tap", "routed", True),
        ("macvtap", "routed", False),
        ("macvtap", "macvtap_mode", True),
        ("tap", "macvtap_mode", False),
        ("vhost-net", "pin_vhost", True),
        ("xdp", "bridge", False),
        ("emulated", "metrics", True),
    ],
)
def test_options_of_other_modes_are_refused(mode: Mode, name: str, good: bool) -> None:
    if good:
        check_options(mode, "qemu", [name])
        return
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')}: means nothing in mode {mode}, only in"):
        check_options(mode, "qemu", [name])


def test_the_data_planes_tap_has_the_data_planes_options() -> None:
    check_options("tap", "vhost-user", ["workers", "poll"])


@pytest.mark.parametrize(("text", "cpus"), [("2", (2,)), ("2,4-6,5", (2, 4, 5, 6)), ("0-0", (0,))])
def test_cpus(text: str, cpus: tuple[int, ...]) -> None:
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["", "x", "3-1", "1,", "-1", "1-2-3"])
def test_bad_cpus(text: str) -> None:
    with pytest.raises(ConfigError, match="--pin-vhost"):
        parse_cpus(text)


def test_wishes_differ_in_words() -> None:
    ours = UpConfig(("eth0",), mode="tap", guests=(guest("tap"),), force=True)
    assert differing(wishes(ours, ours.guests), wishes(UpConfig(("eth0",), mode="tap"), ours.guests)) == []
    other = UpConfig(("eth0",), mode="tap", bridge="br0")
    assert differing(wishes(ours, ours.guests), wishes(other, ())) == [
        "bridge br0 instead of none",
        f"guests none instead of {format_guest(guest('tap'))}",
    ]


def test_one_guest_in_passthru() -> None:
    both = (guest("macvtap"), guest("macvtap", FOUR))
    mode_for("macvtap").check_config(UpConfig(("eth0",), mode="macvtap", guests=both))
    with pytest.raises(ConfigError, match="to one guest, and 2 are asked for"):
        mode_for("macvtap").check_config(UpConfig(("eth0",), mode="macvtap", guests=both, macvtap_mode="passthru"))


def test_cpus_that_the_machine_has_not() -> None:
    with pytest.raises(ConfigError, match=r"--pin-vhost: this machine lets us use CPUs .* not 4711"):
        mode_for("vhost-net").check_config(UpConfig(("eth0",), mode="vhost-net", pin_vhost=(4711,)))


# ---- /dev/vhost-net


def test_vhost_net_that_is_missing(tmp_path: Path) -> None:
    missing = vhostnet.missing(node=tmp_path / "vhost-net")
    assert missing is not None
    assert "vhost-net: No such file or directory" in missing.cause
    assert "vhost_net" in missing.remedy


def test_vhost_net_that_is_no_device(tmp_path: Path) -> None:
    node = tmp_path / "vhost-net"
    node.touch()
    missing = vhostnet.missing(node=node)
    assert missing is not None
    assert missing.cause == f"{node} is no device"


@pytest.mark.parametrize(
    ("mode", "who", "good"),
    [
        (0o600, Owner(uid=65534), False),
        (0o666, Owner(uid=65534), True),
        (0o660, Owner(gid=4711), False),
        (0o660, Owner(gid=0), True),
        (0o600, Owner(uid=0), True),
        (0o600, Owner(), True),
    ],
)
def test_who_may_open_vhost_net(tmp_path: Path, mode: int, who: Owner, good: bool) -> None:
    node = tmp_path / "vhost-net"
    os.mknod(node, stat.S_IFCHR | mode, os.makedev(1, 3))  # /dev/null's number: only its mode matters
    node.chmod(mode)
    missing = vhostnet.missing(who, node)
    assert (missing is None) == good
    if missing is not None:
        assert "may not be opened by" in missing.cause


def test_zero_copy_is_told(tmp_path: Path) -> None:
    option = tmp_path / "experimental_zcopytx"
    assert vhostnet.zero_copy_tx(option) == "unknown"
    option.write_text("0\n")
    assert vhostnet.zero_copy_tx(option) == "off"
    option.write_text("1\n")
    assert vhostnet.zero_copy_tx(option) == "on"


def test_vhost_threads_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of Linux 6.4 and later are the process's own threads, earlier ones are the kernel's."""
    for path, name in (("71/task/72", "vhost-71"), ("71/task/71", "qemu"), ("90", "vhost-71"), ("91", "vhost-7")):
        directory = tmp_path / path
        directory.mkdir(parents=True)
        (directory / "comm").write_text(f"{name}\n")
    monkeypatch.setattr(opened, "PROC", tmp_path)
    assert opened.vhost_threads(71) == [72, 90]
    assert opened.vhost_threads(7) == [91]


def test_features_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    port = Link("eth0", 2, 1500, True, b"\x52\x54\0\0\0\1", None, 7, 1, 1)
    found = {mode: mode_for(mode).feature(port) for mode in LINK_MODES}
    assert {feature.name for feature in found.values()} == {f"mode-{mode}" for mode in LINK_MODES}
    assert found["macvtap"] == Feature(
        "mode-macvtap", False, "it is a port of another interface, which takes its frames", "use that one"
    )
    from xdpvhost.modes import tapped

    monkeypatch.setattr(tapped, "missing_privileges", lambda: ["CAP_NET_ADMIN"])
    assert mode_for("tap").feature(port) == Feature("mode-tap", False, "missing CAP_NET_ADMIN", "run as root")
