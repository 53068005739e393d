# SPDX-License-Identifier: Apache-2.0
"""Which cards can have VFs, how many, and what is refused, on a sysfs made of files."""

from pathlib import Path

import pytest

from support.pcitree import PF, PciTree
from xdpvhost.errors import NicError
from xdpvhost.links import sriov
from xdpvhost.links.netlink import get_link
from xdpvhost.links.pci import Function, Lacking


@pytest.fixture
def tree(tmp_path: Path) -> PciTree:
    return PciTree(tmp_path / "sys")


def card(tree: PciTree) -> sriov.Card:
    return sriov.check_card(Function(PF, tree.root), "ens1f0")


def test_vfs_by_number(tree: PciTree) -> None:
    tree.card(vfs=3)
    found = card(tree)
    assert (found.total, found.count) == (7, 3)
    assert {n: str(f) for n, f in found.vfs().items()} == {n: f"0000:01:10.{n}" for n in range(3)}
    vf = found.vf(2)
    assert vf is not None
    assert (vf.driver, vf.group, vf.override) == ("igbvf", "32", None)
    assert vf.physical == found.function
    assert found.vf(3) is None


def test_what_is_no_pci_device() -> None:
    with pytest.raises(Lacking, match=r"interface lo: .* is not a PCI device, and only those have VFs: use a NIC with"):
        sriov.card_of(get_link("lo"))


def test_without_the_capability(tree: PciTree) -> None:
    tree.function(PF, driver="e1000e")
    with pytest.raises(Lacking, match=r"ens1f0 \(0000:01:00.0, driver e1000e\) has no SR-IOV capability: use a NIC"):
        card(tree)


def test_switched_off_in_firmware(tree: PciTree) -> None:
    tree.card(total=0)
    with pytest.raises(Lacking, match=r"may have 0 VFs: raise the number in the card's own firmware"):
        card(tree)


def test_a_vf_has_no_vfs(tree: PciTree) -> None:
    tree.card(vfs=1)
    with pytest.raises(Lacking, match=r"is itself a VF, of 0000:01:00\.0: use the interface of its physical function"):
        sriov.check_card(Function("0000:01:10.0", tree.root), "ens1f0v0")


@pytest.mark.parametrize(("vfs", "count"), [(0, 7), (3, 3)])
def test_counts_that_may_be(tree: PciTree, vfs: int, count: int) -> None:
    tree.card(vfs=vfs)
    sriov.check_count(card(tree), count, force=False)


def test_more_than_the_card_has(tree: PciTree) -> None:
    tree.card()
    with pytest.raises(NicError, match=r"ens1f0: 8 VFs asked for, and the card can have 7; give --vfs 7"):
        sriov.check_count(card(tree), 8, force=True)


def test_vfs_that_are_there_already(tree: PciTree) -> None:
    tree.card(vfs=3, driver=None)
    with pytest.raises(NicError, match=r"it has 3 VFs, which must all go .* give --vfs 3 to use them, or --force"):
        sriov.check_count(card(tree), 5, force=False)
    sriov.check_count(card(tree), 5, force=True)


def test_how_many_are_wanted(tree: PciTree) -> None:
    tree.card(vfs=3)
    assert sriov.number_wanted(card(tree), None, 2) == 3
    assert sriov.number_wanted(card(tree), 6, 2) == 6
    with pytest.raises(NicError, match=r"it has 3 VFs and 4 are needed; give --vfs 4 \(at most 7\)"):
        sriov.number_wanted(card(tree), None, 4)


def test_how_many_where_there_are_none(tree: PciTree) -> None:
    tree.card()
    assert sriov.number_wanted(card(tree), None, 4) == 4


def test_the_first_that_is_free(tree: PciTree) -> None:
    tree.card(vfs=2, driver=None)
    assert sriov.free_vf(card(tree), []) == 0
    assert sriov.free_vf(card(tree), [0]) == 1
    with pytest.raises(NicError, match=r"none of its 2 VFs is free \(VF 0: another guest has it; VF 1: another"):
        sriov.free_vf(card(tree), [0, 1])


def test_one_that_somebody_set_aside_is_not_free(tree: PciTree) -> None:
    tree.card(vfs=1, driver="vfio-pci")
    with pytest.raises(NicError, match=r"VF 0: somebody bound it to vfio-pci"):
        sriov.free_vf(card(tree), [])


def test_a_count_that_the_kernel_refuses(tree: PciTree) -> None:
    (tree.card() / "sriov_numvfs").unlink()
    with pytest.raises(NicError, match=r"cannot be given 2 VFs .*: its driver has no SR-IOV; use a driver that has"):
        card(tree).set_count(2)


def test_undoing_what_is_gone() -> None:
    """No such card on this machine: nothing to undo, and no error."""
    args = {"pci": "ffff:ff:1f.7", "vf": 0, "vf_pci": "ffff:ff:1f.6", "ifindex": 1, "count": 2, "before": 0}
    assert sriov.undo_count("lo", args) == "interface lo: its card is gone"
    assert sriov.undo_settings("lo", args) == "interface lo, VF 0: is gone"
    assert sriov.undo_driver("lo", args) == "interface lo, VF 0 (ffff:ff:1f.6): is gone"
    assert sriov.undo_netns("lo", args) == "interface lo, VF 0 (ffff:ff:1f.6): is gone"
