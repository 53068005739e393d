# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost up --mode vhost-net` and `macvtap` with the kernel's back-end at work, and on a machine that lacks both.

The front-end opens what `up` made, as QEMU does with the arguments of `qemu-args`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.daemon import PROGRAM, Daemon
from support.frames import PacketSocket, udp_frame
from support.machine_net import COUNT, DEADLINE, GUEST, NIC, WIRE, Root, cable_up, wait_carrier
from support.process import wait_for
from support.vhostnet import VhostNet, open_macvtap, open_tap
from xdpvhost.modes import probe

SPEC = f"name=vm1,mac={GUEST}"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Root]:
    made = Root("root", tmp_path)
    with cable_up():
        yield made


@contextmanager
def guest_on(tap: int) -> Iterator[VhostNet]:
    try:
        with VhostNet(tap=tap) as guest:
            guest.up()
            guest.post(64)
            yield guest
    finally:
        os.close(tap)


def exchange(guest: VhostNet, root: Root) -> None:
    """23 frames each way, whole and in order."""
    with PacketSocket(root, WIRE) as wire:
        there = root.mac(WIRE)
        frames = [udp_frame(GUEST, there, number=n, size=60 + n) for n in range(COUNT)]
        wire.send(frames)
        assert [frame for _, frame in guest.receive(COUNT, deadline=DEADLINE)] == frames
        back = [udp_frame(there, GUEST, number=n, size=60 + n) for n in range(COUNT)]
        for frame in back:
            guest.send(frame)
        assert wire.wait_received(GUEST, COUNT, DEADLINE) == back


def devices() -> dict[str, str]:
    """Every network device of the machine with its master's index."""
    return {path.name: os.readlink(path / "master") if (path / "master").exists() else "" for path in NET.iterdir()}


NET = Path("/sys/class/net")


def test_vhost_net(root: Root) -> None:
    before = devices()
    options = ["--mode", "vhost-net", "--pin-vhost", "1"]
    with Daemon(root, iface=NIC, guests=[SPEC], options=options, deadline=60) as daemon:
        wait_carrier(NIC)
        forwarding = NET / NIC / "brport" / "state"
        wait_for(lambda: forwarding.read_text() == "3\n", DEADLINE, "the bridge to forward")
        with guest_on(open_tap("tap-vm1")) as guest:
            exchange(guest, root)
            daemon.wait_connected("vm1")
            wait_for(lambda: daemon.guest("vm1")["vhost_cpus_in_use"] == "1", DEADLINE, "vhost threads on CPU 1")
            facts = daemon.guest("vm1")
            assert facts["vhost_threads"], "vhost has no thread that status knows"
            assert facts["vhost_cpus_asked"] == "1"
        (nic,) = daemon.api("status")["nics"]
        assert nic["facts"]["zero_copy_tx"] in ("on", "off")
        daemon.down(60)
    assert devices() == before


def test_macvtap(root: Root) -> None:
    before = devices()
    with Daemon(root, iface=NIC, guests=[SPEC], options=["--mode", "macvtap"], deadline=60) as daemon:
        wait_carrier(NIC)
        facts = daemon.guest("vm1")
        assert facts["macvtap_mode_in_use"] == "bridge"
        assert Path(facts["node"]).is_char_device()
        with guest_on(open_macvtap("tap-vm1")) as guest:
            exchange(guest, root)
            daemon.wait_connected("vm1")
        daemon.down(60)
    assert devices() == before


def test_features_on_this_machine() -> None:
    found = {feature.name: feature for feature in probe(NIC)}
    for name in ("mode-tap", "mode-vhost-net", "mode-macvtap"):
        assert found[name].supported is True, found[name]


@pytest.mark.machine("bare")
def test_features_name_the_missing_modules() -> None:
    found = {feature.name: feature for feature in probe(NIC)}
    for mode, module in (("mode-vhost-net", "vhost_net"), ("mode-macvtap", "macvtap")):
        assert found[mode].supported is False
        assert f"modprobe {module}" in found[mode].remedy


@pytest.mark.machine("bare")
@pytest.mark.parametrize(("mode", "module"), [("vhost-net", "vhost_net"), ("macvtap", "macvtap")])
def test_up_without_the_module_names_it_and_leaves_nothing(root: Root, mode: str, module: str) -> None:
    before = devices()
    run_dir = root.directory / "run"
    argv = ["up", "--iface", NIC, "--mode", mode, "--guest", SPEC, "--run-dir", str(run_dir), "--metrics", "none"]
    done = root.run(PROGRAM, *argv, check=False, timeout=60)
    assert done.returncode == 3
    assert module in done.stderr
    assert devices() == before
    assert not run_dir.exists() or not list(run_dir.glob("*.sock"))
