# SPDX-License-Identifier: Apache-2.0
"""One line of `xdpvhost features`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """`supported` None: can't be known without trying. `required`: `up` fails without it. `remedy` may be empty."""

    name: str
    supported: bool | None
    detail: str
    remedy: str = ""
    required: bool = False
