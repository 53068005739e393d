# SPDX-License-Identifier: Apache-2.0
"""The lab behind scripts/lab: runs the lab's tests, a command or a shell in a machine of its own (docs/lab.md)."""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from support import machine

NO_TESTS = 5  # pytest's exit status when it found none
OUT = machine.LAB / "out"
WHAT = """test: tests/lab, on every kind of machine unless --machine chooses; what follows goes to pytest. run: one
command. shell: bash on this terminal; leave it with exit."""


def write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def test(kinds: list[machine.Kind], arguments: list[str], out: Path, timeout: float) -> int:
    """pytest on tests/lab, on all kinds of machine at once; each test says on which it runs (tests/lab/conftest.py).

    The first one's output is shown as it comes, the others' when they are done.
    """
    paths = [] if any(Path(a.split("::")[0]).exists() for a in arguments) else ["tests/lab"]
    # Nothing is looked up that the lab's tests don't need: an emulated processor starts Python slowly.
    words = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]

    def one(kind: machine.Kind, output: Callable[[bytes], object]) -> int:
        begin = time.monotonic()
        junit = ["--junitxml", f"/lab/out/junit-{kind.name}.xml"]
        command = shlex.join([".venv/bin/python", "-m", "pytest", *words, *junit, *paths, *arguments])
        output(f"lab: machine {kind.name}\n".encode())
        try:
            status = machine.run(kind, command, out=out, timeout=timeout, output=output)
        except machine.MachineError as error:
            output(f"{error}\n".encode())
            return 1
        output(f"lab: machine {kind.name}: exit status {status} after {time.monotonic() - begin:.0f} s\n".encode())
        if status not in (0, NO_TESTS):
            log = out / f"console-{kind.name}.log"
            end = log.read_text(errors="replace").splitlines()[-60:]
            output("\n".join([f"lab: the end of its console ({log}):", *end, ""]).encode())
        return status

    later: list[list[bytes]] = [[] for _ in kinds[1:]]
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(one, kind, keep.append) for kind, keep in zip(kinds[1:], later, strict=True)]
        statuses = [one(kinds[0], write)]
        for future, keep in zip(running, later, strict=True):
            statuses.append(future.result())
            write(b"".join(keep))
    worst = next((status for status in statuses if status not in (0, NO_TESTS)), 0)
    return worst or min(statuses)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/lab", description=__doc__)
    parser.add_argument(
        "--machine", choices=machine.KINDS, help="full (default), or bare: no IOMMU, no vhost_net, no macvtap"
    )
    parser.add_argument("--without", action="append", default=[], metavar="MODULE", help="a module that is not there")
    parser.add_argument("--no-iommu", action="store_true")
    parser.add_argument("--memory", type=int, metavar="MIB")
    parser.add_argument("--cpus", type=int)
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="of one machine (600; a shell has none)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="what the machine sees as /lab/out (.cache/lab/out)")
    parser.add_argument("what", choices=["test", "run", "shell"], help=WHAT)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…")
    options = parser.parse_args()

    def changed(kind: machine.Kind) -> machine.Kind:
        return replace(
            kind,
            iommu=kind.iommu and not options.no_iommu,
            without=(*kind.without, *options.without),
            memory=options.memory or kind.memory,
            cpus=options.cpus or kind.cpus,
        )

    options.out.mkdir(parents=True, exist_ok=True)
    chosen = changed(machine.KINDS[options.machine or "full"])
    try:
        if options.what == "test":
            kinds = [chosen] if options.machine else [changed(kind) for kind in machine.KINDS.values()]
            return test(kinds, options.arguments, options.out, options.timeout)
        if options.what == "run":
            # One word is a line for the shell, several are a command.
            words = options.arguments
            command = words[0] if len(words) == 1 else shlex.join(words)
            return machine.run(chosen, command, out=options.out, timeout=options.timeout, output=write)
        return machine.run(chosen, "exec bash", out=options.out, timeout=float("inf"), output=None)
    except (machine.MachineError, subprocess.SubprocessError) as error:
        print(f"scripts/lab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
