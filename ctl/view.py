# SPDX-License-Identifier: Apache-2.0
"""What people see: rich tables of the API's answers. Programs use --json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .spec_values import write_rate, write_size

PLAIN_WIDTH = 160  # of a table that goes into a file or pipe
ASKED = {"xdp": "XDP mode", "bind": "AF_XDP bind"}  # names of facts that come as KEY_asked and KEY_in_use

CAPTURE_COLUMNS = ("kind", "port", "pid", "seconds", "snaplen", "buffer", "captured", "lost")
SHOWN_LEARNED = 4  # of a guest; --json has all

Counter = Mapping[str, Any]


def console() -> Console:
    """stdout; wide enough for every table when it is no terminal."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out.width = PLAIN_WIDTH
    return out


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], right: int | None = None) -> Table:
    """A table whose columns from index `right` on are numbers."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="right" if right is not None and index >= right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{name} ")
        elif isinstance(value, bool):
            rows.append((name, "yes" if value else "no"))
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(str, value)) or "none"))
        else:
            rows.append((name, "none" if value is None else str(value)))
    return rows


def _drops(direction: Mapping[str, Any]) -> int:
    return sum(direction["drops"].values())


def _asked(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What, asked, in use: of facts that come as KEY_asked and KEY_in_use, which are taken out of `facts`."""
    keys = [key.removesuffix("_asked") for key in facts if key.endswith("_asked")]
    flat = [dict(_flatten({end: facts.pop(f"{key}_{end}", "?") for end in ("asked", "in_use")})) for key in keys]
    return [
        (ASKED.get(key, key.replace("_", " ")), cells["asked"], cells["in use"])
        for key, cells in zip(keys, flat, strict=True)
    ]


def guest_table(guests: Sequence[Mapping[str, Any]]) -> Table:
    """One row a guest: those that the data plane serves, or those that have a device."""
    if any("device" in guest for guest in guests):
        return _device_table(guests)
    several = len({guest["iface"] for guest in guests}) > 1
    rows = [
        (
            guest["name"],
            *([_interface(guest)] if several else []),
            guest["mac"],
            "yes" if guest["connected"] else "no",
            f"{guest['pairs_in_use']} of {guest['queues']}" if guest["connected"] else guest["queues"],
            guest["rx"]["packets"],
            _drops(guest["rx"]),
            guest["tx"]["packets"],
            _drops(guest["tx"]),
            guest["reconnects"],
            sum(guest["protocol_errors"].values()),
            f"{guest['socket']} ({guest['socket_mode']})",
        )
        for guest in guests
    ]
    columns = ("mac", "connected", "queues", "rx", "drops", "tx", "drops", "reconnects", "errors", "socket")
    return table("guests", ("guest", *(["interface"] if several else []), *columns), rows)


def port_table(guests: Sequence[Mapping[str, Any]]) -> Table | None:
    """Pool and policy, one row a guest that the data plane serves; None when there is none."""
    rows = [
        (
            guest["name"],
            guest["vlans"],
            "\n".join([*guest["listens_to"], *_some_learned(guest)]),
            _checks(guest),
            *(_limit(guest["limits"][way]) for way in ("tx", "rx", "storm")),
            "on" if guest["link"] else "off",
            f"{(guest['memory']['data_plane'] + guest['memory']['socket_rings']) // 1024} KiB",
        )
        for guest in guests
        if "vlans" in guest
    ]
    columns = ("guest", "in", "macs", "checked", "tx limit", "rx limit", "storm limit", "link", "memory")
    return table("pools and policy", columns, rows) if rows else None


def _some_learned(guest: Mapping[str, Any]) -> list[str]:
    found = [f"{learned['mac']} (learned)" for learned in guest["learned"]]
    return found if len(found) <= SHOWN_LEARNED else [*found[:SHOWN_LEARNED], "…"]


