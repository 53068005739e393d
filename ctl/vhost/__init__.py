# SPDX-License-Identifier: Apache-2.0
"""The vhost-user backend: wire, connection, memory, state machine, endpoint; see docs/vhost-user.md."""
