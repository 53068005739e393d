# SPDX-License-Identifier: Apache-2.0
"""The data plane's fuzzers: every file of their corpora, a few seconds of new inputs each, and a short race."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "datapath" / "fuzz"
TARGETS = sorted(source.stem for source in FUZZ.glob("fuzz_*.c"))
SECONDS = int(os.environ.get("XDPVHOST_FUZZ_SECONDS", "5"))  # a target; more of them in a nightly run

Run = Callable[..., None]


@pytest.fixture(scope="session")
def fuzz_build() -> Path:
    command = ["make", "-s", f"-j{os.cpu_count() or 1}", "-C", FUZZ, "all"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return FUZZ / "build"


@pytest.fixture
def run(fuzz_build: Path, tmp_path: Path) -> Run:
    """Run one of the programs; what it found to be wrong, with the input that shows it, is in the failure's text."""

    def run_it(name: str, *args: str | Path) -> None:
        command = [str(fuzz_build / name), *map(str, args)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
        found = [f"{path.name}: {path.read_bytes().hex()}" for path in tmp_path.glob("*-*") if path.is_file()]
        assert done.returncode == 0, "\n".join([" ".join(command), done.stdout[-2000:], done.stderr[-8000:], *found])

    return run_it


@pytest.mark.parametrize("target", TARGETS)
def test_corpus(run: Run, target: str) -> None:
    corpus = sorted((FUZZ / "corpus" / target).iterdir())
    assert corpus
    run(target, *corpus)  # given files, not a directory, libFuzzer only runs them


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.timeout(120 + SECONDS)
def test_new_inputs(run: Run, tmp_path: Path, target: str) -> None:
    new = tmp_path / "new"
    new.mkdir()
    # what is found goes to the first directory, so the corpus stays as it is
    run(target, f"-max_total_time={SECONDS}", "-max_len=512", "-timeout=20", new, FUZZ / "corpus" / target)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("probe", "turns"), [("race", 5000), ("race_packed", 2000)])
def test_race(run: Run, probe: str, turns: int, seed: int) -> None:
    """Few turns: where both threads share a busy CPU, each takes as long as the scheduler lets it."""
    run(probe, str(turns), str(seed))
