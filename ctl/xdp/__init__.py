# SPDX-License-Identifier: Apache-2.0
"""The kernel plane: the XDP program, its maps, and AF_XDP sockets, through libbpf and libxdp."""
