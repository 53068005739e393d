# SPDX-License-Identifier: Apache-2.0
"""What keeps a PCI function from a virtual machine, on a sysfs made of files: each refusal names the remedy."""

import os
from pathlib import Path

import pytest

from support.pcitree import PF, PciTree
from xdpvhost.links import modules, vfio
from xdpvhost.links.pci import Function, Lacking


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "sys")


@pytest.mark.parametrize(
    ("table", "remedy"),
    [
        ("DMAR", "add intel_iommu=on to the kernel's command line"),
        ("IVRS", "take amd_iommu=off and iommu=off from the kernel's command line"),
        ("FACP", "switch VT-d or AMD-Vi on in the firmware's setup .*-device intel-iommu,intremap=on"),
    ],
)
def test_iommu_off(tree: PciTree, table: str, remedy: str) -> None:
    tables = tree.root / "firmware/acpi/tables"
    tables.mkdir(parents=True)
    (tables / table).touch()
    tree.card(vfs=1, groups=False)
    with pytest.raises(Lacking, match=rf"the IOMMU is off \(no groups in /sys/kernel/iommu_groups\): {remedy}"):
        vfio.check_iommu(tree.root)


def test_a_group_without_an_iommu_is_none(tree: PciTree) -> None:
    tree.card(vfs=1)
    for group in (tree.root / "kernel/iommu_groups").iterdir():
        (group / "name").write_text("vfio-noiommu\n")
    with pytest.raises(Lacking, match="the IOMMU is off"):
        vfio.check_iommu(tree.root)
    with pytest.raises(Lacking, match="is in no IOMMU group"):
        vfio.check_group(Function("0000:01:10.0", tree.root))


def test_iommu_on(tree: PciTree) -> None:
    tree.card(vfs=1)
    tree.driver("vfio-pci")
    vfio.check(Function("0000:01:10.0", tree.root))


def test_driver_missing(tree: PciTree, tmp_path: Path) -> None:
    present, absent, unknown = (tmp_path / name for name in ("6.1", "6.2", "6.3"))
    for directory in (present, absent):
        directory.mkdir()
        (directory / "modules.dep").write_text("kernel/drivers/vfio/vfio.ko:\n")
    with (present / "modules.dep").open("a") as dep:
        dep.write("kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/drivers/vfio/vfio.ko.xz\n")
    for directory, remedy in (
        (present, "`modprobe vfio-pci`$"),
        (absent, r"a kernel with CONFIG_VFIO_PCI: the one that runs \(6.2\) has no module vfio-pci"),
        (unknown, "`modprobe vfio-pci`, once .*/6.3 is there"),
    ):
        with pytest.raises(Lacking, match=f"driver vfio-pci is not loaded: {remedy}"):
            vfio.check_driver(tree.root, directory)


def test_what_connects_it_to_the_iommu(tree: PciTree, tmp_path: Path) -> None:
    tree.driver("vfio-pci")
    (tree.root / "module/vfio_iommu_type1").rmdir()
    (tmp_path / "modules.dep").write_text("kernel/drivers/vfio/vfio_iommu_type1.ko: kernel/drivers/vfio/vfio.ko\n")
    with pytest.raises(Lacking, match=r"module vfio_iommu_type1 is not loaded: `modprobe vfio_iommu_type1`$"):
        vfio.check_driver(tree.root, tmp_path)
    (tree.root / "module/iommufd").mkdir()
    vfio.check_driver(tree.root, tmp_path)


def test_module_states(tree: PciTree, tmp_path: Path) -> None:
    (tmp_path / "modules.builtin").write_text("kernel/drivers/net/tun.ko\n")
    (tmp_path / "modules.dep").write_text("kernel/drivers/vhost/vhost_net.ko: kernel/drivers/net/tap.ko\n")
    (tree.root / "module/vfio_pci").mkdir()
    names = ["vfio-pci", "tun", "vhost-net", "vhost_net", "tap", "vhost"]
    states = [modules.state(name, tree.root, tmp_path) for name in names]
    assert states == ["loaded", "loaded", "available", "available", "absent", "absent"]


def test_a_shared_group(tree: PciTree) -> None:
    """Others are named with their drivers; bridges don't count."""
    for address, driver, kind in (
        ("0000:00:1c.0", "pcieport", 0x060400),
        ("0000:01:00.0", "igb", 0x020000),
        ("0000:01:00.1", None, 0x020000),
        ("0000:01:10.0", "igbvf", 0x020000),
    ):
        tree.function(address, driver=driver, group=7, kind=kind)
    with pytest.raises(
        Lacking,
        match=r"0000:01:10\.0 shares IOMMU group 7 with 0000:01:00\.0 \(igb\), 0000:01:00\.1 \(no driver\): .*ACS",
    ):
        vfio.check_group(Function("0000:01:10.0", tree.root))


def test_a_bridge_may_be_in_the_group(tree: PciTree) -> None:
    tree.function("0000:00:1c.0", driver="pcieport", group=7, kind=0x060400)
    tree.function("0000:01:10.0", driver="igbvf", group=7)
    vfio.check_group(Function("0000:01:10.0", tree.root))


def test_the_file_to_open(tree: PciTree, tmp_path: Path) -> None:
    tree.card(vfs=1)
    function = Function("0000:01:10.0", tree.root)
    assert vfio.node(function) == Path("/dev/vfio/30")
    with pytest.raises(Lacking, match=r"there is no .*/vfio/30: mount devtmpfs at"):
        vfio.check_node(function, tmp_path)
    (tmp_path / "vfio").mkdir()
    path = vfio.node(function, tmp_path)
    path.touch(mode=0o600)
    os.chmod(path, 0o660)
    assert vfio.who_may_open(path).endswith(" 0660")
    assert vfio.who_may_open(tmp_path / "vfio/31") == ""


def test_who_has_it_open(tree: PciTree, tmp_path: Path) -> None:
    tree.card(vfs=2, driver="vfio-pci")
    free, held = (Function(f"0000:01:10.{n}", tree.root) for n in range(2))
    (tmp_path / "vfio").mkdir()
    for function in (free, held):
        vfio.node(function, tmp_path).touch()
    with vfio.node(held, tmp_path).open():
        assert vfio.holders(free, tmp_path) == []
        assert [h.split(", ")[1] for h in vfio.holders(held, tmp_path)] == [f"pid {os.getpid()}"]


def test_what_is_not_ours_is_left(tree: PciTree) -> None:
    tree.function(PF, driver="uio_pci_generic")
    function = Function(PF, tree.root)
    given = vfio.give_back(function, ours=("vfio-pci", "vfio-pci"), before=("igbvf", None))
    assert given == "driver uio_pci_generic has it by now, which is not ours"
    assert vfio.give_back(function, ours=("vfio-pci", "vfio-pci"), before=("uio_pci_generic", None)).endswith(
        "as before"
    )
