"""Gradients of images with flat regions, by how the biases of a stem begin: the evidence for `lecun_init`.

    python -m experiments.flat_images

takes the norm of the gradient of a freshly built network for a single image: random, of one grey, and half random and
half white. The stem's biases begin as they do, or as biases of zero would be after the first step: SD 0.0001. Dropout
is off; with it a flat unit has a mean that varies, and the ratios are smaller.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import architectures
import knport
from experiments.one_command import one_command
from experiments.tried import first_knconv

COLUMNS = ("network", "biases", "image", "gradient")
BIASES = ("as built", "SD 0.0001")
NETWORKS = (
    "kncifar_resnet8x2",
    "kndensenet40_k12",
    "kncifar_convnext",
    "kncifar_convmixer",
    "knvit_test",
    "knconformer_test",
    "convert(cifar_resnet8x2)",
)
SIZE = 32


def flat_images(out: Path = Path("docs/flat_images.csv")) -> None:
    """Write the norms of the gradients to a CSV: one row per network, start and image."""
    with out.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for name in NETWORKS:
            for biases in BIASES:
                for image, norm in gradients(name, biases):
                    table.writerow((name, biases, image, f"{norm:.4g}"))


def gradients(name: str, biases: str) -> Iterator[tuple[str, float]]:
    """Image -> norm of the gradient of all parameters."""
    torch.manual_seed(0)
    model = build(name).train()
    if biases != BIASES[0]:
        _, stem = first_knconv(model)
        nn.init.normal_(stem.bias, std=1e-4)
    for image, x in images().items():
        yield image, gradient_norm(model, x)


def build(name: str) -> nn.Module:
    """A network of `architectures` without dropout, or the converted ``convert(name)``."""
    if name in architectures.list_models():
        return architectures.create_model(name, num_classes=10, low_resolution=True, dropout=0.0)
    original = architectures.create_model(name.removeprefix("convert(").removesuffix(")"), num_classes=10)
    return knport.convert(original, knport.KNConfig(dropout=0.0), example_inputs=torch.zeros(2, 3, SIZE, SIZE))


def images() -> dict[str, Tensor]:
    """Three images (1, 3, H, W)."""
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    half = noise.clone()
    half[..., SIZE // 2 :] = 1.0
    return {"random": noise, "flat": torch.full_like(noise, 0.5), "half flat": half}


def gradient_norm(model: nn.Module, x: Tensor) -> float:
    """Euclidean norm of the gradient of the cross-entropy with class 1."""
    model.zero_grad()
    F.cross_entropy(model(x), torch.ones(len(x), dtype=torch.long)).backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()


def section(path: Path) -> str:
    """Markdown: what the CSV says; empty without it."""
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        norms = {(row["network"], row["biases"], row["image"]): row["gradient"] for row in csv.DictReader(file)}
    lines = [ABOUT, "| network | random | flat | half flat | flat, near 0 | half flat, near 0 |"]
    lines.append("| --- |" + " ---: |" * 5)
    for name in dict.fromkeys(network for network, _, _ in norms):
        cells = [norms[name, BIASES[0], image] for image in ("random", "flat", "half flat")]
        cells += [norms[name, BIASES[1], image] for image in ("flat", "half flat")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines[:1], "", *lines[1:]])


ABOUT = """## Flat images

Where an image is flat a normalized unit is 0, and a stem puts out its bias. If that is next to nothing in every
channel, as biases that began at 0 are after the first steps, the next layer's unit has next to no variance; its
gradient is divided by up to sqrt(eps), and one flat image, or a flat background, outweighs the rest of a batch. So no
KNConv that reads images begins with biases of 0, here or in what `knport.convert` makes, but for `init="published"`.
Norm of the gradient of one image, without dropout (`python -m experiments.flat_images`,
[flat_images.csv](flat_images.csv)); "near 0" is an SD of 0.0001:"""


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(flat_images, "python -m experiments.flat_images")


if __name__ == "__main__":
    sys.exit(main())
