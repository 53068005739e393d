# SPDX-License-Identifier: Apache-2.0
"""The command line. Results go to stdout, the log and errors to stderr; exit codes are in EXIT_CODES."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
import msgspec

from . import __version__, api, config, privileges
from .errors import ConfigError, DaemonError, NicError, XdpvhostError

F = TypeVar("F", bound=Callable[..., Any])

DOWN_TIMEOUT = 30.0
TRACE_TIMEOUT = 0.5  # for each look at a daemon that may be stopped

EXIT_CODES = """\b
Exit codes:
  0  done
  1  a bug, or something unforeseen; the message or traceback says what
  2  bad command line, option, guest SPEC or request
  3  the interface, its XDP program or its AF_XDP sockets
  4  a capability is missing; the message names it
  5  the data plane library
  6  no daemon where one is needed, or one where none may be
  7  the output could not be written: a full disk
"""


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except XdpvhostError as exc:
            click.echo(f"Error: {exc}", err=True)
            ctx.exit(exc.exit_code)


run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    default=config.DEFAULT_RUN_DIR,
    show_default=True,
    help="Where the daemon keeps its sockets, lock and journal.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the facts as JSON.")


def _print_json(facts: Any) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(facts), indent=2))


def _set_up_log(verbose: bool) -> None:
    """One event a line on stderr; coloured on a terminal, without the time where journald adds its own."""
    handler: logging.Handler
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
        handler.setFormatter(logging.Formatter(f"{when}%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(__package__).setLevel(logging.DEBUG if verbose else logging.INFO)


@click.group(cls=_Group, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xdpvhost")
@click.option("-v", "--verbose", is_flag=True, help="Log details, too.")
def main(verbose: bool) -> None:
    """Virtual machines on a NIC that stays the kernel's: XDP, AF_XDP and vhost-user."""
    _set_up_log(verbose)


@main.command()
@click.option(
    "--iface",
    "ifaces",
    required=True,
    multiple=True,
    metavar="IF",
    help="The interface that the guests share with the host. Repeatable in mode xdp: guests are spread over them.",
)
@click.option("--guest", "guests", multiple=True, metavar="SPEC", help=f"A guest: {config.SPEC_SYNTAX}. Repeatable.")
@run_dir_option
@click.option(
    "--metrics",
    default=config.DEFAULT_METRICS,
    show_default=True,
    metavar="ADDR:PORT",
    help="Where to serve Prometheus metrics; `none`: nowhere.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, config.MAX_WORKERS),
    default=1,
    show_default=True,
    help="Threads that move frames, each on a CPU of its own.",
)
@click.option(
    "--poll",
    type=click.Choice(config.POLL_CHOICES),
    default="adaptive",
    show_default=True,
    help="How workers wait: poll while there is work, always, or never.",
)
@click.option(
    "--xdp-mode",
    type=click.Choice(config.XDP_CHOICES),
    default="auto",
    show_default=True,
    help="Where the XDP program runs; auto: native, else generic; none: without it, by a packet socket.",
)
@click.option(
    "--bind",
    type=click.Choice(config.BIND_CHOICES),
    default="auto",
    show_default=True,
    help="How AF_XDP sockets bind; auto: zerocopy, else copy.",
)
@click.option(
    "--ntuple",
    type=click.Choice(config.NTUPLE_CHOICES),
    default="auto",
    show_default=True,
    help="Rules by which the NIC sorts guests' frames into queues; auto: where it has n-tuple filters.",
)
@click.option(
    "--host-port",
    is_flag=False,
    flag_value=config.HOST_PORT_OF_EACH,
    metavar="[NAME]",
    help="A tap on each interface, through which the host joins its guests' network. [name: xvh-IF]",
)
@click.option(
    "--mode",
    type=click.Choice(config.MODES),
    default="xdp",
    show_default=True,
    help="How guests get their frames: by the data plane (xdp), or by a device that QEMU opens. docs/modes.md.",
)
@click.option(
    "--serve",
    type=click.Choice(config.SERVE_CHOICES),
    default="qemu",
    show_default=True,
    help="tap: who serves the guests: QEMU opens the tap, or the data plane does and offers vhost-user.",
)
@click.option(
    "--mac-age",
    type=click.IntRange(1, 86400),
    default=config.MAC_AGE,
    show_default=True,
    metavar="SECONDS",
    help="How long an address that a guest has learned (learn=N) is kept without being used.",
)
@click.option("--bridge", metavar="NAME", help="tap, vhost-net, emulated: the bridge to use. [default: one is made]")
@click.option("--routed", is_flag=True, help="tap, vhost-net, emulated: route to each guest's address, no bridge.")
@click.option("--force", is_flag=True, help="Even if the NIC is in use: what it has moves (vf: is replaced).")
@click.option(
    "--macvtap-mode",
    type=click.Choice(config.MACVTAP_CHOICES),
    default="bridge",
    show_default=True,
    help="macvtap: whom guests reach.",
)
@click.option("--pin-vhost", metavar="CPUS", help="vhost-net: where its kernel threads run, like 2,4-6.")
@click.option(
    "--vfs",
    type=click.IntRange(1, 65535),
    metavar="N",
    help="vf: how many the card has. [default: as many as it has already, else one a guest]",
)
@click.pass_context
def up(
    context: click.Context,
    ifaces: tuple[str, ...],
    guests: tuple[str, ...],
    run_dir: Path,
    metrics: str,
    workers: int,
    poll: config.PollMode,
    xdp_mode: config.XdpMode,
    bind: config.BindMode,
    ntuple: config.NtupleMode,
    host_port: str | None,
    mac_age: int,
    mode: config.Mode,
    serve: config.Serve,
    bridge: str | None,
    routed: bool,
    force: bool,
    macvtap_mode: config.MacvtapMode,
    pin_vhost: str | None,
    vfs: int | None,
) -> None:
    """Serve guests on an interface, in the foreground, until SIGTERM, SIGINT or `down`.

    Then the interface is given back exactly as it was.
    """
    run_dir = config.check_run_dir(run_dir)
    given = click.core.ParameterSource.COMMANDLINE
    config.check_options(mode, serve, [name for name in context.params if context.get_parameter_source(name) is given])
    wanted = config.UpConfig(
        ifaces=config.check_ifaces(ifaces, mode),
        guests=config.parse_guests(guests, run_dir, mode),
        run_dir=run_dir,
        metrics=config.parse_metrics(metrics),
        workers=workers,
        poll=poll,
        xdp_mode=xdp_mode,
        bind=bind,
        ntuple=ntuple,
        mode=mode,
        serve=serve,
        bridge=bridge,
        routed=routed,
        force=force,
        macvtap_mode=macvtap_mode,
        pin_vhost=config.parse_cpus(pin_vhost) if pin_vhost else (),
        vfs=vfs,
        host_port=config.check_host_port(host_port, ifaces),
        mac_age=mac_age,
    )
    from . import daemon
    from .service import service_for

    privileges.require("up", service_for(wanted).needs)
    daemon.run(wanted)


