"""Checkpoints: a folder of safetensors files and one JSON of plain values, written whole or not at all.

`sha256.json` holds the SHA-256 of every other file. There are no pickles.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from knport.errors import KNPortError

Tensors = dict[str, dict[str, Tensor]]  # file name without suffix -> tensor name -> tensor
SUMS = "sha256.json"


class DamagedCheckpoint(KNPortError):
    """A checkpoint of which a file is missing, cut short or changed."""


def write(folder: Path, tensors: Tensors, state: dict[str, Any], *, previous: Path | None = None) -> None:
    """Write `folder` under a temporary name, then rename it; what was there becomes `previous`, or goes.

    A process killed at any moment leaves a complete `folder` or, between the two renames, a complete `previous`. So
    does one that cannot write, which raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, group in tensors.items():
        _save(group, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(state))
    sums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    (partial / SUMS).write_text(json.dumps(sums, indent=1))
    _replace(partial, folder, previous)


def read(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the state of a checkpoint. Raises `DamagedCheckpoint` if any file is not as written."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                raise DamagedCheckpoint(f"{folder / name}: its SHA-256 is not the one in {SUMS}: the file is damaged")
        tensors = {Path(name).stem: load_file(folder / name) for name in sums if name.endswith(".safetensors")}
        return tensors, json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{folder}: {type(error).__name__}: {error}: the checkpoint is damaged") from error


def newest(folders: list[Path]) -> tuple[Path | None, Tensors, dict[str, Any], list[str]]:
    """The first readable checkpoint of `folders`, and a line for each damaged one before it.

    Raises `DamagedCheckpoint` if there are checkpoints and none can be read.
    """
    problems: list[str] = []
    for folder in folders:
        if not folder.exists():
            continue
        try:
            return folder, *read(folder), problems
        except DamagedCheckpoint as error:
            problems.append(str(error))
    if problems:
        raise DamagedCheckpoint("; ".join(problems) + "; delete the run folder to start again")
    return None, {}, {}, problems


def _save(group: dict[str, Tensor], path: Path) -> None:
    # copies: safetensors refuses tensors that share memory, and tied weights do
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in group.items()}
    try:
        save_file(copies, path)
    except SafetensorError as error:  # how it says that the disk is full
        raise OSError(f"{path}: {error}") from error


def _replace(partial: Path, folder: Path, previous: Path | None) -> None:
    old = previous or folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    if previous is None:
        shutil.rmtree(old, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
