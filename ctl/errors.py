# SPDX-License-Identifier: Apache-2.0
"""The family of errors that a user may see.

A message is one sentence (or two): the object, the cause, the remedy. `exit_code` is what the command line returns for
it, and is documented in `xdpvhost --help`. Anything outside this family is a bug and is shown with its traceback.
"""

from __future__ import annotations


class XdpvhostError(Exception):
    """Base of every error with a message for the user."""

    exit_code = 1


class ConfigError(XdpvhostError):
    """A bad guest SPEC, option value, or a request that contradicts the configuration."""

    exit_code = 2


class NicError(XdpvhostError):
    """The interface, its XDP program or its AF_XDP sockets."""

    exit_code = 3


class PrivilegeError(XdpvhostError):
    """A capability that the command needs is missing; the message names it."""

    exit_code = 4


class DatapathError(XdpvhostError):
    """The native library refused; `errno` is its positive error number, 0 if it has none."""

    exit_code = 5

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class DaemonError(XdpvhostError):
    """No daemon where one is needed, one where none may be, or a refused API request."""

    exit_code = 6


class SilentError(DaemonError):
    """The daemon is there and does not answer."""


class OutputError(XdpvhostError):
    """A file or pipe that the command writes to took no more: a full disk, an input/output error."""

    exit_code = 7
