# SPDX-License-Identifier: Apache-2.0
"""The Python build only calls the native builds: wheel and editable install both carry what scripts/build makes."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNative(build_py):
    def run(self) -> None:
        subprocess.run([str(Path(__file__).resolve().parent / "scripts" / "build")], check=True)
        super().run()


setup(cmdclass={"build_py": BuildWithNative})
