# SPDX-License-Identifier: Apache-2.0
"""The command line: options, stdout and stderr, exit codes, JSON. The daemon behind it is a fake of its API."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result

from support.fake_plane import FakeDatapath, FakeSwitch
from support.golden import check_golden
from xdpvhost import __version__, cli, daemon, privileges, view
from xdpvhost.api import ApiServer, Params
from xdpvhost.config import MetricsAddress, UpConfig
from xdpvhost.daemon import describe_stats
from xdpvhost.datapath import Datapath
from xdpvhost.errors import ConfigError, DatapathError, NicError, PrivilegeError
from xdpvhost.metrics.samples import Counters
from xdpvhost.rundir import RunDir
from xdpvhost.serve_xdp import describe_guest, describe_nic
from xdpvhost.switch import GuestEntry, Switch
from xdpvhost.xdp.nic import Nic

FACTS = {
    "xdp_asked": "auto",
    "xdp_in_use": "native",
    "bind_asked": "auto",
    "bind_in_use": "copy",
    "dispatcher": False,
    "program_id": 23,
    "warnings": [],
}


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def fake_status(switch: FakeSwitch) -> dict[str, Any]:
    nic = switch.nics[0]
    nic.facts = FACTS
    return {
        "version": __version__,
        "pid": 4711,
        "run_dir": "/run/xdpvhost",
        "uptime_seconds": 23.0,
        "metrics": "http://127.0.0.1:9477/metrics",
        "workers": 1,
        "poll": "adaptive",
        "mode": "xdp",
        "nics": [describe_nic(cast(Nic, nic))],
        "guests": [describe_guest(cast(GuestEntry, entry)) for entry in switch.guests.values()],
    }


@contextmanager
def serving(run_dir: Path, answers: Mapping[str, Callable[[Params], Any]]) -> Iterator[None]:
    """An API server that gives these answers, in a thread of its own."""
    ready, loop = threading.Event(), asyncio.new_event_loop()

    def handler(answer: Callable[[Params], Any]) -> Callable[[Params], Any]:
        async def handle(params: Params) -> Any:
            return answer(params)

        return handle

    async def start() -> ApiServer:
        server = ApiServer(run_dir, {name: handler(answer) for name, answer in answers.items()})
        await server.start()
        return server

    def life() -> None:
        server = loop.run_until_complete(start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(server.close())
        loop.close()

    thread = threading.Thread(target=life)
    thread.start()
    assert ready.wait(5)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[tuple[Path, list[tuple[str, Any]]]]:
    """A run directory with a daemon of two guests, and the list of what it was asked to change."""
    switch = FakeSwitch("vm1", "vm2")
    vm1 = switch.guests["vm1"]
    vm1.connected, vm1.features, vm1.reconnects = True, 0x140008020, 2
    vm1.port.rx_counters(0).packets = 23
    vm1.port.tx_counters(1).drops[3] = 5
    calls: list[tuple[str, Any]] = []
    status = fake_status(switch)
    counters = Counters(cast(Datapath, FakeDatapath()), cast(Switch, switch))

    def add(params: Params) -> Any:
        calls.append(("guest-add", dict(params)))
        return status["guests"][0]

    def remove(params: Params) -> Any:
        calls.append(("guest-rm", dict(params)))
        if params["name"] != "vm2":
            raise ConfigError(f"guest {params['name']!r} does not exist; guests here: vm1, vm2")
        return status["guests"][1]

    def down(_: Params) -> Any:
        calls.append(("down", None))
        return {"pid": 4711}

    answers: dict[str, Callable[[Params], Any]] = {
        "status": lambda _: status,
        "wishes": lambda _: {"mode": "xdp"},
        "stats": lambda _: describe_stats(counters.read(), 1000.0),
        "guest-list": lambda _: status["guests"],
        "guest-add": add,
        "guest-rm": remove,
        "down": down,
    }
    with serving(tmp_path, answers):
        yield tmp_path, calls


Fake = tuple[Path, list[tuple[str, Any]]]


def test_help_is_golden() -> None:
    texts = []
    commands = (
        ["guest", "add"],
        ["guest", "set"],
        ["trace", "drops"],
        ["stats"],
        ["qemu-args"],
        ["libvirt-xml"],
        ["clean"],
    )
    for path in ([], ["up"], ["guest"], *commands):
        result = CliRunner().invoke(cli.main, [*path, "--help"], prog_name="xdpvhost", terminal_width=100)
        assert result.exit_code == 0
        texts.append(result.stdout)
    check_golden("help.txt", "\n".join(texts))


def test_version() -> None:
    assert run("--version").stdout == f"xdpvhost, version {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        ["status"],
        ["stats"],
        ["guest", "list"],
        ["guest", "add", "name=vm1,mac=52:54:00:00:00:01"],
        ["guest", "rm", "vm1"],
        ["qemu-args", "vm1"],
        ["libvirt-xml", "vm1"],
        ["down"],
        ["status", "--json"],
        ["stats", "--watch"],
        ["trace", "drops"],
    ],
)
def test_no_daemon(tmp_path: Path, args: list[str]) -> None:
    result = run(*args, "--run-dir", tmp_path)
    assert result.exit_code == 6
    assert result.stdout == ""
    assert f"Error: no xdpvhost daemon is running in {tmp_path}; start one with `xdpvhost up`" in result.stderr


# ---- up


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[UpConfig]:
    """What `up` would start."""
    configs: list[UpConfig] = []
    monkeypatch.setattr(daemon, "run", configs.append)
    monkeypatch.setattr(privileges, "effective", lambda: frozenset(privileges.CAPABILITIES))
    return configs


def test_up_has_the_documented_defaults(started: list[UpConfig]) -> None:
    assert run("up", "--iface", "eth0").exit_code == 0
    assert started == [UpConfig(ifaces=("eth0",), metrics=MetricsAddress("127.0.0.1", 9477))]
    assert started[0].run_dir == Path("/run/xdpvhost")


def test_up_takes_every_option(started: list[UpConfig], tmp_path: Path) -> None:
    result = run(
        "up", "--iface", "ens1f0", "--guest", "name=vm1,mac=52:54:00:00:00:01", "--guest",
        "name=vm2,mac=52:54:00:00:00:02,queues=2", "--run-dir", tmp_path, "--metrics", "none", "--workers", "3",
        "--poll", "busy", "--xdp-mode", "generic", "--bind", "copy",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (config,) = started
    assert [(g.name, g.queues, g.socket) for g in config.guests] == [
        ("vm1", 1, tmp_path / "vm1.sock"),
        ("vm2", 2, tmp_path / "vm2.sock"),
    ]
    assert (config.metrics, config.workers, config.poll, config.xdp_mode, config.bind) == (
        None,
        3,
        "busy",
        "generic",
        "copy",
    )


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Missing option '--iface'"),
        (["--iface", "eth0", "--guest", "name=vm1"], "key 'mac' is missing"),
        (["--iface", "eth0", "--workers", "0"], "0 is not in the range 1<=x<=64"),
        (["--iface", "eth0", "--poll", "never"], "'never' is not one of"),
        (["--iface", "eth0", "--xdp-mode", "offload"], "'offload' is not one of"),
        (["--iface", "eth0", "--bind", "magic"], "'magic' is not one of"),
        (["--iface", "eth0", "--metrics", "9477"], "not ADDR:PORT"),
        (["--iface", "eth0", "--run-dir", "/" + "x" * 120], "107"),
        (["--iface", "eth0", "--colour", "red"], "No such option"),
        (["--iface", "eth0", "surplus"], "unexpected extra argument"),
    ],
)
def test_up_refuses(started: list[UpConfig], args: list[str], words: str) -> None:
    result = run("up", *args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""
    assert started == []


def test_up_names_the_missing_capability(started: list[UpConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "effective", lambda: frozenset({"CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON"}))
    result = run("up", "--iface", "eth0")
    assert result.exit_code == PrivilegeError.exit_code == 4
    assert "Error: `xdpvhost up` lacks CAP_NET_ADMIN; run it as root" in result.stderr
    assert started == []


@pytest.mark.parametrize(
    ("error", "code"), [(NicError("no eth0"), 3), (DatapathError("no library"), 5), (ConfigError("bad"), 2)]
)
def test_up_ends_with_the_errors_exit_code(
    started: list[UpConfig], monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(_: UpConfig) -> None:
        raise error

    monkeypatch.setattr(daemon, "run", fail)
    result = run("up", "--iface", "eth0")
    assert (result.exit_code, result.stderr) == (code, f"Error: {error}\n")


# ---- facts


def test_status_shows_asked_and_in_use(fake: Fake) -> None:
    text = run("status", "--run-dir", fake[0]).stdout
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "XDP mode auto native" in lines
    assert "AF_XDP bind auto copy" in lines
    assert "vm1 0x140008020 MAC MRG_RXBUF PROTOCOL_FEATURES VERSION_1" in lines
    (vm1,) = (line for line in lines if line.startswith("vm1 52:54:00:00:00:01"))
    assert vm1 == "vm1 52:54:00:00:00:01 yes 1 of 2 23 0 0 5 2 0 /run/xdpvhost/vm1.sock (server)"


def test_status_as_json(fake: Fake) -> None:
    facts = json.loads(run("status", "--run-dir", fake[0], "--json").stdout)
    assert facts["nics"][0]["facts"] == FACTS
    assert [guest["name"] for guest in facts["guests"]] == ["vm1", "vm2"]
    assert facts["guests"][0]["rx"]["packets"] == 23
    assert facts["guests"][0]["tx"]["drops"]["runt"] == 5


def test_stats_as_json_has_the_metrics_names(fake: Fake) -> None:
    facts = json.loads(run("stats", "--run-dir", fake[0], "--json").stdout)
    wanted = {"name": "xdpvhost_guest_rx_packets_total", "labels": {"guest": "vm1", "queue": "0"}, "value": 23}
    assert wanted in facts["counters"]


def test_stats_as_tables(fake: Fake) -> None:
    text = run("stats", "--run-dir", fake[0]).stdout
    assert "runt 5" in text
    for title in ("guests", "NIC queues", "workers"):
        assert title in text


def test_rates_are_a_second() -> None:
    def at(when: float, packets: int) -> dict[str, Any]:
        labels = {"guest": "vm1", "queue": "0"}
        return {
            "time": when,
            "counters": [{"name": "xdpvhost_guest_rx_packets_total", "labels": labels, "value": packets}],
        }

    console = view.console()
    with console.capture() as capture:
        console.print(view.stats_view(at(12.0, 123), at(10.0, 77)))
    cells = [cell.strip() for line in capture.get().splitlines() if "vm1" in line for cell in line.split("│")]
    assert cells[1:4] == ["vm1", "0", "23"]


def test_stats_watch_ends_with_the_interrupt(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps: list[float] = []

    def sleep(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.time, "sleep", sleep)
    result = run("stats", "--run-dir", fake[0], "--watch", "--json", "--interval", "0.5")
    assert result.exit_code == 0
    assert len([json.loads(line) for line in result.stdout.splitlines()]) == 3
    assert sleeps == [0.5, 0.5, 0.5]


# ---- guests


def test_guest_add_sends_a_whole_spec(fake: Fake) -> None:
    result = run("guest", "add", "name=vm1,mac=52-54-00-00-00-01", "--run-dir", fake[0])
    assert result.stdout == "guest vm1: 52:54:00:00:00:01 on /run/xdpvhost/vm1.sock (server)\n"
    spec = f"name=vm1,mac=52:54:00:00:00:01,queues=1,socket={fake[0]}/vm1.sock,socket-mode=server"
    assert fake[1] == [("guest-add", {"spec": spec})]


def test_a_bad_spec_never_leaves_the_command(fake: Fake) -> None:
    result = run("guest", "add", "name=vm1,mac=ff:ff:ff:ff:ff:ff", "--run-dir", fake[0])
    assert result.exit_code == 2
    assert "multicast" in result.stderr
    assert fake[1] == []


def test_guest_rm(fake: Fake) -> None:
    assert run("guest", "rm", "vm2", "--run-dir", fake[0]).stdout == "guest vm2: removed\n"
    assert json.loads(run("guest", "rm", "vm2", "--run-dir", fake[0], "--json").stdout)["name"] == "vm2"


def test_the_daemons_refusal_is_shown_with_its_exit_code(fake: Fake) -> None:
    result = run("guest", "rm", "vm7", "--run-dir", fake[0])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: guest 'vm7' does not exist; guests here: vm1, vm2\n"


def test_guest_list(fake: Fake) -> None:
    assert "vm2" in run("guest", "list", "--run-dir", fake[0]).stdout
    assert [g["name"] for g in json.loads(run("guest", "list", "--run-dir", fake[0], "--json").stdout)] == [
        "vm1",
        "vm2",
    ]


def test_qemu_args_of_a_running_guest(fake: Fake) -> None:
    args = json.loads(run("qemu-args", "vm2", "--run-dir", fake[0], "--json", "--qemu-version", "10.0").stdout)
    assert args[-1] == "virtio-net-pci,id=nic-vm2,netdev=net-vm2,mac=52:54:00:00:00:02,mq=on,vectors=6"
    result = run("qemu-args", "vm9", "--run-dir", fake[0])
    assert result.exit_code == 2
    assert "guest 'vm9' does not exist; guests here: vm1, vm2" in result.stderr


def test_qemu_args_of_a_spec_need_no_daemon(tmp_path: Path) -> None:
    result = run("qemu-args", "name=vm1,mac=52:54:00:00:00:01", "--qemu-version", "7.2", "--memory", "2G")
    assert result.exit_code == 0
    assert result.stdout.startswith("-m 2G \\\n-object memory-backend-memfd,id=mem-vm1,size=2G,share=on \\\n")


def test_libvirt_xml_of_a_running_guest(fake: Fake) -> None:
    facts = json.loads(run("libvirt-xml", "vm2", "--run-dir", fake[0], "--json").stdout)
    assert set(facts) == {"memoryBacking", "interface"}
    assert run("libvirt-xml", "vm2", "--run-dir", fake[0]).stdout == "\n".join([*facts.values(), ""])
    assert run("libvirt-xml", "vm2", "--interface", "--run-dir", fake[0]).stdout == facts["interface"] + "\n"


def test_device_options_are_the_same_for_both() -> None:
    spec = "name=vm1,mac=52:54:00:00:00:01"
    for command, texts in (
        ("qemu-args", ("rx_queue_size=512,tx_queue_size=512", "packed=on")),
        ("libvirt-xml", ('rx_queue_size="512" tx_queue_size="512" packed="on"',)),
    ):
        result = run(command, spec, "--queue-size", "512", "--packed")
        assert result.exit_code == 0
        assert all(text in result.stdout for text in texts)
        assert run(command, spec, "--queue-size", "300").exit_code == 2


# ---- the end


def test_down(fake: Fake) -> None:
    result = run("down", "--run-dir", fake[0])
    assert (result.exit_code, result.stdout) == (0, "")
    assert fake[1] == [("down", None)]


def test_down_says_when_the_daemon_takes_too_long(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "DOWN_TIMEOUT", 0.05)
    with RunDir(fake[0]):
        result = run("down", "--run-dir", fake[0])
    assert result.exit_code == 6
    assert "(pid 4711) is still going down" in result.stderr


@pytest.fixture
def may_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "effective", lambda: frozenset(privileges.CAPABILITIES))


@pytest.mark.usefixtures("may_clean")
def test_clean_with_nothing_to_do(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        result = run("clean", "--run-dir", path)
        assert (result.exit_code, result.stdout) == (0, "")
        assert json.loads(run("clean", "--run-dir", path, "--json").stdout) == []
    assert not tmp_path.exists()


@pytest.mark.usefixtures("may_clean")
def test_clean_refuses_while_a_daemon_runs(tmp_path: Path) -> None:
    with RunDir(tmp_path):
        result = run("clean", "--run-dir", tmp_path)
    assert result.exit_code == 6
    assert "another xdpvhost (pid" in result.stderr


@pytest.mark.usefixtures("may_clean")
def test_clean_says_what_it_could_not_undo(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"id": 1, "kind": "from_the_future", "args": {}}\n')
    result = run("clean", "--run-dir", tmp_path, "--json")
    assert result.exit_code == 3
    assert [fact["done"] for fact in json.loads(result.stdout)] == [False]
    assert "not undone" in result.stderr
    assert (tmp_path / "journal.jsonl").exists()


# ---- rebalance


def test_rebalance_shows_what_was_measured_and_moved(tmp_path: Path) -> None:
    asked: list[Params] = []
    workers = [
        {"worker": 0, "busy_percent": 80.0, "packets_per_second": 1000, "expected_percent": 41.0},
        {"worker": 1, "busy_percent": 2.0, "packets_per_second": 10, "expected_percent": 40.9},
    ]
    measured = {"seconds": 1.0, "workers": workers, "guests": [], "moves": [{"guest": "vm1", "from": 0, "to": 1}]}

    def answer(params: Params) -> Any:
        asked.append(params)
        return measured if not params["move"] else {"moves": []}

    with serving(tmp_path, {"rebalance": answer}):
        result = run("rebalance", "--run-dir", tmp_path)
        told = run("rebalance", "vm1=0", "vm2=3", "--run-dir", tmp_path)
        as_json = run("rebalance", "--run-dir", tmp_path, "--json")
        refused = run("rebalance", "vm1", "--run-dir", tmp_path)
    assert result.exit_code == 0, result.stderr
    for words in ("80.0 %", "40.9 %", "expected", "guest vm1: from worker 0 to 1"):
        assert words in result.stdout
    assert told.stdout == "nothing was moved\n"
    assert json.loads(as_json.stdout) == measured
    assert (refused.exit_code, "is not GUEST=WORKER" in refused.stderr) == (2, True)
    assert asked == [{"move": {}}, {"move": {"vm1": 0, "vm2": 3}}, {"move": {}}]
