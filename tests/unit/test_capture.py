# SPDX-License-Identifier: Apache-2.0
"""What of `xdpvhost capture` needs neither root nor a port: filters, blocks, lines, and both ends in one process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy.utils import PcapNgReader

from xdpvhost.capture import lines, output, pcapng
from xdpvhost.capture.libpcap import Filter
from xdpvhost.capture.memory import PAGE, CaptureMemory
from xdpvhost.capture.output import Gone, Output
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
