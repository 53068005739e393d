# SPDX-License-Identifier: Apache-2.0
"""What a user asks for, parsed and checked: guest SPECs and the options of `up`.

Nothing here looks at the machine. Every refusal is a ConfigError that names the SPEC, the key, and what would be right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ConfigError
from .spec_policy import PORT_KEYS, PORT_MODES, PortSpec, canonical, describe_vlans, overlap, port_of
from .spec_values import whole_number

SocketMode = Literal["server", "client"]
PollMode = Literal["adaptive", "busy", "interrupt"]
XdpMode = Literal["auto", "native", "generic", "none"]
BindMode = Literal["auto", "zerocopy", "copy"]
NtupleMode = Literal["auto", "off"]
MacChange = Literal["deny", "allow"]
Mode = Literal["xdp", "tap", "vhost-net", "macvtap", "vf", "emulated"]
Serve = Literal["qemu", "vhost-user"]
MacvtapMode = Literal["bridge", "private", "vepa", "passthru"]

SOCKET_MODES: tuple[str, ...] = get_args(SocketMode)
POLL_CHOICES: tuple[str, ...] = get_args(PollMode)
XDP_CHOICES: tuple[str, ...] = get_args(XdpMode)
BIND_CHOICES: tuple[str, ...] = get_args(BindMode)
NTUPLE_CHOICES: tuple[str, ...] = get_args(NtupleMode)
MAC_CHANGES: tuple[str, ...] = get_args(MacChange)
MODES: tuple[Mode, ...] = get_args(Mode)
SERVE_CHOICES: tuple[str, ...] = get_args(Serve)
MACVTAP_CHOICES: tuple[str, ...] = get_args(MacvtapMode)

DEFAULT_RUN_DIR = Path("/run/xdpvhost")
HOST_PORT_OF_EACH = "xvh-IF"  # the names of host ports, where none is given: IF is each interface's
HOST_PORT_LABEL = "host port"  # in metrics and traces, where guests have their names: no guest can have this one
DEFAULT_METRICS = "127.0.0.1:9477"
MAX_GUESTS = 512
MAX_PAIRS = 128
QUEUE_SIZES = (256, 512, 1024)  # what QEMU takes for a receive queue; 256 is its default
MAX_WORKERS = 64
MAC_AGE = 300  # as Linux bridges have it
MAX_SOCKET_PATH = 107  # sizeof(sun_path) is 108 with the terminating NUL: unix(7)
API_SOCKET = "api.sock"
RESERVED_NAMES = frozenset({"api"})  # RUN_DIR/api.sock is the daemon's own

COMMON_KEYS = ("name", "mac", "queues")
SOCKET_KEYS = ("socket", "socket-mode", "mac-change")
FIELD_KEYS = (*COMMON_KEYS, *SOCKET_KEYS, "iface")  # what GuestSpec has a field for
SPEC_KEYS = (*FIELD_KEYS, *PORT_KEYS)  # of mode xdp; MODE_KEYS are the others'
SPEC_SYNTAX = (
    "name=NAME,mac=MAC[,queues=N][,iface=IF][,socket=PATH][,socket-mode=server|client][,mac-change=deny|allow]"
    "[,KEY=VALUE…]"
)
FIXED_KEYS = ("name", "mac", "queues", "socket", "socket-mode", "iface")  # of a guest that is there
_TAP_KEYS = {"tap": "NAME", "owner": "USER", "group": "GROUP", "address": "IP[+IP…]"}
_NODE_KEYS = {"tap": "NAME", "owner": "USER", "group": "GROUP"}
# The keys that each other mode adds to COMMON_KEYS, and what their values are like. ctl/modes/MODE.py checks them.
MODE_KEYS: dict[Mode, dict[str, str]] = {
    "xdp": {},
    "tap": {**_TAP_KEYS, "socket": "PATH", "socket-mode": "server|client", "mac-change": "deny|allow", **PORT_KEYS},
    "vhost-net": _TAP_KEYS,
    "macvtap": _NODE_KEYS,
    "vf": {
        "vf": "N",
        "to": "vfio|netdev|netns:NAME",
        "vlan": "N",
        "qos": "N",
        "vlan-protocol": "802.1Q|802.1ad",
        "spoof-check": "on|off",
        "trust": "on|off",
        "min-rate": "MBIT",
        "max-rate": "MBIT",
        "link": "auto|enable|disable",
    },
    "emulated": _TAP_KEYS,
}

# In which modes an option of `up` means something; the others are for all. `--serve vhost-user` has a data plane, too.
_BRIDGED: tuple[Mode, ...] = ("tap", "vhost-net", "emulated")
OPTION_MODES: dict[str, tuple[Mode, ...]] = {
    "workers": ("xdp",),
    "poll": ("xdp",),
    "host_port": ("xdp",),
    "mac_age": ("xdp",),
    "xdp_mode": ("xdp",),
    "bind": ("xdp",),
    "ntuple": ("xdp",),
    "serve": ("tap",),
    "bridge": _BRIDGED,
    "routed": _BRIDGED,
    "force": (*_BRIDGED, "macvtap", "vf"),
    "macvtap_mode": ("macvtap",),
    "pin_vhost": ("vhost-net",),
    "vfs": ("vf",),
}

_NO_WISHES = frozenset({"force", "guests"})
_IFNAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,32}")
_MAC = re.compile(r"[0-9A-Fa-f]{2}(?P<sep>[:-])[0-9A-Fa-f]{2}(?:(?P=sep)[0-9A-Fa-f]{2}){4}")


@dataclass(frozen=True)
class GuestSpec:
    """One guest as configured: `mac` is 6 bytes, `queues` counts queue pairs, `socket` is absolute.

    `socket_mode` says what xdpvhost does with the socket: "server" listens there, "client" connects to it.
    `mac_change` says whether the guest may listen to other unicast addresses than `mac`.
    `iface` is the interface that it is served on, one of those that `up` was given; None: xdpvhost chooses.
    `keys` are the values of its mode's own SPEC keys, as they were given; the mode's file says what they mean.
    """

    name: str
    mac: bytes
    queues: int
    socket: Path
    socket_mode: SocketMode = "server"
    mac_change: MacChange = "deny"
    iface: str | None = None
    mode: Mode = "xdp"
    keys: tuple[tuple[str, str], ...] = ()

    def key(self, name: str) -> str | None:
        """The value of one of the mode's own keys, or None."""
        return dict(self.keys).get(name)

    @property
    def port(self) -> PortSpec:
        """Its place in the switch, if the data plane serves it."""
        return port_of(self)


