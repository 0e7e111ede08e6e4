"""`python -m experiments.benchmarks run | plot | profile | bars`: measure, draw, look inside, compare with the bars.

Errors that a user can mend end with one message and exit code 2.
"""

from __future__ import annotations

import sys
from importlib import import_module

import tyro

COMMANDS = {
    "run": "measure benchmarks and append the rows to the CSV",
    "plot": "draw the pictures of the README and docs from the CSV",
    "profile": "where the step of a layer and of a network goes: convolution, passes over feature maps, maps, the rest",
    "bars": "print the acceptance table from the CSV: figure, bar, met or not",
}
PROG = "python -m experiments.benchmarks"


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help"):
        print(f"usage: {PROG} COMMAND [-h] ...\n")
        print(*(f"  {name:7} {text}" for name, text in COMMANDS.items()), sep="\n")
        return 0
    try:
        from knport.errors import KNPortError, UnknownName

        if command not in COMMANDS:
            raise UnknownName("command", command, COMMANDS)
        function = getattr(import_module(f"experiments.benchmarks.{command}"), command)
        tyro.cli(function, args=rest, prog=f"{PROG} {command}", config=(tyro.conf.OmitArgPrefixes,))
    except KeyboardInterrupt:
        print("interrupted; the rows of finished cases are in the CSV", file=sys.stderr)
        return 130
    except KNPortError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
