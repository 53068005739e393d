# SPDX-License-Identifier: Apache-2.0
"""Which kernel modules there are, and what to do about one that is missing. Nothing is loaded here."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Literal

State = Literal["loaded", "available", "absent"]

SYS = Path("/sys")


def modules_directory() -> Path:
    """Where the running kernel's modules are."""
    return Path("/lib/modules") / os.uname().release


def state(name: str, sys: Path = SYS, modules: Path | None = None) -> State:
    """`loaded` or built in; `available` to modprobe; or `absent`. Hyphens and underscores are the same in a name."""
    if (sys / "module" / name.replace("-", "_")).exists():
        return "loaded"
    directory = modules or modules_directory()
    if _listed(name, directory / "modules.builtin"):
        return "loaded"
    return "available" if _listed(name, directory / "modules.dep") else "absent"


def remedy(name: str, option: str, sys: Path = SYS, modules: Path | None = None) -> str:
    """How to get a module that isn't loaded; `option` is the kernel configuration's name for it."""
    if state(name, sys, modules) != "absent":
        return f"`modprobe {name}`"
    directory = modules or modules_directory()
    if not directory.exists():
        return (
            f"`modprobe {name}`, once {directory} is there: it has the running kernel's modules, and {name} among them"
        )
    return f"a kernel with {option}: the one that runs ({directory.name}) has no module {name}"


def _listed(name: str, index: Path) -> bool:
    letters = "[-_]".join(map(re.escape, re.split("[-_]", name)))
    pattern = re.compile(rf"/{letters}\.ko(\.\w+)?$")
    with suppress(OSError), index.open(encoding="utf-8", errors="replace") as lines:
        return any(pattern.search(line.split(":")[0].strip()) for line in lines)
    return False