@dataclass(frozen=True)
class MetricsAddress:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class UpConfig:
    """All that `xdpvhost up` was asked for. Several interfaces: in mode xdp only."""

    ifaces: tuple[str, ...]
    guests: tuple[GuestSpec, ...] = ()
    run_dir: Path = DEFAULT_RUN_DIR
    metrics: MetricsAddress | None = None
    workers: int = 1
    poll: PollMode = "adaptive"
    xdp_mode: XdpMode = "auto"
    bind: BindMode = "auto"
    ntuple: NtupleMode = "auto"
    mode: Mode = "xdp"
    serve: Serve = "qemu"  # who serves the guests of mode tap
    bridge: str | None = None  # None: one of our own
    routed: bool = False  # instead of a bridge
    force: bool = False  # not a wish: it says that breaking the NIC's present use is meant
    macvtap_mode: MacvtapMode = "bridge"
    pin_vhost: tuple[int, ...] = ()  # CPUs
    vfs: int | None = None  # None: those that there are, or one a guest
    mac_age: int = MAC_AGE  # seconds until an address that a guest has learned is forgotten
    host_port: str | None = None  # a tap's name, or HOST_PORT_OF_EACH; None: no host port

    @property
    def iface(self) -> str:
        """The one interface, or all of them for a message."""
        return ", ".join(self.ifaces)

    def words(self, one: str, several: str) -> str:
        """A clause about the interface, or about all of them."""
        return f"{self.iface} {one if len(self.ifaces) == 1 else several}"


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


