# SPDX-License-Identifier: Apache-2.0
"""A sysfs with PCI functions in it, made in a directory: for parsing and refusals. The real thing is in tests/lab."""

from pathlib import Path

PF = "0000:01:00.0"


class PciTree:
    """What the code under test reads of /sys. VF n of the card is 0000:01:10.n."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)
        (root / "bus/pci/drivers").mkdir()
        (root / "kernel/iommu_groups").mkdir(parents=True)
        (root / "module/vfio_iommu_type1").mkdir(parents=True)

    def function(
        self, address: str, *, driver: str | None = None, group: int | None = None, kind: int = 0x020000
    ) -> Path:
        directory = self.root / "bus/pci/devices" / address
        directory.mkdir()
        (directory / "class").write_text(f"0x{kind:06x}\n")
        (directory / "driver_override").write_text("(null)\n")
        if driver is not None:
            self.driver(driver)
            (directory / "driver").symlink_to(self.root / "bus/pci/drivers" / driver)
        if group is not None:
            members = self.root / "kernel/iommu_groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(directory)
            (directory / "iommu_group").symlink_to(members.parent)
        return directory

    def driver(self, name: str) -> None:
        (self.root / "bus/pci/drivers" / name).mkdir(exist_ok=True)

    def card(self, *, total: int = 7, vfs: int = 0, driver: str | None = "igbvf", groups: bool = True) -> Path:
        """A physical function and its VFs, each in an IOMMU group of its own."""
        directory = self.function(PF, driver="igb", group=20 if groups else None)
        (directory / "sriov_totalvfs").write_text(f"{total}\n")
        (directory / "sriov_numvfs").write_text(f"{vfs}\n")
        for number in range(vfs):
            vf = self.function(f"0000:01:10.{number}", driver=driver, group=30 + number if groups else None)
            (vf / "physfn").symlink_to(directory)
            (directory / f"virtfn{number}").symlink_to(vf)
        return directory
