"""What every section of the results' page consists of: charts, tables, and cells that show a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from benchmarks.report_rows import number


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell."""

    text: str
    is_number: bool = False
    heat: int = 0
    """Depth of its background, 0 to 100."""
    is_over: bool = False
    """Struck out: what the table says of a value that does not hold."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; the first cell of a row is its name."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_open: bool = False
    """Shown at once; others open on a click and in print."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is below it. Without charts and tables the page says `empty`."""

    id: str
    title: str
    lead: str
    empty: str
    charts: Sequence[Markup] = ()
    tables: Sequence[Table] = ()
    is_small: bool = False
    """Small multiples, many a line."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    detail: str = ""
    trend: str = ""
    """"better" or "worse" where the number has a good direction."""


@dataclass(slots=True)
class Columns:
    """Heads in the order of first appearance, for rows that do not all have the same keys."""

    names: list[str] = field(default_factory=list)

    def add(self, row: Mapping[str, object]) -> None:
        self.names += [key for key in row if key not in self.names]


def exact(value: object) -> Cell:
    """A value as it is stored, short of digits that no measurement has."""
    if value is None:
        return Cell("")
    if isinstance(value, bool):
        return Cell("yes" if value else "no")
    found = number(value)
    if found is None:
        text = (
            ", ".join(exact(item).text for item in value)
            if isinstance(value, list | tuple)
            else str(value)
        )
        return Cell(text if len(text) <= 300 else f"{text[:297]}...")
    if isinstance(value, int):
        return Cell(f"{value:,}", is_number=True)
    return Cell(f"{found:,.1f}" if abs(found) >= 1e4 else f"{found:.6g}", is_number=True)


def case_table(title: str, cases: Mapping[str, Mapping[str, object]], *, first: str) -> Table:
    """A row a case, a column a key that any of them has."""
    columns = Columns()
    for row in cases.values():
        columns.add(row)
    return Table(
        title,
        [first, *(key.replace("_", " ") for key in columns.names)],
        [
            [Cell(case), *(exact(row.get(key)) for key in columns.names)]
            for case, row in cases.items()
        ],
    )
