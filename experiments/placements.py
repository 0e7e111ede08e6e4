"""Trials of where the norms stand and how the networks begin, on a subset of CIFAR-100: the evidence for defaults.

    python -m experiments.placements --data-dir DIR

trains each network below on the same images in the same order, one epoch of 20 classes at batch size 32. One CSV row
per finished run, appended; what is there is not trained again. Most are of the ConvMixer, whose BatchNorms stand behind
the activations and leave every channel without a mean and with variance 1, which no norm of single images does.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor, nn

import architectures
from architectures import cifar_densenet, conformer, knresnet, vit
from architectures.convmixer import KNConvMixer
from architectures.initialization import lecun_init
from architectures.registry import register
from experiments.results import append_rows
from experiments.run import Run, resolve
from experiments.train import train
from knport import KernelNorm2d
from knport.errors import UnknownName

RESULTS = Path("experiments/results/families/trials.csv")
COLUMNS = ("network", "batch_size", "steps", "optimizer", "lr", "seed", "top1", "train_loss", "test_loss", "seconds")
STEPS = 312


class TriedConvMixer(KNConvMixer):
    """kncifar_convmixer with weights scaled by ``gain``, or a patch embedding without normalization."""

    def __init__(self, *, gain: float = 1.0, plain_stem: bool = False, **kwargs):
        super().__init__(130, 4, 5, **kwargs)
        lecun_init(self)  # other draws than those of kncifar_convmixer with the same seed
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= gain
        if plain_stem:
            stem = self.stem[0]
            self.stem[0] = nn.Conv2d(stem.in_channels, stem.out_channels, stem.kernel_size, stem.stride)


class PreActivation(TriedConvMixer):
    """Activation and KNConv in the place of KNConv and activation, as in the KNResNets: sums without activation."""

    residual = False  # whether the pointwise convolution has an identity beside it, too

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem[0](x)
        for block in self.blocks:
            x = x + block.depthwise(block.act1(x))
            x = block.pointwise(block.act2(x)) + (x if self.residual else 0)
        return self.stem[1](self.norm(x))


class ResidualPreActivation(PreActivation):
    residual = True


class NormedBranches(TriedConvMixer):
    """A KernelNorm of every pixel wherever the original has a BatchNorm, in front of KNConvs as they are."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        p = self.blocks[0].depthwise.dropout
        self.norms = nn.ModuleList(KernelNorm2d(dropout=p) for _ in range(2 * len(self.blocks) + 1))

    def forward_features(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        x = next(norms)(self.stem(x))
        for block in self.blocks:
            x = x + next(norms)(block.act1(block.depthwise(x)))
            x = next(norms)(block.act2(block.pointwise(x)))
        return self.norm(x)


def scaled(kind: Callable[..., nn.Module], gain: float) -> Callable[..., nn.Module]:
    """A constructor of the same network with the initial weights of its convolutions times `gain`."""

    def build(**kwargs) -> nn.Module:
        model = kind(**kwargs)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= gain
        return model

    return build


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


ADAMW = {"optimizer": "adamw", "lr": 0.003, "weight_decay": 0.01}
CONFORMER = {"steps": STEPS // 2, "optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}
VIT = {"optimizer": "adamw", "lr": 0.002, "weight_decay": 0.05}
TRIALS: Mapping[str, Trial] = {
    "ConvMixer": Trial("cifar_convmixer"),
    "ConvMixer, LayerNorm": Trial("cifar_convmixer", settings={"norm": "layer"}),
    "KN-ConvMixer": Trial("kncifar_convmixer"),
    "KN-ConvMixer, pre-activation": _tried("pre", PreActivation),
    "KN-ConvMixer, pre-activation, pointwise residual": _tried("residual", ResidualPreActivation),
    "KN-ConvMixer, KernelNorms behind activations": _tried("branches", NormedBranches),
    "KN-ConvMixer, plain stem": _tried("stem", TriedConvMixer, {"scaling": "standard"}, plain_stem=True),
    "KN-ConvMixer, 2 x 2 kernels": _tried("pairs", KNConvMixer, dim=68, depth=4, kernel_size=5, form="2x2"),
    "KN-ConvMixer, initial weights x 0.58": _tried("gain058", TriedConvMixer, gain=0.58),
    "KN-ConvMixer, initial weights x 1.7": _tried("gain17", TriedConvMixer, gain=1.7),
    "ConvMixer, AdamW": Trial("cifar_convmixer", settings=ADAMW),
    "KN-ConvMixer, AdamW": Trial("kncifar_convmixer", settings=ADAMW),
    "KN-ConvMixer, lower learning rate": Trial("kncifar_convmixer", settings={"lr": 0.015}),
    "KN-ConvMixer, higher learning rate": Trial("kncifar_convmixer", settings={"lr": 0.15}),
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
    "DenseNet": Trial("densenet40_k12"),
    "KN-DenseNet": Trial("kndensenet40_k12"),
    "KN-DenseNet, the original's kernels": Trial("kndensenet40_k12_macs"),
    "KN-DenseNet, initial weights x 1.41": _tried("densenet141", scaled(cifar_densenet.kndensenet40_k12, 1.41)),
    "KN-ViT": Trial("knvit_test", settings=VIT),
    "KN-ViT, units of one token": _tried("token", vit.knvit_test, VIT, window=1),
    "KN-ViT, patch embedding over 3 x 3 patches": _tried("patches", vit.knvit_test, VIT, patch_window=3),
    "KN-ViT, plain patch embedding": _tried("embedding", vit.knvit_test, VIT, patch_window=0),
    "KN-Conformer": Trial("knconformer_test", settings=CONFORMER),
    "KN-Conformer, 2 x 2 kernels": _tried("conformer", conformer.knconformer_test, CONFORMER, form="pair"),
    "KN-Conformer, no dropout": Trial("knconformer_test", settings=CONFORMER | {"dropout": 0.0}),
}


def placements(
    only: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    data_dir: str = "data",
    seeds: Sequence[int] = (0,),
    out: Path = RESULTS,
    runs: Path = Path("runs/placements"),
) -> None:
    """Train the networks of `TRIALS` and append what they reach to a CSV.

    Args:
        only: names of trials, as in the table; all if none is given.
        data_dir: folder of CIFAR-100, or its parent.
        seeds: of initialization, order, augmentation and dropout.
        out: the CSV.
        runs: parent of the run folders.

    Raises:
        UnknownName: there is no such trial.
    """
    for name in only:
        if name not in TRIALS:
            raise UnknownName("trial", name, TRIALS)
    for seed in seeds:
        for name in only or TRIALS:
            if (name, str(seed)) in set(finished(out)):
                continue
            run = run_of(name, seed, data_dir, runs)
            append(out, name, run, train(run, quiet=True))
            print(f"{name}, seed {seed}: {list(read(out))[-1]['top1']} %", flush=True)


def run_of(name: str, seed: int, data_dir: str, runs: Path) -> Run:
    """The run of a trial; its network can be built by name from now on."""
    trial = TRIALS[name]
    if trial.model not in architectures.list_models():
        register(constructor(trial))
    settings = {"batch_size": 32, "epochs": 1, "steps": STEPS, "lr": 0.05, "classes": 20, "schedule": "cosine-step"}
    where = runs / f"{trial.model}-{'-'.join(map(str, trial.settings.values()))}-s{seed}"
    options = settings | dict(trial.settings) | {"data_dir": data_dir, "run_dir": str(where)}
    return resolve("cifar100", model=trial.model, seed=seed, **options)


def constructor(trial: Trial) -> Callable[..., nn.Module]:
    """`trial.build` under the trial's name, for images of 32 x 32."""

    def build(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> nn.Module:
        return trial.build(num_classes=num_classes, low_resolution=low_resolution, **kwargs)

    build.__name__ = trial.model
    return build


def finished(path: Path) -> Iterator[tuple[str, str]]:
    """Trial and seed of every row of the CSV."""
    return ((row["network"], row["seed"]) for row in read(path))


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
