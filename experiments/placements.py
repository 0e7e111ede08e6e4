"""Trials of where the norms stand and how the networks begin, on a subset of CIFAR-100: the evidence for defaults.

    python -m experiments.placements --data-dir DIR

trains each network below on the same images in the same order, one epoch of 20 classes at batch size 32, or `--steps`
of them. One CSV row per finished run, appended; what is there is not trained again. Most are of the ConvMixer, whose
BatchNorms stand behind the activations and leave every channel without a mean and with variance 1, which no norm of
single images does.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

import architectures
from architectures import cifar_densenet, conformer, convmixer, knresnet, vit
from architectures.registry import register
from experiments.results import append_rows
from experiments.run import Run, resolve
from experiments.train import train
from experiments.tried import (
    NormedBranches,
    PreActivation,
    ResidualPreActivation,
    changed,
    own_channels,
    plain_stem,
    scale_weights,
    standardize,
    stem,
    zero_biases,
)
from knport import convert
from knport.errors import UnknownName

RESULTS = Path("experiments/results/families/trials.csv")
COLUMNS = ("network", "batch_size", "steps", "optimizer", "lr", "seed", "top1", "train_loss", "test_loss", "seconds")
STEPS = 312


@dataclass(frozen=True)
class Trial:
    """One network, and how it is trained."""

    model: str
    """A name of `architectures`, or the new one of `build`."""
    build: Callable[..., nn.Module] | None = None
    """From num_classes, in_chans and low_resolution; None for a network of `architectures`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Run` in the place of SGD at 0.05."""


def _tried(name: str, kind: Callable[..., nn.Module], settings: Mapping[str, Any] | None = None, **options) -> Trial:
    return Trial(f"kncifar_tried_{name}", functools.partial(kind, **options), settings or {})


ADAMW = {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}  # as in `experiments.families`


def converted_resnet(**kwargs) -> nn.Module:
    return convert(architectures.create_model("cifar_resnet8x2", **kwargs), example_inputs=torch.zeros(2, 3, 32, 32))


KNRESNET, KNDENSENET, CONVERTED = knresnet.kncifar_resnet8x2, cifar_densenet.kndensenet40_k12, converted_resnet
KNCONVMIXER, SMALL_CONVMIXER = convmixer.kncifar_convmixer, {"dim": 130, "depth": 4, "kernel_size": 5}
TRIALS: dict[str, Trial] = {
    "ConvMixer": Trial("cifar_convmixer", settings=ADAMW),
    "ConvMixer, LayerNorm": Trial("cifar_convmixer", settings=ADAMW | {"norm": "layer"}),
    "KN-ConvMixer": Trial("kncifar_convmixer", settings=ADAMW),
    "KN-ConvMixer, pre-activation": _tried("pre", PreActivation, ADAMW, **SMALL_CONVMIXER),
    "KN-ConvMixer, pre-activation, pointwise residual": _tried(
        "residual", ResidualPreActivation, ADAMW, **SMALL_CONVMIXER
    ),
    "KN-ConvMixer, KernelNorms behind activations": _tried("branches", NormedBranches, ADAMW, **SMALL_CONVMIXER),
    "KN-ConvMixer, plain stem": _tried("stem", changed(KNCONVMIXER, plain_stem), ADAMW | {"scaling": "standard"}),
    "KN-ConvMixer, 2 x 2 kernels": _tried(
        "pairs", convmixer.KNConvMixer, ADAMW, **SMALL_CONVMIXER | {"dim": 68, "form": "2x2"}
    ),
    "KN-ConvMixer, patch embedding over 3 x 3 patches": _tried(
        "narrow", changed(KNCONVMIXER, stem(norm_window=(6, 6))), ADAMW
    ),
    "KN-ConvMixer, no dropout": Trial("kncifar_convmixer", settings=ADAMW | {"dropout": 0.0}),
    "KN-ConvMixer, depthwise units of one channel": _tried("own_channels", changed(KNCONVMIXER, own_channels), ADAMW),
    "KN-ConvMixer, standardized weights": _tried("convmixer_ws", changed(KNCONVMIXER, standardize), ADAMW),
    "ResNet": Trial("cifar_resnet8x2"),
    "KNResNet": Trial("kncifar_resnet8x2"),
    "KNResNet, published initial weights": _tried("published", knresnet.kncifar_resnet8x2, init="published"),
    "KNResNet, LeCun weights": _tried("lecun", knresnet.kncifar_resnet8x2, init="lecun"),
    "KNResNet, LeCun weights, lower learning rate": _tried(
        "lecun", knresnet.kncifar_resnet8x2, {"lr": 0.02}, init="lecun"
    ),
    "KNResNet, LeCun weights, higher learning rate": _tried(
        "lecun", knresnet.kncifar_resnet8x2, {"lr": 0.15}, init="lecun"
    ),
    "KNResNet, no dropout in the stem": _tried("resnet_stem", changed(KNRESNET, stem(dropout=0.0))),
    "KNResNet, stem units of 9 x 9": _tried("resnet_wide9", changed(KNRESNET, stem(norm_window=(9, 9)))),
    "KNResNet, stem units of 17 x 17": _tried("resnet_wide17", changed(KNRESNET, stem(norm_window=(17, 17)))),
    "KNResNet, plain stem": _tried("resnet_plain", changed(KNRESNET, plain_stem), {"scaling": "standard"}),
    "KNResNet, standardized weights": _tried("resnet_ws", changed(KNRESNET, standardize)),
    "KNResNet, standardized weights, higher learning rate": _tried(
        "resnet_ws", changed(KNRESNET, standardize), {"lr": 0.15}
    ),
    "KNResNet, no dropout": Trial("kncifar_resnet8x2", settings={"dropout": 0.0}),
    "KNResNet, no dropout, stem units of 9 x 9": _tried(
        "resnet_wide9", changed(KNRESNET, stem(norm_window=(9, 9))), {"dropout": 0.0}
    ),
    "ResNet, converted": _tried("converted", CONVERTED),
    "ResNet, converted, dropout in the stem": _tried("converted_stem", changed(CONVERTED, stem(dropout=0.05))),
    "ResNet, converted, stem units of 9 x 9": _tried("converted_wide9", changed(CONVERTED, stem(norm_window=(9, 9)))),
    "ResNet, converted, dropout in the stem, units of 9 x 9": _tried(
        "converted_both", changed(CONVERTED, stem(norm_window=(9, 9), dropout=0.05))
    ),
    "DenseNet": Trial("densenet40_k12"),
    "KN-DenseNet": Trial("kndensenet40_k12"),
    "KN-DenseNet, the original's kernels": Trial("kndensenet40_k12_macs"),
    "KN-DenseNet, initial weights x 1.41": _tried("densenet141", changed(KNDENSENET, scale_weights(1.41))),
    "KN-DenseNet, initial weights x 2": _tried("densenet2", changed(KNDENSENET, scale_weights(2.0))),
    "KN-DenseNet, no dropout in the stem": _tried("densenet_stem", changed(KNDENSENET, stem(dropout=0.0))),
    "KN-DenseNet, standardized weights": _tried("densenet_ws", changed(KNDENSENET, standardize)),
    "KN-DenseNet, no dropout": Trial("kndensenet40_k12", settings={"dropout": 0.0}),
    "KN-ViT": Trial("knvit_test", settings=ADAMW),
    "KN-ViT, units of one token": _tried("token", vit.knvit_test, ADAMW, window=1, patch_window=1),
    "KN-ViT, patch embedding of single patches": _tried("single", vit.knvit_test, ADAMW, patch_window=1),
    "KN-ViT, patch embedding over 3 x 3 patches": _tried("patches", vit.knvit_test, ADAMW, patch_window=3),
    "KN-ViT, plain patch embedding": _tried("embedding", vit.knvit_test, ADAMW, patch_window=0),
    "KN-ViT, patch embedding over 8 x 8 patches": _tried("patches8", vit.knvit_test, ADAMW, patch_window=8),
    "KN-ViT, plain patch embedding, standardized images": _tried(
        "embedding", vit.knvit_test, ADAMW | {"scaling": "standard"}, patch_window=0
    ),
    "KN-Conformer": Trial("knconformer_test", settings=ADAMW),
    "KN-Conformer, 2 x 2 kernels": _tried("conformer", conformer.knconformer_test, ADAMW, form="pair"),
    "KN-Conformer, standardized weights": _tried(
        "conformer_ws", changed(conformer.knconformer_test, standardize), ADAMW
    ),
    "KN-Conformer, stem units of 9 x 9": _tried(
        "conformer_wide", changed(conformer.knconformer_test, stem(norm_window=(9, 9))), ADAMW
    ),
    "KN-Conformer, no dropout": Trial("knconformer_test", settings=ADAMW | {"dropout": 0.0}),
}


def from_zero(trial: Trial) -> Trial:
    """The same trial of a network whose convolutions begin with biases of zero."""
    kind = trial.build or functools.partial(architectures.create_model, trial.model)
    name = trial.model.removeprefix("kncifar_").removeprefix("tried_")
    return Trial(f"kncifar_tried_{name}_from_zero", changed(kind, zero_biases), trial.settings)


TRIALS |= {
    f"{name}, biases of zero": from_zero(trial)
    for name, trial in TRIALS.items()
    if name.startswith(("KNResNet", "KN-DenseNet", "ResNet, converted")) and "published" not in name
}


def placements(
    only: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    data_dir: str = "data",
    seeds: Sequence[int] = (0,),
    out: Path = RESULTS,
    runs: Path = Path("runs/placements"),
    steps: int = STEPS,
) -> None:
    """Train the networks of `TRIALS` and append what they reach to a CSV.

    Args:
        only: names of trials, as in the table; all if none is given.
        data_dir: folder of CIFAR-100, or its parent.
        seeds: of initialization, order, augmentation and dropout.
        out: the CSV.
        runs: parent of the run folders.
        steps: of each run that does not set its own.

    Raises:
        UnknownName: there is no such trial.
    """
    for name in only:
        if name not in TRIALS:
            raise UnknownName("trial", name, TRIALS)
    for seed in seeds:
        for name in only or TRIALS:
            run = run_of(name, seed, data_dir, runs, steps)
            if (name, str(seed), str(run.steps)) in set(finished(out)):
                continue
            append(out, name, run, train(run, quiet=True))
            print(f"{name}, seed {seed}: {list(read(out))[-1]['top1']} %", flush=True)


def run_of(name: str, seed: int, data_dir: str, runs: Path, steps: int = STEPS) -> Run:
    """The run of a trial; its network can be built by name from now on."""
    trial = TRIALS[name]
    if trial.model not in architectures.list_models():
        register(constructor(trial))
    settings = {"batch_size": 32, "epochs": 1, "steps": steps, "lr": 0.05, "classes": 20, "schedule": "cosine-step"}
    where = runs / f"{trial.model}-{'-'.join(map(str, trial.settings.values()))}-n{steps}-s{seed}"
    options = settings | dict(trial.settings) | {"data_dir": data_dir, "run_dir": str(where)}
    return resolve("cifar100", model=trial.model, seed=seed, **options)


def constructor(trial: Trial) -> Callable[..., nn.Module]:
    """`trial.build` under the trial's name, for images of 32 x 32."""

    def build(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> nn.Module:
        return trial.build(num_classes=num_classes, low_resolution=low_resolution, **kwargs)

    build.__name__ = trial.model
    return build


def finished(path: Path) -> Iterator[tuple[str, str, str]]:
    """Trial, seed and steps of every row of the CSV."""
    return ((row["network"], row["seed"], row["steps"]) for row in read(path))


def read(path: Path) -> Iterator[dict[str, str]]:
    """The rows of the CSV; none where there is no file."""
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            yield from csv.DictReader(file)


def append(path: Path, name: str, run: Run, result: Mapping[str, Any]) -> None:
    """Add one row, and the header to an empty file."""
    setting = name, run.batch_size, result["steps"], run.optimization.optimizer, run.lr, run.seed
    measured = f"{result['top1']:.2f}", f"{result['train_loss']:.4f}", f"{result['test_loss']:.4f}"
    row = dict(zip(COLUMNS, (*setting, *measured, f"{result['seconds']:.0f}"), strict=True))
    append_rows(path, COLUMNS, [row])


if __name__ == "__main__":
    tyro.cli(placements)
