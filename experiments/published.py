"""Published accuracies, to stand beside ours: same data set, network, norm and batch size only.

Source: Nasirigerdeh, Torkzadehmahani, Rueckert, Kaissis, "Kernel Normalized Convolutional Networks", TMLR 2024, Table 1
(CIFAR-100, all 50,000 training images, 150 epochs, learning rate tuned per cell; mean of three runs).
"""

from __future__ import annotations

SOURCE = "Nasirigerdeh et al., Kernel Normalized Convolutional Networks, TMLR 2024, Table 1"
SETTING = "150 epochs on all 50,000 training images"

BATCH_SIZES = (2, 32, 256)
# CIFAR-100 top-1 in percent at BATCH_SIZES, by network of the paper and kind of norm
TABLE_1 = {
    ("KNResNet-18", "kernel"): (79.10, 79.29, 78.84),
    ("KNResNet-34", "kernel"): (79.28, 79.53, 79.16),
    ("KNResNet-50", "kernel"): (80.24, 80.18, 80.09),
    ("ResNet-18", "batch"): (72.11, 78.52, 77.72),
    ("ResNet-34", "batch"): (73.06, 79.21, 78.27),
    ("ResNet-50", "batch"): (71.02, 80.39, 77.89),
    ("PreactResNet-18", "batch"): (72.57, 78.32, 77.83),
    ("PreactResNet-34", "batch"): (72.20, 79.09, 78.59),
    ("PreactResNet-50", "batch"): (70.83, 80.28, 78.88),
    ("ResNet-18", "group"): (74.62, 74.46, 74.46),
    ("ResNet-34", "group"): (75.76, 75.72, 75.44),
    ("ResNet-50", "group"): (77.03, 77.02, 74.79),
    ("PreactResNet-18", "group"): (74.82, 74.74, 74.62),
    ("PreactResNet-34", "group"): (75.82, 75.85, 75.76),
    ("PreactResNet-50", "group"): (75.67, 76.08, 75.52),
    ("ResNet-18", "layer"): (72.68, 73.17, 71.99),
    ("ResNet-34", "layer"): (73.74, 73.88, 72.48),
    ("ResNet-50", "layer"): (75.83, 75.74, 74.37),
    ("PreactResNet-18", "layer"): (73.51, 73.36, 72.91),
    ("PreactResNet-34", "layer"): (74.79, 74.34, 73.10),
    ("PreactResNet-50", "layer"): (74.28, 74.57, 73.41),
}
NAMES = {
    **{f"knresnet{depth}": f"KNResNet-{depth}" for depth in (18, 34, 50)},
    **{f"{zoo}resnet{depth}": f"ResNet-{depth}" for zoo in ("", "torchvision/", "timm/") for depth in (18, 34, 50)},
    **{f"{zoo}resnetv2_{depth}": f"PreactResNet-{depth}" for zoo in ("", "timm/") for depth in (18, 34, 50)},
}


def published(recipe: str, model: str, family: str, batch_size: int, classes: int | None = None) -> float | None:
    """The paper's top-1 in percent for our cell, None where the paper has no such cell.

    Args:
        recipe: only ``"cifar100"`` has published cells so far.
        model: our name; a network ported by `knport.convert` is not one of the paper's.
        family: the kind of norm in the network, as `experiments.cost.norm_family` says.
        batch_size: images per step.
        classes: of our run; accuracies on a part of the classes have no published counterpart.
    """
    if recipe != "cifar100" or batch_size not in BATCH_SIZES or classes not in (None, 100):
        return None
    cells = TABLE_1.get((NAMES.get(model, ""), family))
    return cells[BATCH_SIZES.index(batch_size)] if cells else None
