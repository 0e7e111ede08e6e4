"""A run folder opened again: its network as it was initialized and as it was trained, and its images."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from experiments import checkpoint, data
from experiments.data.images import scale
from experiments.models import build_for
from experiments.randomness import fold
from experiments.run import Run, from_flat
from experiments.tasks import task_of
from experiments.train import start_accelerator
from knport.errors import KNPortError


@dataclass(frozen=True)
class SavedRun:
    """A finished or interrupted run; networks are on the CPU, in the run's memory format, in evaluation mode."""

    folder: Path
    run: Run
    test: Any
    """Its test images, as its recipe reads them."""
    task: Any

    def initial(self) -> nn.Module:
        """The network before the first step."""
        torch.manual_seed(fold(self.run.seed, "init"))
        net = build_for(self.run, self.task.network())
        layout = torch.channels_last if self.run.channels_last else torch.preserve_format
        return net.to(memory_format=layout).eval()

    def trained(self, which: Literal["last", "best"] = "last") -> nn.Module:
        """The network after the last step saved, or with the best score.

        Raises `KNPortError` if there is none, or it is not this run's.
        """
        folder = self.folder / which
        if not folder.is_dir():
            raise KNPortError(f"{folder} does not exist: nothing has been saved yet; let the run go on first")
        tensors, _ = checkpoint.read(folder)
        net = self.initial()
        try:
            net.load_state_dict(tensors["model"])
        except (KeyError, RuntimeError) as error:
            raise KNPortError(f"{folder}: its weights do not fit {self.run.model} {self.run.norm}: {error}") from error
        return net

    def images(self, count: int) -> Tensor:
        """The first `count` test images as float32 (N, C, H, W), scaled as in training.

        Images in files get one size: that of the first to segment, the central square to classify.
        """
        test, count = self.test, min(count, len(self.test))
        if isinstance(test, data.ImageSet):
            raw = test.images[:count]
        else:
            loaded = [test.load(row)[0] for row in range(count)]
            size = self.task.network()["image_size"]
            size = loaded[0].size if self.task.network().get("dense") else (size, size)
            arrays = [np.asarray(ImageOps.fit(image, size, Image.Resampling.BILINEAR)) for image in loaded]
            raw = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        return scale(raw, self.run.scaling, test.mean, test.std).contiguous(memory_format=layout)


def read_run(folder: Path) -> tuple[Run, dict[str, Any]]:
    """What `run.json` of a run folder says: the run, and its result, empty while it has none.

    Raises:
        KNPortError: no such file, or a damaged one.
    """
    path = folder / "run.json"
    if not path.is_file():
        example = "runs/digits/cifar_resnet8-kernel-b32-s0"
        raise KNPortError(f"{path} does not exist; give the folder of a run, e.g. {example}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return from_flat(stored["run"]), stored.get("result") or {}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise KNPortError(f"{path} is damaged: {error}") from error


def open_run(folder: Path, data_dir: str | None = None) -> SavedRun:
    """Read `run.json` of a run folder, and the data set of its recipe.

    Args:
        folder: of the run.
        data_dir: where the data set lies now; None: where it lay.

    Raises:
        KNPortError: no such folder, a damaged file, or no data.
    """
    run, _ = read_run(Path(folder))
    run = run if data_dir is None else run.but(data_dir=data_dir)
    train_set, test_set = data.load(run)
    return SavedRun(Path(folder), run, test_set, task_of(run)(run, train_set, start_accelerator(run)))
