# SPDX-License-Identifier: Apache-2.0
"""TCP of a real Linux guest: User-Mode Linux with its virtio_net on a vhost-user socket, or its own driver on a tap.

The guest has no console to talk to: its first process is an iperf3 server, and the network's end is the client of both
directions.
"""

from __future__ import annotations

import json
import lzma
import subprocess
from pathlib import Path

from pyroute2 import IPRoute

from .. import api
from ..errors import DaemonError
from . import cpio
from .model import ModeResult
from .plan import IN, MAC, OUT, TCP, Cpus
from .processes import Child
from .scene import GUEST, Scene
from .world import World

ADDRESS, GUEST_ADDRESS, PREFIX = "192.0.2.1", "192.0.2.2", 24
BOOT = 30.0
MEMORY = "512M"  # TCP's windows grow with memory; with 128 MiB they, and not the path, limit the rate

INIT = r"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs tmp /tmp
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/"$module"; done
/bin/busybox ip link set lo up
/bin/busybox ip link set "$device" up
/bin/busybox ip addr add "$address" dev "$device"
while :; do /bin/iperf3 -s --forceflush; done
"""


ATTEMPTS = 5
NOT_READY = ("reset by peer", "server is busy")  # iperf3's server has not ended the test before


def initramfs(path: Path) -> None:
    """Raises DaemonError where a part of it isn't installed."""
    archive = cpio.Cpio()
    for name in ("proc", "sys", "tmp", "run", "etc"):
        archive.folder(name)
    archive.console()
    archive.file("init", INIT.encode())
    archive.file("bin/busybox", cpio.program("busybox", "busybox-static").read_bytes())
    iperf = cpio.program("iperf3", "iperf3")
    archive.file("bin/iperf3", iperf.read_bytes())
    for library in cpio.libraries(iperf):
        archive.file(str(library).lstrip("/"), library.read_bytes())
    order = []
    for module in cpio.module_files(("virtio_net",)):
        body = module.read_bytes()
        name = module.name.split(".ko")[0] + ".ko"
        archive.file(f"modules/{name}", lzma.decompress(body) if module.suffix == ".xz" else body, 0o644)
        order.append(name)
    archive.file("modules/order", "\n".join(order).encode(), 0o644)
    path.write_bytes(archive.finish())


def device_of(scene: Scene) -> tuple[str, list[str]]:
    """The guest's device, and what its kernel's command line says about it. Raises DaemonError."""
    if scene.mode.device == "vhost-user":
        return "eth0", [f"virtio_uml.device={scene.directory / GUEST}.sock:1"]
    if scene.mode.name in ("tap", "vhost-net"):
        tap = next(guest["device"] for guest in api.call(scene.directory, "guest-list"))
        return "vec0", [f"vec0:transport=tap,ifname={tap},depth=128,gro=1,mac={MAC}"]
    raise DaemonError(f"User-Mode Linux has no device for {scene.mode.title}")


def measure(scene: Scene, world: World, result: ModeResult, cpus: Cpus, image: Path, seconds: float) -> None:
    """Adds a sample of Gb/s for each direction. The scene is one without a synthetic guest. Raises DaemonError."""
    device, words = device_of(scene)
    if device == "vec0":
        result.facts["guest of the TCP figures"] = "User-Mode Linux's own driver on the tap, in place of QEMU"
    uml_dir = scene.directory / "uml"
    uml_dir.mkdir()
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", str(cpio.KERNEL), f"mem={MEMORY}"]
    argv += [f"initrd={image}", "umid=guest", f"uml_dir={uml_dir}/", "root=/dev/ram0", "panic=-1", "con=null"]
    argv += ["con0=null,fd:1", "ssl=null", f"device={device}", f"address={GUEST_ADDRESS}/{PREFIX}", *words]
    with world.net.entered(), IPRoute() as ip:
        ip.addr("add", index=ip.link_lookup(ifname=world.peer)[0], address=ADDRESS, prefixlen=PREFIX)
    with world.host.entered():
        env = {"TMPDIR": "/dev/shm", "HOME": str(uml_dir)}
        guest = Child(argv, scene.directory / "guest.log", cpus=cpus.driver, env=env)
    try:
        guest.wait_line("Server listening", BOOT)
        for way in (OUT, IN):
            result.figure(TCP, way, "Gb/s").add(_iperf(world, way, seconds))
    finally:
        guest.close(0)


def _iperf(world: World, way: str, seconds: float) -> float:
    """Gb/s that arrived."""
    argv = ["iperf3", "-J", "-C", "cubic", "-t", str(max(1, round(seconds))), "-l", "1M", "-c", GUEST_ADDRESS]
    argv += ["-R"] if way == OUT else []
    for _ in range(ATTEMPTS):
        with world.net.entered():
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=seconds + 30)
        if not any(word in done.stdout for word in NOT_READY):
            break
    try:
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9
    except (ValueError, KeyError) as exc:
        raise DaemonError(f"iperf3 {way}: {' '.join(done.stdout.split())[-200:]} {done.stderr.strip()}") from exc
