# SPDX-License-Identifier: Apache-2.0
"""`xdpvhost compare` on the terminal: options checked, progress shown, results shown and written."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

from .. import view
from ..errors import ConfigError
from . import model, modes, table
from .model import Report
from .plan import HIGH, LOW, Plan
from .run import run as measure


def run(
    chosen: tuple[str, ...],
    sizes: tuple[int, ...],
    seconds: float,
    repeat: int,
    load: tuple[int, int],
    uml: bool,
    iface: str | None,
    peer: str | None,
    json_file: Path | None,
    html: Path | None,
    markdown: Path | None,
) -> None:
    """The whole command. Raises XdpvhostError; a Ctrl-C comes out when everything is undone."""
    unknown = [name for name in chosen if name not in modes.NAMES]
    if unknown:
        raise ConfigError(f"--mode {unknown[0]}: there is no such mode; there are {', '.join(modes.NAMES)}")
    for path in (json_file, html, markdown):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: there is no directory {path.absolute().parent}")
    plan = Plan(
        modes=chosen,
        sizes=sizes,
        seconds=seconds,
        repeat=repeat,
        loads={LOW: load[0], HIGH: load[1]},
        uml=uml,
        iface=iface,
        peer=peer,
    )
    plan.check()
    report = _with_progress(plan)
    table.show(report, view.console())
    if json_file is not None:
        json_file.write_bytes(model.to_json(report))
    if markdown is not None:
        markdown.write_text(table.markdown(report))
    if html is not None:
        from .report import render

        html.write_text(render(report))


def _with_progress(plan: Plan) -> Report:
    columns = (*Progress.get_default_columns()[:-1], TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return measure(plan, shlex.join(["xdpvhost", *sys.argv[1:]]), tell)
