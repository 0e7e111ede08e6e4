"""Hand-built networks: kernel normalized ones as published, and the originals that timm and torchvision lack.

    model = architectures.create_model("knresnet18", num_classes=100, low_resolution=True)

One family per file. The same names work in `timm.create_model` once this package is imported.
"""

from architectures import (
    cifar_densenet,
    cifar_resnet,
    conformer,
    conformer_original,
    conformer_parts,
    convmixer,
    convnext,
    convnext_original,
    densenet,
    fcn,
    knresnet,
    knresnet_v1,
    normalized,
    resnet,
    small,
    vit,
    vit_original,
)
from architectures.published import load_published
from architectures.registry import create_model, list_models, original_of

__all__ = [
    "cifar_densenet",
    "cifar_resnet",
    "conformer",
    "conformer_original",
    "conformer_parts",
    "convmixer",
    "convnext",
    "convnext_original",
    "create_model",
    "densenet",
    "fcn",
    "knresnet",
    "knresnet_v1",
    "list_models",
    "load_published",
    "normalized",
    "original_of",
    "resnet",
    "small",
    "vit",
    "vit_original",
]
