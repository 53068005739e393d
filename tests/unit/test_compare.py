# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost compare` without a network: figures and their spread, histogram, tables, page, JSON, bad options."""

import ctypes
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from xdpvhost import cli
from xdpvhost.compare import model, modes, native, report, table
from xdpvhost.compare.model import Figure, ModeResult, Report
from xdpvhost.compare.plan import HIGH, IN, LOW, OUT, latency, rate
from xdpvhost.errors import ConfigError

VOID = {"meta", "line", "rect", "circle", "br"}


def sample_report() -> Report:
    """Two modes with figures, one of them with a hole, and one that can't run."""
    one = ModeResult(mode="xdp", title="xdpvhost, XDP", path="NIC → guest")
    two = ModeResult(mode="tap", title="tap, QEMU", path="NIC → tap <&>")
    gone = ModeResult(mode="vhost-net", title="vhost-net", path="", reason="/dev/vhost-net is <missing>")
    for value in (1e6, 3e6, 2e6):
        one.figure(rate(IN, 64), "rate", "frames/s").add(value)
        two.figure(rate(IN, 64), "rate", "frames/s").add(value / 4)
        for name, factor in (("p50", 1), ("p99", 3), ("p99.9", 20)):
            one.figure(latency(LOW), name, "µs").add(value / 1e5 * factor)
    one.figure(rate(OUT, 64), "rate", "frames/s").add(0)
    two.figure(rate(OUT, 64), "rate", "frames/s").reason = "only 0 frames arrived in 1.0 s"
    two.figure(latency(LOW), "p50", "µs").reason = "no frame came back"
    options = {"sizes": [64], "repeat": 3, "loads": {LOW: 1000, HIGH: 50000}}
    return Report(facts={"command": "xdpvhost compare <x>", "date": "today"}, options=options, modes=[one, two, gone])


def test_a_figure_has_median_and_spread() -> None:
    figure = Figure(unit="frames/s")
    assert figure.median is None
    assert figure.spread is None
    for value in (3, 1, 2):
        figure.add(value)
    assert figure.median == 2
    assert figure.spread == (1, 3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Figure(unit="").add(value)


def test_json_has_samples_and_statistics_and_can_be_read_again() -> None:
    before = sample_report()
    text = model.to_json(before)
    tree = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    figure = tree["modes"][0]["figures"][rate(IN, 64)]["rate"]
    assert (figure["median"], figure["min"], figure["max"], figure["repeats"]) == (2e6, 1e6, 3e6, 3)
    assert tree["modes"][2]["reason"] == "/dev/vhost-net is <missing>"
    assert model.to_json(model.from_json(text)) == text


@pytest.mark.parametrize("text", [b"", b"[]", b'{"schema": 99}', b'{"modes": [{"mode": 1}]}'])
def test_other_json_is_refused(text: bytes) -> None:
    with pytest.raises(ConfigError):
        model.from_json(text)


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects text and references."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.references: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for key, value in attrs if key in ("src", "href", "data", "action")]
        if tag not in VOID:
            self.stack.append(tag)
        for key, value in attrs:
            if key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height") and tag != "meta":
                assert math.isfinite(float(value or "nan")), f"{tag} {key}={value}"

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_the_page_is_whole_and_refers_to_nothing() -> None:
    text = report.render(sample_report())
    page = Page()
    page.feed(text)
    page.close()
    assert not page.stack
    assert not page.references
    for outside in ("http:", "https:", "url(", "@import", "<script", "<link"):
        assert outside not in text
    assert not re.search(r"\b(nan|inf|None)\b", page.words)
    assert "not here: /dev/vhost-net is <missing>" in page.words
    assert "only 0 frames arrived" in page.words
    assert "2.000 (1.000–3.000)" in page.words


def test_the_page_of_nothing_at_all() -> None:
    page = Page()
    page.feed(report.render(Report()))
    assert not page.stack


def test_tables_show_spread_and_reasons() -> None:
    text = table.markdown(sample_report())
    assert "| xdpvhost, XDP | 2.000 (1.000–3.000) | 0.000 |" in text
    assert "| tap, QEMU | 0.500 (0.250–0.750) | – |" in text
    assert "- vhost-net: /dev/vhost-net is <missing>" in text
    assert "only 0 frames arrived in 1.0 s" in text
    assert "| vhost-net |" not in text


def test_percentiles_are_of_the_right_bucket() -> None:
    buckets = (ctypes.c_uint64 * native.NR_BUCKETS)()
    with pytest.raises(ValueError, match="empty"):
        native.percentile(buckets, 0.5)
    middle = native.library().xvg_bucket_middle
    middles = [middle(index) for index in range(native.NR_BUCKETS)]
    assert middles == sorted(middles)
    assert middles[10] == 10.5
    for low, high in itertools.pairwise(middles[64:]):
        assert high / low < 1.04
    buckets[20], buckets[200] = 99, 1
    assert native.percentile(buckets, 0.5) == middles[20]
    assert native.percentile(buckets, 0.99) == middles[20]
    assert native.percentile(buckets, 0.999) == middles[200]


def test_modes_have_names_of_their_own() -> None:
    assert len(set(modes.NAMES)) == len(modes.MODES)
    assert [mode.name for mode in modes.named(("tap", "xdp"))] == ["xdp", "tap"]
    assert modes.named(()) == list(modes.MODES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "fax"], "there is no such mode"),
        (["--iface", "lo"], "--iface and --peer belong together"),
        (["--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--size", "63"], "63 is not in the range"),
        (["--repeat", "0"], "0 is not in the range"),
    ],
)
def test_bad_options(options: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.main, ["compare", *options])
    assert done.exit_code == 2
    assert words in done.output
