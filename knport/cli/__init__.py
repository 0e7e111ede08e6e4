"""`knport COMMAND` or `python -m knport COMMAND`: plan, convert, summary, check, list.

    knport plan timm/resnet50
    knport convert timm/resnet50 --num-classes 10 --out resnet50-kn
    knport summary resnet50-kn
    knport check timm/resnet50 --image-size 64
    knport list resnet

Errors that a user can mend end with one message and exit code 2; `check` ends with 1 when a promise is broken.
"""

from __future__ import annotations

import os
import sys

from knport.errors import KNPortError, UnknownName

COMMANDS = {
    "plan": "what converting a network would do to every norm and convolution, and why",
    "convert": "convert a network and save it to a folder",
    "summary": "norms, convolutions, parameters, MACs and activations, before and after",
    "check": "test the promises of kernel normalization on a converted network",
    "list": "the networks and norms that can be named",
}


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    if command == "--version":
        from importlib.metadata import version

        print(version("knport"))
        return 0
    try:
        return _run(command, rest)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `knport list | head` has read enough; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KNPortError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(command: str, args: list[str]) -> int:
    if command not in COMMANDS:
        raise UnknownName("command", command, COMMANDS)
    import tyro  # this and torch take their time: not paid by --help

    from knport.cli import commands

    function = getattr(commands, f"{command}_command")
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(function, args=args, prog=f"knport {command}", config=config)


def _usage() -> str:
    lines = ["usage: knport COMMAND [-h] ...", ""]
    lines += [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "A network is timm/NAME, torchvision/NAME, architectures/NAME or a saved folder."])