def _checks(guest: Mapping[str, Any]) -> str:
    words = ["source MAC"] if guest["spoof_check"] else []
    if guest["learn"]:
        words.append(f"{len(guest['learned'])} of {guest['learn']} learned")
    if guest["addresses"]:
        words.append(f"IP {'+'.join(guest['addresses'])}")
    if guest["isolated"]:
        words.append("isolated")
    return ", ".join(words) or "nothing"


def _limit(limit: Mapping[str, int] | None) -> str:
    if limit is None:
        return "none"
    if "bits" in limit:
        return f"{write_rate(limit['bits'])}bit/s, burst {write_size(limit['burst'])}B"
    return f"{limit['frames']}/s, burst {limit['burst']}"


def _interface(guest: Mapping[str, Any]) -> str:
    """Which one, and whether xdpvhost chose it."""
    return str(guest["iface"]) if guest["iface_asked"] else f"{guest['iface']} (fewest guests)"


def _device_table(guests: Sequence[Mapping[str, Any]]) -> Table:
    def counted(guest: Mapping[str, Any], direction: str) -> tuple[object, object]:
        found = guest.get(direction)
        return (found["packets"], _drops(found)) if found else ("?", "?")

    rows = [
        (
            guest["name"],
            guest["mac"],
            guest["device"],
            guest.get("node", ""),
            "yes" if guest.get("connected") else "no",
            guest["queues"],
            *counted(guest, "rx"),
            *counted(guest, "tx"),
        )
        for guest in guests
    ]
    columns = ("guest", "mac", "device", "node", "open", "queues", "rx", "drops", "tx", "drops")
    return table("guests", columns, rows)


_SHOWN = frozenset({"name", "mac", "device", "node", "connected", "queues", "rx", "tx", "spec"})  # in that table


def _device_facts(guest: Mapping[str, Any]) -> list[Table]:
    """What was asked for and is in use of one guest's device, and what else is known."""
    return _asked_and_facts(f"guest {guest['name']}", {key: value for key, value in guest.items() if key not in _SHOWN})


def _asked_and_facts(title: str, facts: dict[str, Any]) -> list[Table]:
    """What was asked for and is in use, then the rest of `facts`; no table that would be empty."""
    asked = _asked(facts)
    tables = [table(title, ("what", "asked", "in use"), asked)] if asked else []
    return [*tables, table("" if asked else title, ("fact", "value"), _flatten(facts))]


def status_view(status: Mapping[str, Any]) -> Group:
    """The daemon, each NIC with what was asked for and what is in use, and each guest."""
    daemon = {
        "version": status["version"],
        "pid": status["pid"],
        "run directory": status["run_dir"],
        "up": f"{status['uptime_seconds']} s",
        "metrics": status["metrics"],
        "mode": status["mode"],
    }
    if "workers" in status:
        daemon["workers"] = f"{status['workers']}, {status['poll']}"
    parts: list[Table] = [table("xdpvhost", ("what", "value"), _flatten(daemon))]
    if len(status.get("worker_loads", ())) > 1:
        parts.append(loads_table(status["worker_loads"]))
    for nic in status["nics"]:
        facts = {key: value for key, value in nic.items() if key not in ("facts", "assignment")} | nic["facts"]
        parts += _asked_and_facts(f"interface {facts.pop('iface')}", facts)
        if nic.get("assignment"):
            parts.append(_queue_table(nic))
    parts.append(guest_table(status["guests"]))
    if (ports := port_table(status["guests"])) is not None:
        parts.append(ports)
    for guest in status["guests"]:
        if "device" in guest:
            parts += _device_facts(guest)
    if captures := status.get("captures"):
        rows = [[item[key] for key in CAPTURE_COLUMNS] for item in captures]
        parts.append(table("captures", CAPTURE_COLUMNS, rows, right=2))
    served = [g for g in status["guests"] if g.get("connected") and "features" in g]
    features = [(g["name"], g["features"], " ".join(g["feature_names"])) for g in served]
    if features:
        parts.append(table("negotiated features", ("guest", "bits", "names"), features))
    return Group(*parts)