@main.command()
@run_dir_option
@json_option
def status(run_dir: Path, as_json: bool) -> None:
    """Show the daemon, its interface (asked for and in use), and its guests."""
    facts = api.call(run_dir, "status")
    if as_json:
        _print_json(facts)
        return
    from . import view

    view.console().print(view.status_view(facts))


@main.command()
@run_dir_option
@json_option
@click.option("--watch", is_flag=True, help="Show rates, again and again, until interrupted.")
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Seconds between two looks."
)
def stats(run_dir: Path, as_json: bool, watch: bool, interval: float) -> None:
    """Show every counter; docs/counters.md says what each means.

    With --watch and --json, print one line of JSON a look.
    """

    def read() -> Any:
        return api.call(run_dir, "stats")

    from . import view

    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                while True:
                    click.echo(msgspec.json.encode(read()))
                    time.sleep(interval)
            view.watch(read, lambda: time.sleep(interval))
    elif as_json:
        _print_json(read())
    else:
        view.console().print(view.stats_view(read()))


@main.group()
def guest() -> None:
    """Add, remove and list guests of a running daemon."""


@guest.command("add")
@click.argument("spec")
@run_dir_option
@json_option
def guest_add(spec: str, run_dir: Path, as_json: bool) -> None:
    """Add a guest: name=NAME,mac=MAC[,queues=N] and what else the daemon's mode takes, as for `up --guest`."""
    mode = api.call(run_dir, "wishes")["mode"]
    parsed = config.parse_guest(spec, run_dir, mode)
    facts = api.call(run_dir, "guest-add", {"spec": config.format_guest(parsed)})
    if as_json:
        _print_json(facts)
        return
    where = f"{facts['socket']} ({facts['socket_mode']})" if "socket" in facts else facts["device"]
    click.echo(f"guest {facts['name']}: {facts['mac']} on {where}")


