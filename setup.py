# SPDX-License-Identifier: Apache-2.0
"""The Python build only calls the native builds: wheel and editable install both carry what scripts/build makes."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNative(build_py):
    def run(self) -> None:
        script = Path(__file__).resolve().parent / "scripts" / "build"
        done = subprocess.run([str(script)], check=False)
        if done.returncode != 0:
            # Not an ordinary exception: an editable install would only warn of that, and go on.
            raise SystemExit(f"{script} failed with status {done.returncode}; its output above says why")
        super().run()


setup(cmdclass={"build_py": BuildWithNative})
