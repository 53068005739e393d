# SPDX-License-Identifier: Apache-2.0
"""What the tests, the demo and the benchmark share: namespaces, processes, guests, the daemon."""
