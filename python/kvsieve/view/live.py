"""Progress of long work: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

__all__ = ["LiveTable", "plain_table"]

_SECONDS_BETWEEN_LINES = 5.0


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under the header in aligned columns; the first column is text, the others are right-aligned."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(cells, widths))]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


class LiveTable:
    """A table whose rows are updated by name while work goes on.

    With `rich` and a terminal the table redraws in place. Otherwise an updated row is printed as one line, at most
    one every five seconds, and always when it is `final`.
    """

    def __init__(self, header: Sequence[str], *, title: str = "", out: TextIO | None = None) -> None:
        self._header = tuple(header)
        self._title = title
        self._out = sys.stdout if out is None else out
        self._rows: dict[str, tuple[str, ...]] = {}
        self._last_line = -_SECONDS_BETWEEN_LINES
        self._live = self._open_live() if self._out.isatty() else None

    def __enter__(self) -> LiveTable:
        if self._live is not None:
            self._live.start()
        elif self._title:
            self._print(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, name: str, *cells: str, final: bool = False) -> None:
        """Sets the row `name`; `cells` fill the header's columns after the first."""
        self._rows[name] = (name, *cells)
        if self._live is not None:
            self._live.update(self._table(), refresh=final)
        elif final or time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            labelled = (f"{cell} {label}" for label, cell in zip(self._header[1:], cells) if cell)
            self._print(f"  {name}: " + ", ".join(labelled))

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)

    def _open_live(self) -> Any:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError:
            return None
        return Live(self._table(), console=Console(file=self._out), refresh_per_second=4)

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(title=self._title or None, title_justify="left")
        for i, label in enumerate(self._header):
            table.add_column(label, justify="right" if i else "left")
        for row in self._rows.values():
            table.add_row(*row)
        return table