@guest.command("set")
@click.argument("name")
@click.argument("changes", metavar="KEY=VALUE…", nargs=-1, required=True)
@run_dir_option
@json_option
def guest_set(name: str, changes: tuple[str, ...], run_dir: Path, as_json: bool) -> None:
    """Change keys of a guest's SPEC while it runs: its MACs, VLANs, policy, limits, link.

    A key without a value (`vlan=`) gets its default again. All is changed, or nothing. docs/switch.md has the keys.
    """
    facts = api.call(run_dir, "guest-set", {"name": name, "set": config.parse_changes(name, changes)})
    if as_json:
        _print_json(facts)
    else:
        click.echo(f"guest {facts['name']}: {facts['spec']}")


@guest.command("rm")
@click.argument("name")
@run_dir_option
@json_option
def guest_rm(name: str, run_dir: Path, as_json: bool) -> None:
    """Remove a guest; its virtual machine loses its link, the others notice nothing."""
    facts = api.call(run_dir, "guest-rm", {"name": name})
    if as_json:
        _print_json(facts)
    else:
        click.echo(f"guest {facts['name']}: removed")


@guest.command("list")
@run_dir_option
@json_option
def guest_list(run_dir: Path, as_json: bool) -> None:
    """List the guests."""
    facts = api.call(run_dir, "guest-list")
    if as_json:
        _print_json(facts)
        return
    from . import view

    console = view.console()
    console.print(view.guest_table(facts))
    if (ports := view.port_table(facts)) is not None:
        console.print(ports)


@main.command()
@click.argument("moves", metavar="[GUEST=WORKER…]", nargs=-1)
@run_dir_option
@json_option
def rebalance(moves: tuple[str, ...], run_dir: Path, as_json: bool) -> None:
    """Even out what the workers have to do, or move guests to workers as told.

    Without arguments it looks for a second at what each guest costs, and moves those that make a difference. No frame
    is lost or overtaken. docs/switch.md says what is on which worker.
    """
    facts = api.call(run_dir, "rebalance", {"move": config.parse_moves(moves)})
    if as_json:
        _print_json(facts)
        return
    from . import view

    if "workers" in facts:
        view.console().print(view.loads_table(facts["workers"]))
    for move in facts["moves"]:
        click.echo(f"guest {move['guest']}: from worker {move['from']} to {move['to']}")
    if not facts["moves"]:
        click.echo("nothing was moved")


@main.group()
def trace() -> None:
    """Watch what the kernel does with the guests' frames."""


@trace.command("drops")
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="Print each lost frame as one line of JSON.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after so long; else when interrupted.")
def trace_drops(run_dir: Path, as_json: bool, seconds: float | None) -> None:
    """Say which guest lost a frame in the kernel, and why, as it happens.

    Needs Debian's python3-bpfcc, and nothing else does.
    """
    privileges.require("trace drops", privileges.TRACE)
    from . import trace as tracing

    tracing.drops(lambda: api.call(run_dir, "status", timeout=TRACE_TIMEOUT), as_json=as_json, seconds=seconds)


@main.command()
@click.argument("port", metavar="GUEST|IFACE")
@click.argument("expression", nargs=-1, metavar="[FILTER]")
@run_dir_option
@click.option("-w", "output", metavar="FILE", help="Write pcapng there; `-`: to stdout. [default: lines on a terminal]")
@click.option("-c", "count", type=click.IntRange(1), metavar="COUNT", help="Stop after so many frames.")
@click.option(
    "-s",
    "snaplen",
    type=click.IntRange(1, 262144),
    default=262144,
    show_default=True,
    metavar="SNAPLEN",
    help="Bytes to keep of a frame.",
)
@click.option(
    "-Q",
    "direction",
    type=click.Choice(["in", "out", "inout"]),
    default="inout",
    show_default=True,
    help="in: to the guest, or from the network; out: the other way.",
)
@click.option("--drops", "drops_only", is_flag=True, help="Only frames that were dropped.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Stop after so long; else when interrupted.")
@click.option(
    "--buffer",
    type=click.IntRange(1, 1024),
    default=8,
    show_default=True,
    metavar="MIB",
    help="Memory between the two.",
)
def capture(
    port: str,
    expression: tuple[str, ...],
    run_dir: Path,
    output: str | None,
    count: int | None,
    snaplen: int,
    direction: Literal["in", "out", "inout"],
    drops_only: bool,
    seconds: float | None,
    buffer: int,
) -> None:
    """Capture a port's frames both ways, with why they were dropped.

    GUEST|IFACE is a guest or an interface of the daemon (guest:NAME and iface:NAME where both exist), FILTER a tcpdump
    expression. What is lost because this command is too slow is counted, and never slows the port.
    """
    from .capture import command

    wishes = command.Wishes(
        port=port,
        output=output,
        expression=" ".join(expression),
        snaplen=snaplen,
        direction=direction,
        drops_only=drops_only,
        count=count or 0,
        seconds=seconds,
        buffer=1 << (buffer - 1).bit_length() << 20,
    )
    command.run(run_dir, wishes)


