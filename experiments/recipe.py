"""What a recipe decides, and which of the papers' columns a run belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

from experiments import settings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe decides; each field is the field of `Run` with the same name."""

    batch_size: int
    """Images per optimizer step."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Peak learning rate."""
    scaling: str = "standard"
    """Inputs as pixel / 255 (unit) or with mean and SD removed (standard)."""
    activation: str | None = None
    """In the place of the model's ReLUs; None: the model's own."""
    optimization: settings.OptimizationSettings = field(default_factory=settings.OptimizationSettings)
    """How the loss moves the weights."""
    augmentation: settings.AugmentationSettings = field(default_factory=settings.AugmentationSettings)
    """What happens to an image before the network sees it."""
    segmentation: settings.SegmentationSettings = field(default_factory=settings.SegmentationSettings)
    """What only networks for segmentation need."""
    privacy: settings.PrivacySettings = field(default_factory=settings.PrivacySettings)
    """Training with differential privacy."""


def norm_kind(model: str, norm: str) -> str:
    """Which of the papers' columns a run belongs to: kernel, batch, group or layer.

    `original` is kernel for the hand-built kernel normalized networks (names in kn..., dp_kn... and fcn_kn...), else
    batch. Norms that the papers did not train (instance, none, ...) take the layer column, the most careful one.
    """
    name = model.rsplit("/", 1)[-1].lower()
    if norm == "kernel" or (norm == "original" and name.removeprefix("dp_").removeprefix("fcn_").startswith("kn")):
        return "kernel"
    return {"original": "batch", "batch": "batch", "group": "group"}.get(norm, "layer")
