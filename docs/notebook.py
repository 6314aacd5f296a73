"""Execute notebooks where they lie, as `make notebook` does: `python docs/notebook.py FILE ...`

What is kept is what a reader sees: outputs and their numbers, no times and nothing of the machine. A cell that fails,
or that says something on stderr (a warning), is named, and the file stays as it was.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

SECONDS = 1200  # a cell may take so long
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def execute(path: Path) -> None:
    """Execute the notebook in an empty folder and write it back. ValueError names the cell that fails or warns."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            config=Config({"KernelManager": {"transport_encryption": "auto"}}),  # or the kernel warns
            kernel_name=_KERNEL["name"],
            timeout=SECONDS,
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        try:
            client.execute()
        except CellExecutionError as problem:
            raise ValueError(f"{path.name}: {_failed(notebook)}: {problem.ename}: {problem.evalue}") from None
    for number, cell in enumerate(notebook.cells):
        told = [output["text"] for output in cell.get("outputs", ()) if output.get("name") == "stderr"]
        if told:
            raise ValueError(f"{path.name}: cell {number} says on stderr: {''.join(told).strip()}")
        cell.metadata.pop("execution", None)
    notebook.metadata = nbformat.from_dict({"kernelspec": _KERNEL, "language_info": {"name": "python"}})
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def _failed(notebook: Any) -> str:
    """The cell that raised, by number and first line."""
    for number, cell in enumerate(notebook.cells):
        if any(output["output_type"] == "error" for output in cell.get("outputs", ())):
            return f"cell {number} ({cell.source.splitlines()[0]})"
    return "a cell"


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            execute(Path(name))
    except ValueError as problem:
        sys.exit(str(problem))
