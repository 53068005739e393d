# SPDX-License-Identifier: Apache-2.0
"""Metrics: declared in `declared`, read in `samples`, served by `endpoint`, documented by `table`."""
