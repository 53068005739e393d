# SPDX-License-Identifier: Apache-2.0
"""The checklist for hostile front-ends and guests, and docs/hostile-guests.md, which maps its items to their tests."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "protocol"
DOC = TESTS.parents[1] / "docs" / "hostile-guests.md"
FILES = ("test_catalogue_control.py", "test_catalogue_guest.py", "test_catalogue_cves.py", "test_live.py")

CONTROL: Mapping[str, str] = {
    "c1": "every request with any size, version and flags",
    "c2": "descriptors: too few, too many, of the wrong kind",
    "c3": "messages in pieces, cut off, several at once",
    "c4": "ring numbers, the no-descriptor bit",
    "c5": "memory tables",
    "c6": "ring addresses",
    "c7": "ring sizes, also while rings run",
    "c8": "ring bases, split and packed",
    "c9": "features",
    "c10": "the dirty log",
    "c11": "messages in any order, storms, reconnects",
    "c12": "replies asked for everywhere, and never read",
    "c13": "IOTLB",
    "c14": "sockets: a second client, a stale file, a bad directory",
}
GUEST: Mapping[str, str] = {
    "g1": "available indices, heads, ids",
    "g2": "chains and indirect tables; memory that is taken away",
    "g3": "frames from the guest: any length, header in pieces",
    "g4": "buffers towards the guest: tiny, none, too few",
    "g5": "virtio-net headers and control commands",
    "g6": "memory that changes while it is read",
    "g7": "kicks, interrupts, event indices; a guest that does not read",
    "g8": "everything at once, and the others' latency",
    "g9": "spoofed addresses, tags",
    "g10": "reboots, and either side killed",
}
CVES: Mapping[str, str] = {
    "cve_2018_1059": "guest address ranges that are not contiguous",
    "cve_2019_14818": "leaks by repeated messages",
    "cve_2020_10722": "log size plus offset wraps",
    "cve_2020_10723": "ring number cut off to 16 bits",
    "cve_2020_10725": "packed batch with an address that is not mapped",
    "cve_2020_10726": "in-flight region asked for repeatedly",
    "cve_2021_3839": "in-flight numbers beyond the device",
    "cve_2022_0669": "descriptors leaked by in-flight messages",
    "cve_2022_2132": "header over more than two descriptors",
    "cve_2024_11614": "checksum beyond the frame",
    "dpdk_285e6b8b18": "offload header read twice",
    "dpdk_6ec1778134": "bounds of the control queue's chains, ring 256",
    "cve_2026_86561": "memory larger than its file",
    "cve_2026_86562": "control command read twice",
    "cve_2026_86563": "log offset added twice",
    "cve_2026_86565": "ring size changes after the in-flight region was made",
    "cve_2026_86566": "runt buffers towards the guest",
    "cve_2026_93683": "indirect length read twice",
    "cve_2026_100236": "GSO header longer than the frame",
    "qemu_4403": "numbers that index arrays",
    "qemu_3974_3882": "ring size changes with buffers in flight",
    "cve_2016_5403": "more buffers available than the ring has",
    "cve_2019_14835": "empty descriptors while logging",
    "cve_2018_16880": "very many tiny buffers for one frame",
    "cve_2024_0340": "memory of ours in a reply",
}

HEAD = """<!-- From the tests' names and docstrings: XDPVHOST_UPDATE_GOLDEN=1 pytest tests/protocol/test_doc.py -->
# Hostile and unlucky guests

What a front-end or a guest may do to hurt others, and the tests that do it: against the real back-end and the real data
plane, with split and packed rings where a ring is involved, while two other guests exchange frames. Through all of it
not one of those frames is lost or changed; afterwards descriptors, mappings and rings are as before
(`tests/support/arena.py`). `tests/support/wirefuzz.py` makes sequences of messages at random, right and wrong ones;
those in `tests/protocol/corpus/` are played in every run. The C code has fuzzers of its own in `datapath/fuzz/`.
"""


@cache
def found() -> dict[str, tuple[str, str]]:
    """Every test's file and the first line of its docstring, by name."""
    tests = {}
    for file in FILES:
        for node in ast.parse((TESTS / file).read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                doc = (ast.get_docstring(node) or "").replace("\n", " ")
                tests[node.name] = file, doc.split(". ")[0].rstrip(".")
    return tests


def tests_of(item: str) -> list[str]:
    return [name for name in found() if name.startswith(f"test_{item}_")]


def render() -> str:
    tests = found()
    lines = [HEAD]
    for title, items in (("Control socket", CONTROL), ("Data path", GUEST), ("Published bugs", CVES)):
        lines += [f"## {title}", "", "| item | what | tests |", "|---|---|---|"]
        for item, what in items.items():
            cells = []
            for name in tests_of(item):
                about = tests[name][1]
                cells.append(f"`{name.removeprefix(f'test_{item}_')}`" + (f": {about}" if about else ""))
            label = item.upper() if title != "Published bugs" else item.replace("_", "-").replace("cve", "CVE")
            lines.append(f"| {label} | {what} | {'<br>'.join(cells)} |")
        lines.append("")
    module = ast.parse((TESTS / "test_catalogue_cves.py").read_text())
    without = (ast.get_docstring(module) or "").split("\n\n", 1)[1]
    lines += ["## Without a test", "", without, ""]
    return "\n".join(lines)
