# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost compare` for real: short, with everything undone afterwards, also when it is interrupted."""

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from support.process import Process, run, wait_for
from xdpvhost.compare.plan import HIGH, IDLE, IN, LOW, OUT, TCP, latency, rate

PROGRAM = Path(__file__).resolve().parents[2] / ".venv" / "bin" / "xdpvhost"


def footprint() -> tuple[object, ...]:
    """What a comparison could leave behind: links here, named namespaces, directories, processes of ours."""
    links = json.loads(run(["ip", "-j", "link"]).stdout)
    names = sorted(path.name for path in Path(tempfile.gettempdir()).glob("xvc-*"))
    named = sorted(os.listdir("/run/netns")) if Path("/run/netns").exists() else []
    return sorted(link["ifname"] for link in links), names, named


def processes_of(word: str) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if word in words:
            found.append(words)
    return found


def compare(directory: Path, *modes: str, uml: bool = False) -> dict[str, dict[str, object]]:
    """The rows by name."""
    out = directory / "result.json"
    options = [word for mode in modes for word in ("--mode", mode)]
    options += ["--seconds", "0.2", "--repeat", "1", "--size", "64", "--size", "1500", "--load", "500", "5000"]
    options += ["--json", str(out), "--html", str(directory / "page.html"), "--markdown", str(directory / "t.md")]
    done = run([PROGRAM, "compare", *options, *(["--uml"] if uml else [])], timeout=120)
    assert "million frames a second" in done.stdout
    assert (directory / "page.html").stat().st_size > 5000
    return {row["mode"]: row for row in json.loads(out.read_bytes())["modes"]}


def test_xdp_and_none(tmp_path: Path) -> None:
    before = footprint()
    rows = compare(tmp_path, "xdp", "xdp-none")
    assert footprint() == before
    assert set(rows) == {"xdp", "xdp-none"}
    for row in rows.values():
        assert "reason" not in row, row.get("reason")
        figures: dict[str, dict[str, dict[str, object]]] = row["figures"]  # type: ignore[assignment]
        for way in (IN, OUT):
            for size in (64, 1500):
                found = figures[rate(way, size)]
                assert found["rate"]["repeats"] == 1, found
                assert float(str(found["rate"]["median"])) > 100, found
                assert float(str(found["cycles"]["median"])) > 50, found
        for load in (LOW, HIGH):
            found = figures[latency(load)]
            times = [float(str(found[name]["median"])) for name in ("p50", "p99", "p99.9")]
            assert times == sorted(times)
            assert times[0] > 1
        assert float(str(figures[IDLE]["cpu"]["median"])) < 60


def test_modes_that_qemu_serves(tmp_path: Path) -> None:
    before = footprint()
    rows = compare(tmp_path, "tap", "macvtap", "emulated", "tap-vhost-user")
    assert footprint() == before
    for name, row in rows.items():
        assert "reason" not in row, f"{name}: {row.get('reason')}"
        figures: dict[str, dict[str, dict[str, object]]] = row["figures"]  # type: ignore[assignment]
        for workload in (rate(IN, 64), rate(OUT, 1500)):
            assert float(str(figures[workload]["rate"].get("median", 0))) > 500, (name, workload, figures[workload])
        assert float(str(figures[latency(LOW)]["lost"]["median"])) < 50, (name, figures[latency(LOW)])


def test_tcp_of_a_linux_guest(tmp_path: Path) -> None:
    rows = compare(tmp_path, "xdp-none", uml=True)
    figures: dict[str, dict[str, dict[str, object]]] = rows["xdp-none"]["figures"]  # type: ignore[assignment]
    for way in (IN, OUT):
        assert float(str(figures[TCP][way].get("median", 0))) > 0.01, figures[TCP]


def test_a_mode_that_cannot_run_says_why(tmp_path: Path) -> None:
    if Path("/dev/vhost-net").exists():
        pytest.skip("/dev/vhost-net is there")
    rows = compare_only_reason(tmp_path, "vhost-net")
    assert "vhost-net" in rows["vhost-net"]


def compare_only_reason(directory: Path, mode: str) -> dict[str, str]:
    out = directory / "result.json"
    done = run(
        [PROGRAM, "compare", "--mode", mode, "--seconds", "0.1", "--repeat", "1", "--json", str(out)], timeout=60
    )
    reasons = {row["mode"]: row["reason"] for row in json.loads(out.read_bytes())["modes"]}
    assert reasons[mode] in " ".join(done.stdout.split())
    return reasons


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    before = footprint()
    with Process(
        [PROGRAM, "compare", "--mode", "xdp", "--seconds", "5"],
        log=tmp_path / "log",
        env={"TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
    ) as process:
        daemon = f"--run-dir {tmp_path}/xvc-"
        wait_for(lambda: any("status" not in words for words in processes_of(daemon)), 30, "a daemon")
        process.send(number)
        assert process.wait(20) != 0
        wait_for(lambda: not processes_of(daemon), 20, "the daemon to end")
    assert footprint() == before
    if number is signal.SIGINT:
        assert not list(tmp_path.glob("xvc-*"))