def loads_table(workers: Sequence[Mapping[str, Any]]) -> Table:
    """What workers did in the last second, and the guests that begin with them, or what they will do."""
    planned = all("expected_percent" in worker for worker in workers)
    rows = [
        (
            worker["worker"],
            f"{worker['busy_percent']} %",
            worker["packets_per_second"],
            f"{worker['expected_percent']} %" if planned else ", ".join(worker["guests"]) or "none",
        )
        for worker in workers
    ]
    return table("workers", ("worker", "busy", "frames/s", "expected" if planned else "guests' first pairs"), rows)


def _queue_table(nic: Mapping[str, Any]) -> Table:
    rows = [
        (
            queue["queue"],
            ", ".join(f"worker {worker}: {count}" for worker, count in queue["readers"].items()) or "none",
            queue["sending_pairs"],
        )
        for queue in nic["assignment"]
    ]
    columns = ("queue", "read by (sockets)", "pairs that send on it")
    return table(f"queues of {nic['iface']}", columns, rows)


def total(counters: Sequence[Counter], name: str, **labels: str) -> int:
    """The sum over all series of `name` with these labels."""
    wanted = labels.items()
    return sum(
        counter["value"] for counter in counters if counter["name"] == name and wanted <= counter["labels"].items()
    )


def label_values(counters: Sequence[Counter], name: str, *labels: str) -> list[tuple[str, ...]]:
    """The distinct values of these labels in `name`, in the order of their first appearance."""
    series = (counter["labels"] for counter in counters if counter["name"] == name)
    return list(dict.fromkeys(tuple(label[key] for key in labels) for label in series))


def _reasons(counters: Sequence[Counter], name: str, **labels: str) -> str:
    """`reason count` for each that isn't zero."""
    reasons = (reason for (reason,) in label_values(counters, name, "reason"))
    found = {reason: total(counters, name, reason=reason, **labels) for reason in reasons}
    return ", ".join(f"{reason} {count}" for reason, count in found.items() if count) or "none"