@main.command()
@click.argument("iface", metavar="IF")
@json_option
def features(iface: str, as_json: bool) -> None:
    """Probe what an interface and this kernel can do for xdpvhost. Changes nothing."""
    from . import modes
    from .xdp.features import probe

    found = [*probe(iface), *modes.probe(iface)]
    if as_json:
        _print_json([msgspec.to_builtins(feature) for feature in found])
        return
    from . import view

    answer = {True: "yes", False: "no", None: "unknown"}
    rows = [(feature.name, answer[feature.supported], feature.detail, feature.remedy) for feature in found]
    view.console().print(view.table(f"features of {iface}", ("feature", "supported", "detail", "remedy"), rows))


def _device_options(command: F) -> F:
    """What `qemu-args` and `libvirt-xml` let choose about the device; qemu.Device."""
    mode = click.option(
        "--mode", type=click.Choice(config.MODES), help="The mode that a SPEC is for. [default: the daemon's, or xdp]"
    )
    size = click.option(
        "--queue-size",
        type=click.Choice([str(size) for size in config.QUEUE_SIZES]),
        help="Entries of each virtqueue. [default: QEMU's own, 256]",
    )
    packed = click.option("--packed", is_flag=True, help="Offer the guest packed virtqueues.")
    return mode(size(packed(command)))


@main.command("qemu-args")
@click.argument("guest")
@run_dir_option
@json_option
@click.option("--memory", default="1G", show_default=True, help="Size of the guest's memory.")
@click.option("--qemu-version", help="For which QEMU, like 10.0. [default: the one installed here]")
@_device_options
def qemu_args(
    guest: str,
    run_dir: Path,
    as_json: bool,
    memory: str,
    qemu_version: str | None,
    mode: config.Mode | None,
    queue_size: str | None,
    packed: bool,
) -> None:
    """Print the QEMU arguments that attach a virtual machine to GUEST.

    GUEST is a guest of the running daemon, or a whole SPEC, which needs no daemon.
    """
    from . import qemu

    version = qemu.parse_version(qemu_version) if qemu_version else qemu.installed_version()
    device = qemu.Device(int(queue_size) if queue_size else None, packed)
    spec, facts = _parsed(guest, run_dir, mode)
    qemu.check_memory(memory)
    files: Mapping[int, str] = {}
    if _own_socket(spec, facts):
        args = qemu.arguments(spec, memory, version, device)
    else:
        from .modes import mode_for

        net = mode_for(spec.mode).qemu(spec, device, facts)
        args, files = ["-m", memory, *net.args], net.files
    if as_json:
        _print_json({"args": args, "files": files} if files else args)
    else:
        click.echo(qemu.shell(args, files))


@main.command("libvirt-xml")
@click.argument("guest")
@run_dir_option
@json_option
@click.option("--interface", "only_interface", is_flag=True, help="Only <interface>, for `virsh attach-device`.")
@_device_options
def libvirt_xml(
    guest: str,
    run_dir: Path,
    as_json: bool,
    only_interface: bool,
    mode: config.Mode | None,
    queue_size: str | None,
    packed: bool,
) -> None:
    """Print the elements of a libvirt domain that attach it to GUEST.

    <memoryBacking> belongs into <domain>, <interface> into its <devices>. GUEST is a guest of the running daemon, or a
    whole SPEC, which needs no daemon.
    """
    from . import libvirt, qemu

    device = qemu.Device(int(queue_size) if queue_size else None, packed)
    spec, facts = _parsed(guest, run_dir, mode)
    elements = {}
    if _own_socket(spec, facts):
        if not only_interface:
            elements["memoryBacking"] = libvirt.memory_backing()
        elements["interface"] = libvirt.interface(spec, device)
    else:
        from .modes import mode_for

        elements["interface"] = mode_for(spec.mode).libvirt(spec, device, facts)
    if as_json:
        _print_json(elements)
    else:
        click.echo("\n".join(elements.values()))


def _parsed(guest: str, run_dir: Path, mode: config.Mode | None) -> tuple[config.GuestSpec, Mapping[str, Any] | None]:
    """A guest, and what the running daemon says of it. A SPEC needs no daemon, and then there are no facts."""
    if "=" in guest:
        return config.parse_guest(guest, run_dir, mode or "xdp"), None
    running: config.Mode = api.call(run_dir, "wishes")["mode"]
    if mode not in (None, running):
        raise ConfigError(f"--mode {mode}: the daemon of {run_dir} is in mode {running}; leave it out")
    facts = _facts_of(guest, run_dir)
    return config.parse_guest(str(facts["spec"]), run_dir, running), facts


