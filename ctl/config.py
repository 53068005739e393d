# SPDX-License-Identifier: Apache-2.0
"""What a user asks for, parsed and checked: guest SPECs and the options of `up`.

Nothing here looks at the machine. Every refusal is a ConfigError that names the SPEC, the key, and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from .errors import ConfigError

SocketMode = Literal["server", "client"]
PollMode = Literal["adaptive", "busy", "interrupt"]
XdpMode = Literal["auto", "native", "generic", "none"]
BindMode = Literal["auto", "zerocopy", "copy"]
MacChange = Literal["deny", "allow"]

SOCKET_MODES: tuple[str, ...] = get_args(SocketMode)
POLL_CHOICES: tuple[str, ...] = get_args(PollMode)
XDP_CHOICES: tuple[str, ...] = get_args(XdpMode)
BIND_CHOICES: tuple[str, ...] = get_args(BindMode)
MAC_CHANGES: tuple[str, ...] = get_args(MacChange)

DEFAULT_RUN_DIR = Path("/run/xdpvhost")
DEFAULT_METRICS = "127.0.0.1:9477"
MAX_GUESTS = 512
MAX_PAIRS = 128
QUEUE_SIZES = (256, 512, 1024)  # what QEMU takes for a receive queue; 256 is its default
MAX_WORKERS = 64
MAX_SOCKET_PATH = 107  # sizeof(sun_path) is 108 with the terminating NUL: unix(7)
API_SOCKET = "api.sock"
RESERVED_NAMES = frozenset({"api"})  # RUN_DIR/api.sock is the daemon's own

SPEC_KEYS = ("name", "mac", "queues", "socket", "socket-mode", "mac-change")
SPEC_SYNTAX = "name=NAME,mac=MAC[,queues=N][,socket=PATH][,socket-mode=server|client][,mac-change=deny|allow]"

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?P<sep>[:-])[0-9A-Fa-f]{2}(?:(?P=sep)[0-9A-Fa-f]{2}){4}")


@dataclass(frozen=True)
class GuestSpec:
    """One guest as configured: `mac` is 6 bytes, `queues` counts queue pairs, `socket` is absolute.

    `socket_mode` says what xdpvhost does with the socket: "server" listens there, "client" connects to it.
    `mac_change` says whether the guest may listen to other unicast addresses than `mac`.
    """

    name: str
    mac: bytes
    queues: int
    socket: Path
    socket_mode: SocketMode = "server"
    mac_change: MacChange = "deny"


@dataclass(frozen=True)
class MetricsAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UpConfig:
    """All that `xdpvhost up` was asked for."""

    iface: str
    guests: tuple[GuestSpec, ...] = ()
    run_dir: Path = DEFAULT_RUN_DIR
    metrics: MetricsAddress | None = None
    workers: int = 1
    poll: PollMode = "adaptive"
    xdp_mode: XdpMode = "auto"
    bind: BindMode = "auto"


def format_mac(mac: bytes) -> str:
    """The usual notation, lower case with colons."""
    return mac.hex(":")


def parse_mac(text: str, what: str) -> bytes:
    """A unicast station address, 6 bytes. `what` opens the error message."""
    if not _MAC.fullmatch(text):
        raise ConfigError(f"{what}: mac={text} is malformed; write six hexadecimal bytes like 52:54:00:00:00:01")
    mac = bytes.fromhex(text.replace(text[2], ""))
    if not any(mac):
        raise ConfigError(f"{what}: mac={text} is all zero, which no station may have; try 52:54:00:00:00:01")
    if mac[0] & 1:
        raise ConfigError(
            f"{what}: mac={text} is a multicast address (lowest bit of its first byte); try 52:54:00:00:00:01"
        )
    return mac


def parse_guest(text: str, run_dir: Path = DEFAULT_RUN_DIR) -> GuestSpec:
    """Parse SPEC. `run_dir` is where the default socket lies.

    Raises ConfigError: unknown, repeated, empty or missing keys, and everything that `check_name`, `parse_mac` and
    `check_socket` refuse.
    """
    what = f"guest {text!r}"
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{what}: {part!r} is not key=value; the syntax is {SPEC_SYNTAX}")
        if key not in SPEC_KEYS:
            raise ConfigError(f"{what}: unknown key {key!r}; known keys are {', '.join(SPEC_KEYS)}")
        if key in values:
            raise ConfigError(f"{what}: key {key!r} is given twice; give it once")
        if not value:
            raise ConfigError(f"{what}: key {key!r} has no value; the syntax is {SPEC_SYNTAX}")
        values[key] = value
    for key in ("name", "mac"):
        if key not in values:
            raise ConfigError(f"{what}: key {key!r} is missing; the syntax is {SPEC_SYNTAX}")

    name = check_name(values["name"], what)
    mode = values.get("socket-mode", "server")
    if mode == "server":
        socket_mode: SocketMode = "server"
    elif mode == "client":
        socket_mode = "client"
    else:
        raise ConfigError(f"{what}: socket-mode={mode} is unknown; use {' or '.join(SOCKET_MODES)}")
    change = values.get("mac-change", "deny")
    if change not in MAC_CHANGES:
        raise ConfigError(f"{what}: mac-change={change} is unknown; use {' or '.join(MAC_CHANGES)}")
    given = values.get("socket")
    socket = Path(given).absolute() if given else run_dir.absolute() / f"{name}.sock"
    return GuestSpec(
        name=name,
        mac=parse_mac(values["mac"], what),
        queues=_parse_queues(values.get("queues", "1"), what),
        socket=check_socket(socket, what),
        socket_mode=socket_mode,
        mac_change="allow" if change == "allow" else "deny",
    )


def format_guest(spec: GuestSpec) -> str:
    """The SPEC that parses to `spec` whatever the run directory."""
    return (
        f"name={spec.name},mac={format_mac(spec.mac)},queues={spec.queues},socket={spec.socket},"
        f"socket-mode={spec.socket_mode}"
    ) + (",mac-change=allow" if spec.mac_change == "allow" else "")


def check_name(name: str, what: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(
            f"{what}: name={name} is not a guest name; use 1 to 32 letters, digits, underscores, dots and hyphens"
        )
    if name in RESERVED_NAMES:
        raise ConfigError(f"{what}: name={name} is taken by the daemon's own {name}.sock; use another name")
    return name


def _parse_queues(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_PAIRS:
        raise ConfigError(f"{what}: queues={text} is not a number of queue pairs; use 1 to {MAX_PAIRS}")
    return int(text)


def check_socket(path: Path, what: str) -> Path:
    if not str(path).isprintable():
        raise ConfigError(f"{what}: socket path {str(path)!r} has unprintable characters; give another socket=PATH")
    if "," in str(path):
        raise ConfigError(f"{what}: socket path {path} has a comma, which neither SPEC nor QEMU can carry; rename it")
    length = len(str(path).encode())
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"{what}: socket path {path} has {length} bytes, a unix socket takes {MAX_SOCKET_PATH}; "
            "give a shorter socket=PATH or --run-dir"
        )
    return path


def check_new_guest(spec: GuestSpec, others: Iterable[GuestSpec]) -> None:
    """Raise ConfigError when `spec` takes a name, MAC or socket path that one of `others` has."""
    for other in others:
        if spec.name == other.name:
            raise ConfigError(
                f"guest {spec.name!r}: the name is in use; choose another, or `xdpvhost guest rm` it first"
            )
        if spec.mac == other.mac:
            raise ConfigError(
                f"guest {spec.name!r}: mac={format_mac(spec.mac)} is taken by guest {other.name!r}; give each its own"
            )
        if spec.socket == other.socket:
            raise ConfigError(
                f"guest {spec.name!r}: socket path {spec.socket} is in use by guest {other.name!r}; give each its own"
            )


def parse_guests(texts: Sequence[str], run_dir: Path) -> tuple[GuestSpec, ...]:
    """Parse every SPEC and check each against those before it."""
    specs: list[GuestSpec] = []
    for text in texts:
        spec = parse_guest(text, run_dir)
        check_new_guest(spec, specs)
        specs.append(spec)
    if len(specs) > MAX_GUESTS:
        raise ConfigError(
            f"{len(specs)} guests are asked for, one interface serves {MAX_GUESTS}; use another NIC or VF"
        )
    return tuple(specs)


def check_run_dir(path: Path) -> Path:
    """The absolute run directory; its API socket must fit into a unix address."""
    absolute = path.absolute()
    check_socket(absolute / API_SOCKET, f"--run-dir {path}")
    return absolute


def parse_metrics(text: str) -> MetricsAddress | None:
    """`ADDR:PORT`, `[V6]:PORT`, or `none`."""
    if text == "none":
        return None
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    good_port = port.isascii() and port.isdigit() and int(port[:9]) <= 65535
    if not colon or not host or not good_port or (":" in host and not bracketed):
        raise ConfigError(f"--metrics {text}: not ADDR:PORT; write 127.0.0.1:9477, [::1]:9477 or none")
    return MetricsAddress(host[1:-1] if bracketed else host, int(port))
