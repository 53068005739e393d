# SPDX-License-Identifier: Apache-2.0
"""Golden files: the exact text that a command generates, in tests/unit/golden."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent.parent / "unit" / "golden"


def check_golden(name: str, text: str) -> None:
    """Compare `text` with the golden file; XDPVHOST_UPDATE_GOLDEN=1 writes it instead, to be read in the diff."""
    path = GOLDEN / name
    if os.environ.get("XDPVHOST_UPDATE_GOLDEN") == "1":
        path.write_text(text)
    assert text == path.read_text(), f"{name} changed; if that is meant, run with XDPVHOST_UPDATE_GOLDEN=1"