def spec_keys(mode: Mode) -> tuple[str, ...]:
    """The keys of a guest's SPEC in this mode."""
    return SPEC_KEYS if mode == "xdp" else (*COMMON_KEYS, *MODE_KEYS[mode])


def spec_syntax(mode: Mode) -> str:
    """How a guest's SPEC is written in this mode."""
    if mode == "xdp":
        return SPEC_SYNTAX
    return "name=NAME,mac=MAC[,queues=N]" + "".join(f"[,{key}={value}]" for key, value in MODE_KEYS[mode].items())


def parse_guest(text: str, run_dir: Path = DEFAULT_RUN_DIR, mode: Mode = "xdp") -> GuestSpec:
    """Parse SPEC. `run_dir` is where the default socket lies, `mode` says which keys there are.

    Raises ConfigError: unknown, repeated, empty or missing keys, and everything that `check_name`, `parse_mac`,
    `check_socket` and the mode refuse.
    """
    what = f"guest {text!r}"
    known, syntax = spec_keys(mode), spec_syntax(mode)
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{what}: {part!r} is not key=value; the syntax is {syntax}")
        if key not in known:
            of_mode = "" if mode == "xdp" else f" in mode {mode}"
            raise ConfigError(f"{what}: unknown key {key!r}{of_mode}; known keys are {', '.join(known)}")
        if key in values:
            raise ConfigError(f"{what}: key {key!r} is given twice; give it once")
        if not value:
            raise ConfigError(f"{what}: key {key!r} has no value; the syntax is {syntax}")
        values[key] = value
    for key in ("name", "mac"):
        if key not in values:
            raise ConfigError(f"{what}: key {key!r} is missing; the syntax is {syntax}")

    name = check_name(values["name"], what)
    wanted = values.get("socket-mode", "server")
    if wanted not in SOCKET_MODES:
        raise ConfigError(f"{what}: socket-mode={wanted} is unknown; use {' or '.join(SOCKET_MODES)}")
    change = values.get("mac-change", "deny")
    if change not in MAC_CHANGES:
        raise ConfigError(f"{what}: mac-change={change} is unknown; use {' or '.join(MAC_CHANGES)}")
    given = values.get("socket")
    socket = Path(given).absolute() if given else run_dir.absolute() / f"{name}.sock"
    spec = GuestSpec(
        name=name,
        mac=parse_mac(values["mac"], what),
        queues=_parse_queues(values.get("queues", "1"), what),
        socket=check_socket(socket, what),
        socket_mode="client" if wanted == "client" else "server",
        mac_change="allow" if change == "allow" else "deny",
        iface=values.get("iface"),
        mode=mode,
        keys=_own_keys(name, mode, values),
    )
    _ = spec.port  # whether its keys go together
    if mode != "xdp":
        from .modes import mode_for

        mode_for(mode).check_spec(spec)
    return spec


