# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost capture`: a port's frames as pcapng, with why they were dropped.

Theory of operation. A port is a guest, or an interface as the guests' frames pass it. The daemon makes a sealed memfd,
publishes it to the workers as the port's capture, and hands its descriptor to the command over the API socket. Workers
copy the port's frames there and never wait (datapath/src/capture.c); the command's process reads them (capread.c),
filters, and writes. They share nothing else, and the capture lasts as long as the command's connection: however one of
the two ends, the kernel tells the other.

    memory.py    the memory that both ends map                        both
    ports.py     who is captured, starting and ending it              daemon
    command.py   the loop: read, write, wait                          command
    libpcap.py   tcpdump expressions                                  command
    pcapng.py    the blocks around the frames; one back into facts    command
    lines.py     a frame in one line, for a terminal                  command
    output.py    a file or pipe that may be full, slow or gone        command
"""
