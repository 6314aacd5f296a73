"""How a table looks in the terminal: a rule below its head and narrow columns, so that numbers fit into 80."""

from rich.box import SIMPLE_HEAD
from rich.table import Table


def ruled(title: str | None = None) -> Table:
    """A table without rows and columns."""
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
