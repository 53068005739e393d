# SPDX-License-Identifier: Apache-2.0
"""xdpvhost: virtual machines on a NIC that stays the kernel's, by XDP, AF_XDP and vhost-user."""

__version__ = "0.1.0"
