"""`python -m experiments COMMAND`: train, compare, demo, privacy, report, list.

    accelerate launch -m experiments train cifar100 --model knresnet18 --batch-size 32 --data-dir data
    accelerate launch --multi_gpu --num_processes 2 -m experiments train ...      two processes, on CPUs too

Errors that a user can mend end with one message and exit code 2.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib import import_module

import tyro

COMMANDS = {
    "train": "train a model by a recipe, or go on with a run that was interrupted",
    "compare": "run a grid of models, norms, batch sizes and seeds, and report it",
    "demo": "compare three norms on the embedded digits in a few minutes",
    "families": "compare all six families of networks with their rivals at batch sizes 2, 8 and 32",
    "privacy": "private training of the embedded digits: accuracy by epsilon, and membership inference",
    "search-lr": "the papers' search: a learning rate, halved until it gets no better",
    "validate": "measure a run's weights, or a model of knport.save, on the test images again",
    "submit": "send a grid of runs to Slurm as one array of jobs",
    "report": "write report.html, report.md and results.csv: of folders of runs, or of all that is committed",
    "activations": "the scale of activations by stage, before and after training, of run folders",
    "predictions": "what a segmentation run sees, as colour images",
    "sweep": "convert every network of torchvision and timm's families, and check the promises",
    "list": "recipes, norms, models, and the papers' tables as commands",
}
PROG = "python -m experiments"
RUN_DIR = ("--run-dir", "--run_dir")


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        _run(command, rest)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except ValueError as error:
        from knport.errors import KNPortError  # importing knport imports torch: not paid by --help

        if not isinstance(error, KNPortError):
            raise
        notes = getattr(error, "__notes__", [])  # of what one process met alone
        if notes or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", *notes, file=sys.stderr)
        return 2
    return 0


def _run(command: str, args: list[str]) -> None:
    if command == "train":
        _train(args)
    elif command == "list":
        _list(args)
    elif command in COMMANDS:
        name = command.replace("-", "_")
        function = getattr(import_module(f"experiments.{name}"), name)
        tyro.cli(function, args=args, prog=f"{PROG} {command}", config=(tyro.conf.OmitArgPrefixes,))
    else:
        from knport.errors import UnknownName

        raise UnknownName("command", command, COMMANDS)


def _train(args: list[str]) -> None:
    """Parsed twice: first for what the recipe depends on, then with the recipe's values as defaults (and in --help)."""
    from experiments.run import Run, resolve

    def parse(default: Run, args: list[str]) -> Run:
        return tyro.cli(Run, default=default, args=args, prog=f"{PROG} train", config=(tyro.conf.OmitArgPrefixes,))

    asked = parse(Run(batch_size=0), [arg for arg in args if arg not in ("-h", "--help")])
    keys = {"model": asked.model, "norm": asked.norm, "batch_size": asked.batch_size or None, "seed": asked.seed}
    default = resolve(asked.recipe, **keys)
    run = parse(default, args)
    if run.run_dir == default.run_dir and not any(arg.split("=")[0] in RUN_DIR for arg in args):
        run = replace(run, run_dir="")  # the default follows from all settings, not only from those above

    from experiments.train import train

    train(run)


def _list(args: list[str]) -> None:
    """Print what can be named, and the papers' tables as commands, where it contains the given text."""

    def parse(*words: tyro.conf.Positional[str]) -> tuple[str, ...]:
        """Print recipes, norms, models, and the rows of the papers' tables with the commands that run them.

        Args:
            words: recipes, norms, models or tables for these alone; other words for what contains them all.
        """
        return words

    from experiments.listing import listing

    print(listing(tyro.cli(parse, args=args, prog=f"{PROG} list")))


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND [-h] ...", ""]
    return "\n".join(lines + [f"  {name:11} {text}" for name, text in COMMANDS.items()])


if __name__ == "__main__":
    sys.exit(main())