def _own_keys(name: str, mode: Mode, values: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    own = tuple((key, value) for key, value in values.items() if key not in FIELD_KEYS)
    return canonical(name, own) if mode in PORT_MODES else own


def parse_changes(name: str, texts: Iterable[str]) -> dict[str, str]:
    """`key=value` each, or several with commas; a value may be empty. Raises ConfigError."""
    what = f"guest {name!r}"
    changes: dict[str, str] = {}
    for part in (part for text in texts for part in text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"{what}: {part!r} is not key=value; to take a key out, write {part or 'key'}=")
        if key in changes:
            raise ConfigError(f"{what}: key {key!r} is given twice; give it once")
        changes[key] = value
    return changes


def change_guest(spec: GuestSpec, changes: Mapping[str, str]) -> GuestSpec:
    """`spec` with other values of some keys; an empty one is taken out, and so has its default again.

    Raises ConfigError as `parse_guest` does, and for keys that a guest keeps for as long as it is there.
    """
    what = f"guest {spec.name!r}"
    for key, value in changes.items():
        if "," in value:
            raise ConfigError(f"{what}: {key}={value!r} has a comma, which ends a value; give each key its own")
        if key in FIXED_KEYS:
            raise ConfigError(
                f"{what}: {key}= can't be changed while it is there; `xdpvhost guest rm {spec.name}`, then `guest add`"
            )
        if key not in spec_keys(spec.mode):
            known = ", ".join(key for key in spec_keys(spec.mode) if key not in FIXED_KEYS)
            raise ConfigError(f"{what}: unknown key {key!r}; those that can be changed are {known}")
    now = dict(part.partition("=")[::2] for part in format_guest(spec).split(","))
    now |= changes
    return parse_guest(",".join(f"{key}={value}" for key, value in now.items() if value), mode=spec.mode)


def format_guest(spec: GuestSpec) -> str:
    """The SPEC that parses to `spec` whatever the run directory."""
    text = f"name={spec.name},mac={format_mac(spec.mac)},queues={spec.queues}"
    if "socket" in spec_keys(spec.mode):
        text += f",socket={spec.socket},socket-mode={spec.socket_mode}"
        text += ",mac-change=allow" if spec.mac_change == "allow" else ""
        text += f",iface={spec.iface}" if spec.iface is not None else ""
    return text + "".join(f",{key}={value}" for key, value in spec.keys)


def check_name(name: str, what: str) -> str:
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise ConfigError(
            f"{what}: name={name} is not a guest name; use 1 to 32 letters, digits, underscores, dots and hyphens"
        )
    if name in RESERVED_NAMES:
        raise ConfigError(f"{what}: name={name} is taken by the daemon's own {name}.sock; use another name")
    return name


def _parse_queues(text: str, what: str) -> int:
    value = whole_number(text)
    if value is None or not 1 <= value <= MAX_PAIRS:
        raise ConfigError(f"{what}: queues={text} is not a number of queue pairs; use 1 to {MAX_PAIRS}")
    return value


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
        if (mac := overlap(spec.port, other.port)) is not None:
            key = "mac" if mac == spec.mac else "macs"
            raise ConfigError(
                f"guest {spec.name!r}: {key}={format_mac(mac)} is taken by guest {other.name!r}{_where(spec, other)}; "
                "give each its own"
            )
        if spec.socket == other.socket:
            raise ConfigError(
                f"guest {spec.name!r}: socket path {spec.socket} is in use by guest {other.name!r}; give each its own"
            )


def _where(spec: GuestSpec, other: GuestSpec) -> str:
    """In which VLANs they meet, if one of them is in less than all."""
    if not any({"vlan", "trunk"} & guest.port.given for guest in (spec, other)):
        return ""
    return f", which is in {describe_vlans(other.port.policy)}, and this one in {describe_vlans(spec.port.policy)}"


def parse_guests(texts: Sequence[str], run_dir: Path, mode: Mode = "xdp") -> tuple[GuestSpec, ...]:
    """Parse every SPEC and check each against those before it."""
    specs: list[GuestSpec] = []
    for text in texts:
        spec = parse_guest(text, run_dir, mode)
        check_new_guest(spec, specs)
        specs.append(spec)
    if len(specs) > MAX_GUESTS:
        raise ConfigError(
            f"{len(specs)} guests are asked for, one daemon serves {MAX_GUESTS}; run another one for other interfaces"
        )
    return tuple(specs)


def check_run_dir(path: Path) -> Path:
    """The absolute run directory; its API socket must fit into a unix address."""
    absolute = path.absolute()
    check_socket(absolute / API_SOCKET, f"--run-dir {path}")
    return absolute


def check_ifaces(ifaces: Sequence[str], mode: Mode) -> tuple[str, ...]:
    """The interfaces of one daemon. Raises ConfigError: one given twice, or several in a mode that serves one."""
    for name in ifaces:
        if ifaces.count(name) > 1:
            raise ConfigError(f"--iface {name}: is given twice; give it once")
    if len(ifaces) > 1 and mode != "xdp":
        raise ConfigError(
            f"--iface {ifaces[1]}: mode {mode} serves one interface; run another daemon for it, with a --run-dir "
            "of its own"
        )
    return tuple(ifaces)


def parse_moves(texts: Iterable[str]) -> dict[str, int]:
    """GUEST=WORKER, any number of them. Raises ConfigError."""
    moves: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        worker = whole_number(number)
        if not name or worker is None or worker >= MAX_WORKERS:
            raise ConfigError(f"{text!r} is not GUEST=WORKER; workers are numbers below {MAX_WORKERS}, from 0 on")
        if name in moves:
            raise ConfigError(f"guest {name!r} is given twice; give it once")
        moves[name] = worker
    return moves


def check_host_port(name: str | None, ifaces: Sequence[str]) -> str | None:
    """The name of the host port of one interface. Raises ConfigError."""
    if name is None or name == HOST_PORT_OF_EACH:
        return name
    if not _IFNAME.fullmatch(name) or name in (".", "..", "all", "default"):
        raise ConfigError(
            f"--host-port {name}: is no name for an interface; use 1 to 15 letters, digits, underscores, dots and "
            "hyphens"
        )
    if len(ifaces) > 1:
        raise ConfigError(f"--host-port {name}: each of {len(ifaces)} interfaces has its own; leave the name out")
    return name


def parse_metrics(text: str) -> MetricsAddress | None:
    """`ADDR:PORT`, `[V6]:PORT`, or `none`."""
    if text == "none":
        return None
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    number = whole_number(port)
    if not colon or not host or number is None or number > 65535 or (":" in host and not bracketed):
        raise ConfigError(f"--metrics {text}: not ADDR:PORT; write 127.0.0.1:9477, [::1]:9477 or none")
    return MetricsAddress(host[1:-1] if bracketed else host, number)


def check_options(mode: Mode, serve: Serve, given: Iterable[str]) -> None:
    """Raise ConfigError for an option of `up` that was given (by its parameter's name) and means nothing in `mode`."""
    for name in given:
        modes = OPTION_MODES.get(name)
        served = mode == "tap" and serve == "vhost-user" and name in ("workers", "poll", "host_port", "mac_age")
        if modes is not None and mode not in modes and not served:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: means nothing in mode {mode}, only in {', '.join(modes)}; leave it out")


def parse_cpus(text: str) -> tuple[int, ...]:
    """CPUs as taskset(1) takes them: numbers and ranges, with commas."""
    cpus: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part, re.ASCII)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ConfigError(f"--pin-vhost {text}: {part!r} is no CPU, nor a range of them; write it like 2,4-6")
        cpus.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(cpus))


def wishes(config: UpConfig, guests: Iterable[GuestSpec]) -> dict[str, Any]:
    """What `up` was asked for, and which guests were added or removed since, as JSON values."""
    values: dict[str, Any] = {
        field.name: getattr(config, field.name) for field in fields(config) if field.name not in _NO_WISHES
    }
    for name, value in values.items():
        if isinstance(value, tuple):
            values[name] = list(value)
        elif not isinstance(value, str | int | None):
            values[name] = str(value)
    return values | {"ifaces": sorted(config.ifaces), "guests": sorted(map(format_guest, guests))}


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """For people: in what wishes of ours and of a running daemon differ."""
    return [
        f"{name.replace('_', '-')} {_words(theirs.get(name))} instead of {_words(value)}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]


def _words(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
