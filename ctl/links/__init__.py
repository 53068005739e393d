# SPDX-License-Identifier: Apache-2.0
"""Network devices as control prepares them, and the journal that puts them back."""
