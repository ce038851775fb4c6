"""The files of an analysis: figures with their arrays, tables, and a summary in JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from aig.analysis import figures
from aig.analysis.measures import Arrays
from aig.console import InputError
from aig.runs import atomic_write, read_json, write_json

SUMMARY = "summary.json"
FORMATS = ("png", "pdf", "svg")


@dataclass
class Part:
    """What a part of the analysis found.

    Attributes:
        arrays: of each figure, by its name: the arguments of the function in `figures` that draws it.
        tables: rows of each CSV file, by its name; the first row names the columns.
        numbers: for the summary.
        lines: to print.
    """

    arrays: dict[str, Arrays] = field(default_factory=dict)
    tables: dict[str, list[Sequence[Any]]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def check_vacant(folder: Path, parts: Sequence[str]) -> None:
    """Raises InputError if --out holds results of these parts already."""
    if found := sorted(path.name for path in folder.glob("*.*") if path.stem in parts):
        raise InputError(f"{folder} already holds {', '.join(found)}: choose another --out, or add --overwrite")


def keep(folder: Path, name: str, part: Part, origin: dict[str, Any], form: str) -> None:
    """Writes the figures, arrays, tables and numbers of a part."""
    for figure, arrays in part.arrays.items():
        draw(folder, figure, arrays, form)
    for table, rows in part.tables.items():
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)
        with atomic_write(folder / f"{table}.csv") as file:
            file.write(text.getvalue().encode())
    summary = read_json(folder / SUMMARY)
    write_json(folder / SUMMARY, {**summary, name: {**part.numbers, **origin}})


def draw(folder: Path, name: str, arrays: Arrays, form: str) -> None:
    """Keeps arrays as NAME.npz and draws their figure."""
    for other in FORMATS:  # of an earlier analysis
        (folder / f"{name}.{other}").unlink(missing_ok=True)
    with atomic_write(folder / f"{name}.npz") as file:
        np.savez_compressed(file, **arrays)
    image = io.BytesIO()
    with matplotlib.rc_context(figures.STYLE):
        figures.FIGURES[name](**arrays).savefig(image, format=form)
    with atomic_write(folder / f"{name}.{form}") as file:
        file.write(image.getvalue())