def stats_view(stats: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Group:
    """Totals, or what happened a second since `before`."""
    counters: Sequence[Counter] = stats["counters"]
    old: Sequence[Counter] = before["counters"] if before else ()
    seconds = stats["time"] - before["time"] if before else 0.0

    def number(name: str, **labels: str) -> str:
        now = total(counters, name, **labels)
        if not seconds:
            return f"{now:,}"
        return f"{max(0, now - total(old, name, **labels)) / seconds:,.0f}"

    unit = "/s" if seconds else ""
    if label_values(counters, "xdpvhost_link_packets_total", "guest"):
        return Group(_link_stats(counters, number, unit))
    parts = [_guest_stats(counters, number, unit), _nic_stats(counters, number, unit)]
    if label_values(counters, "xdpvhost_tap_gone", "iface"):
        parts.append(_tap_stats(counters, number, unit))
    return Group(*parts, _worker_stats(counters, number, unit))


Number = Callable[..., str]


def _guest_stats(counters: Sequence[Counter], number: Number, unit: str) -> Table:
    rows = [
        (
            guest,
            queue,
            number("xdpvhost_guest_rx_packets_total", guest=guest, queue=queue),
            number("xdpvhost_guest_rx_bytes_total", guest=guest, queue=queue),
            _reasons(counters, "xdpvhost_guest_drops_total", guest=guest, queue=queue, direction="rx"),
            number("xdpvhost_guest_tx_packets_total", guest=guest, queue=queue),
            number("xdpvhost_guest_tx_bytes_total", guest=guest, queue=queue),
            _reasons(counters, "xdpvhost_guest_drops_total", guest=guest, queue=queue, direction="tx"),
            number("xdpvhost_guest_kicks_total", guest=guest, queue=queue),
            number("xdpvhost_guest_calls_total", guest=guest, queue=queue),
        )
        for guest, queue in label_values(counters, "xdpvhost_guest_rx_packets_total", "guest", "queue")
    ]
    moved = ("rx", "rx bytes", "rx drops", "tx", "tx bytes", "tx drops", "kicks", "calls")
    columns = ("guest", "queue", *(word if "drops" in word else f"{word}{unit}" for word in moved))
    return table("guests", columns, rows, right=2)


def _nic_stats(counters: Sequence[Counter], number: Number, unit: str) -> Table:
    rows = []
    for iface, queue in label_values(counters, "xdpvhost_xsk_transmit_packets_total", "iface", "queue"):
        where = {"iface": iface, "queue": queue}
        verdicts = [
            number("xdpvhost_xdp_verdicts_total", verdict=verdict, **where)
            for verdict in ("redirect", "no_socket", "pass_unicast", "pass_multicast")
        ]
        rows.append(
            (
                iface,
                queue,
                *verdicts,
                number("xdpvhost_xsk_receive_packets_total", **where),
                number("xdpvhost_xsk_transmit_packets_total", **where),
                number("xdpvhost_nic_drops_total", **where),
                _reasons(counters, "xdpvhost_xsk_drops_total", **where),
            )
        )
    moved = ("redirect", "no socket", "to host", "multicast", "received", "sent")
    columns = ("iface", "queue", *(f"{word}{unit}" for word in moved), f"drops{unit}", "kernel's XSK statistics")
    return table("NIC queues", columns, rows, right=2)


def _tap_stats(counters: Sequence[Counter], number: Number, unit: str) -> Table:
    rows = [
        (
            iface,
            queue,
            number("xdpvhost_tap_receive_packets_total", iface=iface, queue=queue),
            number("xdpvhost_tap_receive_bytes_total", iface=iface, queue=queue),
            _reasons(counters, "xdpvhost_tap_receive_drops_total", iface=iface, queue=queue),
            number("xdpvhost_tap_transmit_packets_total", iface=iface, queue=queue),
            number("xdpvhost_tap_transmit_gso_packets_total", iface=iface, queue=queue),
            number("xdpvhost_tap_transmit_drops_total", iface=iface, queue=queue),
        )
        for iface, queue in label_values(counters, "xdpvhost_tap_gone", "iface", "queue")
    ]
    moved = (f"read{unit}", f"bytes{unit}", "drops", f"written{unit}", f"GSO{unit}", f"not taken{unit}")
    return table("taps", ("tap or iface", "queue", *moved), rows, right=2)


def _link_stats(counters: Sequence[Counter], number: Number, unit: str) -> Table:
    names = [f"xdpvhost_link_{what}_total" for what in ("packets", "bytes", "drops")]
    rows = [
        (guest, *(number(name, guest=guest, direction=direction) for direction in ("rx", "tx") for name in names))
        for (guest,) in label_values(counters, names[0], "guest")
    ]
    moved = ("rx", "rx bytes", "rx drops", "tx", "tx bytes", "tx drops")
    return table("guests' devices", ("guest", *(f"{word}{unit}" for word in moved)), rows, right=1)


def _worker_stats(counters: Sequence[Counter], number: Number, unit: str) -> Table:
    rows = [
        (
            worker,
            number("xdpvhost_worker_packets_total", worker=worker),
            number("xdpvhost_worker_polls_total", worker=worker, result="busy"),
            number("xdpvhost_worker_polls_total", worker=worker, result="idle"),
            number("xdpvhost_worker_sleeps_total", worker=worker),
            number("xdpvhost_worker_busy_cycles_total", worker=worker),
        )
        for (worker,) in label_values(counters, "xdpvhost_worker_sleeps_total", "worker")
    ]
    moved = ("packets", "busy turns", "idle turns", "sleeps", "busy cycles")
    columns = ("worker", *(f"{word}{unit}" for word in moved))
    return table("workers", columns, rows, right=1)


def watch(read: Callable[[], Mapping[str, Any]], wait: Callable[[], None]) -> NoReturn:
    """Show rates, anew after each `wait()`, until an exception ends it."""
    before = read()
    with Live(stats_view(before), console=console(), auto_refresh=False) as live:
        while True:
            wait()
            now = read()
            live.update(stats_view(now, before), refresh=True)
            before = now
