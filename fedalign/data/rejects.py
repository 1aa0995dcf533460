"""What happens to a row that cannot be used: one mechanism for every reader.

Without ``skip`` the first bad row stops the reading with a ``DataError`` that names file and line.
With it, every bad row is kept in a list with its reason, and the list travels with the dataset.
Things left out by a stated rule of a source (an empty cell of a published file, say) are noted in
the same list and never stop the reading: what is not used is always counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fedalign.data.records import BadRow
from fedalign.errors import DataError

HINT = (
    "Correct the row, or leave bad rows out, listed: --set data.skip-bad=true (at a site: "
    "skip-bad = true under [data] of trainer.toml)."
)


@dataclass
class Rejects:
    """Collector of rows that were left out."""

    skip: bool = False
    rows: list[BadRow] = field(default_factory=list)

    @contextmanager
    def at(self, source: str) -> Iterator[None]:
        """Run the parsing of one row; a ``DataError`` inside it rejects the row.

        Raises ``DataError`` ("file:line: reason") when bad rows are not skipped.
        """
        try:
            yield
        except DataError as error:
            reason = str(error).removeprefix(f"{source}: ")
            if not self.skip:
                raise DataError(f"{source}: {reason} {HINT}") from None
            self.rows.append(BadRow(source, reason))

    def note(self, source: str, reason: str) -> None:
        """Record something left out by rule; never an error."""
        self.rows.append(BadRow(source, reason))
