# SPDX-License-Identifier: Apache-2.0
"""What of `xdpvhost capture` needs neither root nor a port: filters, blocks, lines, and both ends in one process."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import io
import os
import signal
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from scapy.utils import PcapNgReader

from xdpvhost import api
from xdpvhost.capture import command, lines, output, pcapng
from xdpvhost.capture.command import Wishes
from xdpvhost.capture.libpcap import Filter
from xdpvhost.capture.memory import PAGE, CaptureMemory
from xdpvhost.capture.output import Gone, Output
from xdpvhost.capture.ports import Captures, PortCapture
from xdpvhost.datapath import CAPTURE_IN, CAPTURE_LEAST, CapreadConf, Capture, CaptureReader
from xdpvhost.errors import ConfigError, DatapathError, OutputError, XdpvhostError


def test_the_memory_can_not_be_taken_away() -> None:
    memory, fd = CaptureMemory.make(CAPTURE_LEAST)
    with memory, os.fdopen(fd, "rb+", buffering=0):
        assert memory.size == PAGE + CAPTURE_LEAST
        for size in (0, memory.size - 1, memory.size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert os.fstat(fd).st_blocks * 512 >= memory.size


def test_both_ends_of_one_memory() -> None:
    """The command maps what the daemon made; nothing written, nothing read, and the end is seen."""
    memory, fd = CaptureMemory.make(CAPTURE_LEAST)
    with memory, Capture(memory.address, memory.size, 96) as capture, CaptureMemory(fd) as again:
        os.close(fd)
        conf = CapreadConf(memory=again.address, size=again.size, directions=CAPTURE_IN)
        with CaptureReader(conf) as reader:
            buffer = (ctypes.c_char * 70000)()
            assert reader.blocks(buffer, 1) == 0
            assert not reader.ended
            capture.end()
            assert reader.ended


def test_a_reader_of_another_version_is_refused() -> None:
    memory, fd = CaptureMemory.make(CAPTURE_LEAST)
    os.close(fd)
    with memory, pytest.raises(DatapathError) as caught:
        CaptureReader(CapreadConf(memory=memory.address, size=memory.size))
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize(
    ("expression", "words"),
    [("udp and and", "syntax error"), ("port nosuchport", "port"), ("host 1.2.3.4.5", "filter 'host 1.2.3.4.5'")],
)
def test_a_filter_that_does_not_compile(expression: str, words: str) -> None:
    with pytest.raises(ConfigError, match="`man pcap-filter` has the syntax") as caught:
        Filter(expression)
    assert words in str(caught.value)


def test_a_filter_runs_as_libpcap_would() -> None:
    run = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint)
    arp = bytes(12) + b"\x08\x06" + bytes(46)
    with Filter("arp") as program:
        assert run(program.function)(program.program, arp, len(arp), len(arp))
        assert not run(program.function)(program.program, bytes(60), 60, 60)
        program.close()
        program.close()


def test_without_libpcap(monkeypatch: pytest.MonkeyPatch) -> None:
    from xdpvhost.capture import libpcap

    monkeypatch.setattr(libpcap, "LIBRARIES", ("libnosuchpcap.so",))
    libpcap.library.cache_clear()
    with pytest.raises(XdpvhostError, match=r"apt install libpcap0\.8"):
        Filter("arp")


def epb(data: bytes, flags: int, comment: str = "", time: int = 1_700_000_000_123_456_789) -> bytes:
    body = struct.pack("=IIIII", 0, time >> 32, time & 0xFFFFFFFF, len(data), len(data)) + data + bytes(-len(data) % 4)
    body += struct.pack("=HHI", 2, 4, flags)
    if comment:
        body += struct.pack("=HH", 1, len(comment)) + comment.encode() + bytes(-len(comment) % 4)
    body += bytes(4)
    length = struct.pack("=I", len(body) + 12)
    return struct.pack("=I", pcapng.EPB) + length + body + length


def test_blocks_are_what_others_read() -> None:
    data = pcapng.section_header() + pcapng.interface("vm1", "guest 'vm1'", 96, "arp")
    data += epb(bytes(14), 1, "dropped: vlan") + pcapng.statistics(1, 2, 3, 4, 5)
    with PcapNgReader(io.BytesIO(data)) as reader:  # type: ignore[no-untyped-call]
        (packet,) = list(reader)
    assert list(packet.comments) == [b"dropped: vlan"]
    assert packet.sniffed_on == "vm1"
    assert float(packet.time) == pytest.approx(1_700_000_000.123456789)
    for cut in range(1, 60):
        assert pcapng.whole(memoryview(data)[:-cut]) in range(len(data) - cut - 200, len(data) - cut)
    assert pcapng.whole(memoryview(data)) == len(data)


@pytest.mark.parametrize(
    ("header", "flags", "comment", "words"),
    [
        ("0800", 1, "", "In  {a} > {b}, IPv4 (0x0800), length 60"),
        ("81000005" + "0806", 2, "dropped: vlan", "Out {a} > {b}, vlan 5, ARP (0x0806), length 64, dropped: vlan"),
        ("88a80007" + "81006005" + "86dd", 2, "", "Out {a} > {b}, service vlan 7, vlan 5, IPv6 (0x86dd), length 68"),
        ("0026", 1, "", "In  {a} > {b}, LLC, length 60"),
        ("88b5", 1, "", "In  {a} > {b}, type (0x88b5), length 60"),
    ],
)
def test_a_frame_in_a_line(header: str, flags: int, comment: str, words: str) -> None:
    data = bytes.fromhex("ffffffffffff525400000001" + header).ljust(58 + len(header) // 2, b"\0")
    (packet,) = pcapng.packets(memoryview(epb(data, flags, comment)))
    time, _, rest = lines.line(packet).partition(" ")
    assert time.endswith(":20.123456")
    assert rest == words.format(a="52:54:00:00:00:01", b="ff:ff:ff:ff:ff:ff")


@pytest.mark.parametrize("length", range(15))
def test_a_frame_that_is_none_in_a_line(length: int) -> None:
    (packet,) = pcapng.packets(memoryview(epb(bytes(length), 2, "dropped: runt")))
    assert lines.line(packet).endswith(f"length {length}, dropped: runt")


def test_a_slow_pipe_is_waited_for_and_given_up_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "STALLED", 0.01)
    ours, theirs = os.pipe()
    stop: list[int] = []
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "wb", buffering=0):
        sink = Output(f"/dev/fd/{theirs}", lambda: bool(stop))
        sink.write(memoryview(bytes(4096)))
        stop.append(1)
        with pytest.raises(Gone):
            sink.write(memoryview(bytes(1 << 20)))
        sink.close()


def test_a_new_file_is_its_owners_only(tmp_path: Path) -> None:
    with Output(str(tmp_path / "x"), lambda: False) as sink:
        sink.write(memoryview(b"x"))
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("reads", [False, True])
def test_a_named_pipe_is_waited_for_and_given_up(tmp_path: Path, reads: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK) if reads and len(asked) == 2 else -1)
        return len(asked) == 5

    if not reads:
        with pytest.raises(Gone):
            Output(str(path), stop)
        assert path.is_fifo()
        return
    with Output(str(path), stop) as sink:
        assert len(asked) == 3
        sink.write(memoryview(b"block"))
        assert os.read(asked[2], 10) == b"block"
        os.close(asked[2])
        with pytest.raises(Gone):
            sink.write(memoryview(b"block"))


def test_a_file_is_what_it_was_until_there_is_a_block(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"an earlier capture")
    for path in (old, new):
        with pytest.raises(ConfigError, match="no such guest"), Output(str(path), lambda: False):
            raise ConfigError("no such guest")
    assert old.read_bytes() == b"an earlier capture"
    assert not new.exists()
    with Output(str(old), lambda: False) as sink:
        sink.write(memoryview(b"x"))
    assert old.read_bytes() == b"x"


def test_the_output_is_opened_before_anything_is_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that is asked would copy frames into a buffer that nobody reads."""
    monkeypatch.setattr(api, "Session", lambda _: pytest.fail("the daemon was asked"))
    with pytest.raises(ConfigError, match="cannot write /no/such/x: No such file or directory"):
        command.run(tmp_path, Wishes("vm1", "/no/such/x"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    command.run(tmp_path, Wishes("vm1", str(pipe)))  # returns, without a reader
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before


async def test_captures_that_begin_have_their_memory_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that begin at once do not get more than there is for all."""
    known: dict[int, PortCapture] = {}
    guests = {name: SimpleNamespace(name=name) for name in ("vm1", "vm2")}
    switch = SimpleNamespace(guests=guests, nics=[], captured=lambda port: known.setdefault(id(port), PortCapture()))
    captures = Captures(switch, threading.Lock())  # type: ignore[arg-type]
    begun, go_on = threading.Event(), threading.Event()

    def make(_size: int) -> NoReturn:
        begun.set()
        go_on.wait(10)
        raise XdpvhostError("no memory")

    monkeypatch.setattr(CaptureMemory, "make", make)
    wanted = {"snaplen": 64, "pid": 1}
    first = asyncio.create_task(captures.start({"port": "vm1", "buffer": 1 << 29, **wanted}))
    await asyncio.to_thread(begun.wait, 10)
    with pytest.raises(ConfigError) as caught:
        await captures.start({"port": "vm2", "buffer": 1 << 30, **wanted})
    assert "guest 'vm2': no 1024 MiB for its capture: all of them may have 1024 MiB" in str(caught.value)
    assert "there are guest 'vm1' (about to begin) with 512 MiB; give a smaller --buffer" in str(caught.value)
    go_on.set()
    with pytest.raises(XdpvhostError, match="no memory"):
        await first
    with pytest.raises(XdpvhostError, match="no memory"):  # there is room again
        await captures.start({"port": "vm2", "buffer": 1 << 30, **wanted})


def test_a_full_file_is_cut_to_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes a part of a block, then nothing."""
    block = epb(bytes(1000), 1)
    room = [2 * len(block) + 100]
    real: Callable[[int, memoryview], int] = os.write

    def write(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(output.os, "write", write)
    path = tmp_path / "x"
    with pytest.raises(OutputError, match="No space left on device"), Output(str(path), lambda: False) as sink:
        sink.write(memoryview(block * 4))
    assert path.read_bytes() == 2 * block
