"""Tables of text, row by row as it comes; verdicts are coloured in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.text import Text

from deit.errors import one_line

__all__ = ["Column", "Table", "shown"]

OK, FAILED = "ok", "FAILED"
MOST_FAILURES = 3  # are listed of a row


@dataclass(frozen=True)
class Column:
    """`width` is what is reserved; longer entries push the others to the right."""

    title: str
    width: int
    right: bool = True

    def pad(self, cell: str) -> str:
        return cell.rjust(self.width) if self.right else cell.ljust(self.width)


def shown(value: float | None) -> str:
    """A relative error for a table; a dash for none."""
    return "-" if value is None else f"{value:.1e}"


class Table:
    """A titled table; rows end in a verdict, and failures are listed under it.

        with Table("Layers", [Column("layer", 30, right=False), ...]) as table:
            table.row(["Linear", ...], failures=[])

    Attributes:
        failed: number of rows with failures.
        rows: number of rows.
    """

    def __init__(self, title: str, columns: Sequence[Column], notes: Sequence[str] = ()) -> None:
        self.title, self.columns, self.notes = title, columns, notes
        self.rows = self.failed = 0
        self.failures: list[str] = []
        self._console = Console(highlight=False)

    def __enter__(self) -> Table:
        titles = self._line([column.title for column in self.columns])
        self._print(f"\n{self.title}\n\n{titles.rstrip()}")
        return self

    def row(self, cells: Sequence[str], failures: Sequence[str]) -> None:
        """Add a row; the first cell names it in the list of failures."""
        self.rows += 1
        self.failed += bool(failures)
        self.failures += [f"{cells[0]}: {failure}" for failure in failures[:MOST_FAILURES]]
        if len(failures) > MOST_FAILURES:
            self.failures.append(f"{cells[0]}: and {len(failures) - MOST_FAILURES} more")
        verdict = (FAILED, "red") if failures else (OK, "green")
        self._print(Text.assemble(self._line(cells), "  ", verdict))

    def crash(self, what: str, error: Exception) -> None:
        """Add the row of a check that could not be done, which is a failure like others."""
        dashes = ["-"] * (len(self.columns) - 1)
        self.row([what, *dashes], [f"{type(error).__name__}: {one_line(error)}"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for line in [*self.notes, *(f"{FAILED}: {failure}" for failure in self.failures)]:
            self._print(line)

    def _line(self, cells: Sequence[str]) -> str:
        return "  ".join(c.pad(cell) for c, cell in zip(self.columns, cells, strict=True))

    def _print(self, text: str | Text) -> None:
        # soft_wrap: a pipe or a file can take a line whole
        self._console.print(text, soft_wrap=True, markup=False)
