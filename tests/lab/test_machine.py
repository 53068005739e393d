# SPDX-License-Identifier: Apache-2.0
"""The machine has what it is for: cards with VFs, an IOMMU with groups, the devices of the comparison modes."""

import os
import socket
from pathlib import Path

import pytest

from support.process import run, wait_for

PF = Path("/sys/class/net/nic0/device")


def test_sriov_makes_vfs_in_groups_of_their_own() -> None:
    assert (PF / "sriov_totalvfs").read_text().strip() == "7"
    (PF / "sriov_numvfs").write_text("2")
    try:
        groups = [os.readlink(PF / f"virtfn{n}" / "iommu_group") for n in (0, 1)] + [os.readlink(PF / "iommu_group")]
        assert len(set(groups)) == 3
    finally:
        (PF / "sriov_numvfs").write_text("0")


def test_a_port_without_acs_has_one_group_for_all() -> None:
    pf = Path("/sys/class/net/nic1/device")
    (pf / "sriov_numvfs").write_text("1")
    try:
        assert os.readlink(pf / "virtfn0" / "iommu_group") == os.readlink(pf / "iommu_group")
    finally:
        (pf / "sriov_numvfs").write_text("0")


@pytest.mark.parametrize("device", ["/dev/vhost-net", "/dev/net/tun", "/dev/vfio/vfio"])
def test_devices(device: str) -> None:
    assert Path(device).is_char_device()


def test_frames_pass_the_cable() -> None:
    """23 frames each way between nic0 and wire0."""
    for name in ("nic0", "wire0"):
        run(["ip", "link", "set", name, "up"])
    wait_for(lambda: Path("/sys/class/net/nic0/carrier").read_text() == "1\n", 20, "nic0's carrier")
    for sender, receiver in (("nic0", "wire0"), ("wire0", "nic0")):
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as source,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as target,
        ):
            source.bind((sender, 0x88B5))
            target.bind((receiver, 0x88B5))
            target.settimeout(10)
            head = bytes.fromhex(Path(f"/sys/class/net/{receiver}/address").read_text().replace(":", "")) + bytes(6)
            sent = [head + b"\x88\xb5" + bytes([n]) * 50 for n in range(23)]
            for frame in sent:
                source.send(frame)
            assert [target.recv(2048) for _ in sent] == sent


@pytest.mark.machine("bare")
def test_the_bare_machine_lacks_what_it_should() -> None:
    assert not list(Path("/sys/kernel/iommu_groups").iterdir())
    assert not Path("/dev/vhost-net").exists()
    done = run(["modprobe", "vhost_net"], check=False)
    assert done.returncode != 0
    assert "vhost_net not found" in done.stderr
