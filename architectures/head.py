"""The classifier as timm's networks offer it: `get_classifier` and `reset_classifier`, one mix-in for all families."""

from __future__ import annotations

from torch import nn


class ClassifierHead:
    """Mix-in for networks whose last layer is the sub-module `classifier_path`, of `num_features` inputs."""

    classifier_path = "fc"
    num_features: int
    num_classes: int

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.classifier_path)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh last layer for `num_classes` in place; 0 for none. The pooling stays whatever is asked for."""
        like = next(self.parameters())
        new = self.new_classifier(num_classes)
        self.set_submodule(self.classifier_path, new.to(device=like.device, dtype=like.dtype).train(self.training))
        self.num_classes = num_classes

    def new_classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
