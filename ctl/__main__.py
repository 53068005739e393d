# SPDX-License-Identifier: Apache-2.0
"""`python3 -m xdpvhost` is the `xdpvhost` command."""

from .cli import main

if __name__ == "__main__":
    main()
