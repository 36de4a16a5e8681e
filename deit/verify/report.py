"""Tables: rich ones in a terminal, plain text, row by row as it comes, anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from deit.errors import one_line

__all__ = ["Column", "Table", "shown"]

OK, FAILED = "ok", "FAILED"
MOST_FAILURES = 3  # are listed of a row


@dataclass(frozen=True)
class Column:
    """`width` is what plain text reserves; longer entries push the others to the right."""

    title: str
    width: int
    right: bool = True


def shown(value: float | None) -> str:
    """A relative error for a table; a dash for none."""
    return "-" if value is None else f"{value:.1e}"


class Table:
    """A titled table; rows end in a verdict, and failures are listed under it.

        with Table("Layers", [Column("layer", 30, right=False), ...]) as table:
            table.begin("Linear")
            table.row(["Linear", ...], failures=[])

    Attributes:
        failed: number of rows with failures.
        rows: number of rows.
    """

    def __init__(self, title: str, columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
        self.title, self.notes = title, notes
        self.columns = [*columns, Column("", len(FAILED), right=False)]
        self.rows = self.failed = 0
        self.failures: list[str] = []
        self._status = None

    def __enter__(self) -> Table:
        if not sys.stdout.isatty():
            print(f"\n{self.title}\n\n{self._line([c.title for c in self.columns])}", flush=True)
            return self
        from rich.console import Console
        from rich.table import Table as RichTable

        self._console = Console()
        self._rich = RichTable(title=self.title, title_justify="left", title_style="bold")
        for column in self.columns:
            justify = "right" if column.right else "left"
            self._rich.add_column(column.title, justify=justify, overflow="fold")
        self._status = self._console.status(self.title)
        self._status.start()
        return self

    def begin(self, what: str) -> None:
        """Say what is being checked."""
        if self._status is not None:
            self._status.update(f"{self.title}: {what}")

    def row(self, cells: Sequence[str], failures: Sequence[str]) -> None:
        """Add a row; the first cell names it in the list of failures."""
        self.rows += 1
        self.failed += bool(failures)
        self.failures += [f"{cells[0]}: {failure}" for failure in failures[:MOST_FAILURES]]
        if len(failures) > MOST_FAILURES:
            self.failures.append(f"{cells[0]}: and {len(failures) - MOST_FAILURES} more")
        verdict = FAILED if failures else OK
        if self._status is None:
            print(self._line([*cells, verdict]), flush=True)
        else:
            colour = "red" if failures else "green"
            self._rich.add_row(*cells, f"[{colour}]{verdict}[/]")

    def crash(self, what: str, error: Exception) -> None:
        """Add the row of a check that could not be done, which is a failure like others."""
        dashes = ["-"] * (len(self.columns) - 2)
        self.row([what, *dashes], [f"{type(error).__name__}: {one_line(error)}"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()
            self._console.print(self._rich)
        for line in [*self.notes, *(f"{FAILED}: {failure}" for failure in self.failures)]:
            print(line)

    def _line(self, cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(column.width) if column.right else cell.ljust(column.width)
            for cell, column in zip(cells, self.columns, strict=True)
        ]
        return "  ".join(padded).rstrip()
