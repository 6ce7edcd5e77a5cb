"""What goes wrong while a run is built goes wrong by its configuration, whoever notices it."""

from __future__ import annotations

import re
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from pi05_lightning.cli.mistakes import shortened

MISTAKES = (ValueError, TypeError, ImportError, OSError, MisconfigurationException, ArgumentError)


@contextmanager
def mistakes_named(options: Mapping[str, Any] | None = None, likely: Sequence[str] = ()) -> Iterator[None]:
    """Errors that a configuration makes become ValueErrors of a line: what was refused, and the cause alone.

    options: those that it may be about, by their names.  likely: of these, which are given where none is named.
    """
    try:
        yield
    except MISTAKES as error:
        message, options = cause(error), options or {}
        if not any(re.search(rf"\b{name}\b", message) for name in options):
            message += "".join(f"; trainer.{name} is {options[name]}" for name in likely)
        raise ValueError(message) from error


def cause(error: BaseException) -> str:
    """What is behind an error that jsonargparse passed on, with the class that it was about; in one line."""
    about, first = "", error
    while "jsonargparse" in traceback.extract_tb(error.__traceback__)[-1].filename:
        if found := re.match(r"Problem with given class_path '([\w.]+)'", str(error)):
            about = f"{found[1]}: "
        behind = error.__cause__ or error.__context__
        if behind is None:  # of one of several types that the value may have; the first error tells of all
            return about + shortened(str(first))
        error = behind
    return about + " ".join(str(error).split())