def _own_socket(spec: config.GuestSpec, facts: Mapping[str, Any] | None) -> bool:
    """Whether the guest is served over vhost-user."""
    return spec.mode == "xdp" or (facts is not None and "socket" in facts)


def _facts_of(name: str, run_dir: Path) -> Mapping[str, Any]:
    guests = api.call(run_dir, "guest-list")
    for facts in guests:
        if facts["name"] == name:
            return dict(facts)
    known = ", ".join(facts["name"] for facts in guests) or "none"
    raise ConfigError(f"guest {name!r} does not exist; guests here: {known}")


@main.command()
@click.option("--mode", "chosen", multiple=True, metavar="MODE", help="Only this one; repeatable. [default: all]")
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(64, 1514),
    multiple=True,
    default=(64, 512, 1500),
    show_default=True,
    help="Bytes of a frame without FCS; repeatable.",
)
@click.option(
    "--seconds", type=click.FloatRange(0.05, 60), default=1.0, show_default=True, help="Length of a measurement."
)
@click.option("--repeat", type=click.IntRange(1, 100), default=5, show_default=True, help="Samples of each figure.")
@click.option(
    "--load",
    type=(click.IntRange(1, 10**6), click.IntRange(1, 10**6)),
    default=(1000, 50000),
    show_default=True,
    metavar="LOW HIGH",
    help="Frames a second of the two loads under which round trips are measured.",
)
@click.option("--uml", is_flag=True, help="Measure TCP of a User-Mode Linux guest, too.")
@click.option("--iface", metavar="IF", help="A NIC to serve the guest on, instead of a veth.")
@click.option("--peer", metavar="IF2", help="The interface at that NIC's other end, on this machine, too.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the results as JSON.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page with plots.")
@click.option("--markdown", type=click.Path(path_type=Path), metavar="FILE", help="Write the tables as Markdown.")
def compare(
    chosen: tuple[str, ...],
    sizes: tuple[int, ...],
    seconds: float,
    repeat: int,
    load: tuple[int, int],
    uml: bool,
    iface: str | None,
    peer: str | None,
    json_file: Path | None,
    html: Path | None,
    markdown: Path | None,
) -> None:
    """Measure every way to give a guest a network that this machine has, one after the other.

    All get the same synthetic guest, over a veth in namespaces of its own (or --iface and --peer). Nothing is left of
    them. docs/compare.md says what the figures mean.
    """
    privileges.require("compare", privileges.CLEAN)
    from .compare import command

    command.run(chosen, sizes, seconds, repeat, load, uml, iface, peer, json_file, html, markdown)


@main.command()
@run_dir_option
def down(run_dir: Path) -> None:
    """End the daemon and wait until its interface is as it was."""
    from .rundir import wait_unlocked

    facts = api.call(run_dir, "down")
    if not wait_unlocked(run_dir, DOWN_TIMEOUT):
        raise DaemonError(f"the daemon (pid {facts['pid']}) is still going down after {DOWN_TIMEOUT:g} s; see its log")


@main.command()
@run_dir_option
@json_option
def clean(run_dir: Path, as_json: bool) -> None:
    """Undo what a killed daemon left behind: interface settings, XDP program, sockets.

    Does nothing, successfully, when there is nothing to undo; refuses while a daemon runs.
    """
    privileges.require("clean", privileges.CLEAN)
    from .links.journal import Journal
    from .rundir import RunDir, remove_stale_sockets

    run_dir = config.check_run_dir(run_dir)
    with RunDir(run_dir) as lock:
        lock.adopt()
        undone = Journal(lock.journal).replay_undo()
        sockets = remove_stale_sockets(run_dir)
    facts = [{"what": item.kind, "done": item.ok, "detail": item.detail} for item in undone]
    facts += [{"what": "socket", "done": True, "detail": f"socket {path}: removed"} for path in sockets]
    if as_json:
        _print_json(facts)
    else:
        for fact in facts:
            click.echo(f"{'' if fact['done'] else 'NOT UNDONE: '}{fact['detail']}")
    failed = [item for item in undone if not item.ok]
    if failed:
        raise NicError(
            f"{len(failed)} changes to the interface are not undone: {failed[0].detail}; they stay in "
            f"{lock.journal}, so `xdpvhost clean` can try again"
        )
