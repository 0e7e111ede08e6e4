"""The command line of a script with one function."""

from __future__ import annotations

import sys
from collections.abc import Callable

import tyro

from knport.errors import KNPortError


def one_command(function: Callable[..., object], prog: str) -> int:
    """Call `function` with what the command line says; the exit code. An error is one line and exit code 2."""
    try:
        tyro.cli(function, prog=prog)
    except KNPortError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
