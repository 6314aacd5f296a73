"""Whole numbers of any library: what a user gives for a count, an id or a seed, as an int.

A float is refused even where it is whole: arrays made of it would not hold integers. It checks no range.
"""

import operator
import reprlib
from typing import Any


def whole(name: str, value: Any) -> int:
    """The int that a number of Python, numpy or torch is. ValueError for what is none, as 8.0, by its `name`."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {reprlib.repr(value)}") from None
