# SPDX-License-Identifier: Apache-2.0
"""docs/vhost-user.md is what the code does."""

from __future__ import annotations

import os
from pathlib import Path

from support import catalogue
from xdpvhost.vhost.backend import TABLE
from xdpvhost.vhost.doc import refreshed
from xdpvhost.vhost.offered import BACKEND_REQUESTS, NOT_OFFERED, OFFERED, UNSUPPORTED
from xdpvhost.vhost.wire import BackendRequest, ProtocolFeature, Request

DOC = Path(__file__).parents[2] / "docs" / "vhost-user.md"


def test_every_request_is_served_or_has_a_reason() -> None:
    assert set(TABLE) | set(UNSUPPORTED) == set(Request)
    assert not set(TABLE) & set(UNSUPPORTED)
    assert [request.value for request in Request] == list(range(1, 45))


def test_every_protocol_feature_is_offered_or_has_a_reason() -> None:
    assert set(NOT_OFFERED) | set(OFFERED) == set(ProtocolFeature)
    assert not set(NOT_OFFERED) & set(OFFERED)
    assert [int(feature).bit_length() for feature in ProtocolFeature] == list(range(1, 24))


def test_every_backend_request_has_a_line() -> None:
    assert set(BACKEND_REQUESTS) == set(BackendRequest)
    assert [request.value for request in BackendRequest] == list(range(1, 11))


def test_table_in_docs_is_up_to_date() -> None:
    text = DOC.read_text()
    assert refreshed(text) == text, "run `python3 -m xdpvhost.vhost.doc --write docs/vhost-user.md`"


def test_every_item_of_the_catalogue_has_a_test() -> None:
    items = {**catalogue.CONTROL, **catalogue.GUEST, **catalogue.CVES}
    assert [item for item in items if not catalogue.tests_of(item)] == []
    named = [name for item in items for name in catalogue.tests_of(item)]
    catalogued = [name for name, (file, _) in catalogue.found().items() if file != "test_live.py"]
    assert [name for name in catalogued if name not in named and not name.startswith("test_fuzz_")] == []


def test_list_of_hostile_guests_is_current() -> None:
    text = catalogue.render()
    if os.environ.get("XDPVHOST_UPDATE_GOLDEN"):
        catalogue.DOC.write_text(text)
    assert catalogue.DOC.read_text() == text, "run with XDPVHOST_UPDATE_GOLDEN=1"
