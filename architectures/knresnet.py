"""KNResNet-18/34/50 (Nasirigerdeh et al., TMLR 2024, Figure 5, in the widths of the authors' released code).

Pre-activation residual networks of kernel normalized convolutions. Kernels are 2 x 2 where a ResNet's are 3 x 3 or
1 x 1, and the pairs around them pad by one and then by none, so that a block keeps the size of its map. Between the
sets a transition convolution (no residual) and a max pool shrink it. A KernelNorm and an activation come before the
average pool. Parameters match those of the ResNets; multiply-accumulates are 2.0 to 2.6 times theirs.

Legend: N images, C channels of a set, I inner channels of its blocks, H x W the map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from architectures.registry import register
from knport import KernelNorm2d, KNConv2d, KNPortError

TOP_LEFT, BOTTOM_RIGHT = ((1, 0), (1, 0)), ((0, 1), (0, 1))  # alternate, so that the map does not drift


class Basic(nn.Module):
    """ReLU, KNConv 2x2 C -> I (the map grows by one), ReLU, KNConv 2x2 I -> C (and shrinks again); plus identity."""

    def __init__(self, channels: int, inner: int, dropout: float):
        super().__init__()
        self.conv1 = KNConv2d(channels, inner, 2, padding=1, dropout=dropout)
        self.conv2 = KNConv2d(inner, channels, 2, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x.relu()).relu())


class Bottleneck(nn.Module):
    """ReLU, KNConv 2x2 C -> I, ReLU, KNConv 3x3 I -> I, ReLU, KNConv 2x2 I -> C; plus identity.

    With ``kernel_size=1`` the outer convolutions are the 1 x 1 ones of a ResNet.
    """

    def __init__(self, channels: int, inner: int, dropout: float, kernel_size: int = 2):
        super().__init__()
        self.conv1 = KNConv2d(channels, inner, kernel_size, padding=kernel_size - 1, dropout=dropout)
        self.conv2 = KNConv2d(inner, inner, 3, padding=1, dropout=dropout)
        self.conv3 = KNConv2d(inner, channels, kernel_size, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.conv2(self.conv1(x.relu()).relu()).relu())


class Transition(nn.Module):
    """ReLU, KNConv, MaxPool 2x2: to the next set's width and half its map."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, kernel_size: int = 2, padding=0):
        super().__init__()
        self.conv = KNConv2d(in_channels, out_channels, kernel_size, padding=padding, dropout=dropout)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x.relu()))


class FinalConv(nn.Module):
    """MaxPool 2x2, ReLU, KNConv 2x2: the last feature map of KNResNet-18 and -34."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float, padding: int):
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = KNConv2d(in_channels, out_channels, 2, padding=padding, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x).relu())


class KNResNet(nn.Module):
    """A kernel normalized residual network.

    Args:
        block: `Basic` or `Bottleneck`.
        widths: C of each of the four sets.
        inner: I of each set's blocks.
        depths: blocks in each set.
        stem: channels of the first convolution, by default those of the first set.
        final: channels of `FinalConv`; None for a network without one, whose last set and last transition then have
            1 x 1 kernels (KNResNet-50).
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: KNConv 3x3 as the stem (32 x 32 images) in place of KNConv 7x7 stride 2 and a max pool.
        dropout: p of every KNConv; the KernelNorm before the pool has min(5 p, 0.25).

    Shape:
        Input (N, in_chans, H, W): 32 x 32 with ``low_resolution``, from about 64 x 64 without. Output
        (N, num_classes).
    """

    def __init__(
        self,
        block: type[nn.Module],
        widths: Sequence[int],
        inner: Sequence[int],
        depths: Sequence[int],
        final: int | None,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.num_classes, self.low_resolution = num_classes, low_resolution
        self.num_features = final or widths[-1]
        self.stem = _stem(in_chans, widths[0], low_resolution, dropout)
        last = {} if final else {"kernel_size": 1}
        # The last map is 4 x 4 from 32 pixels and 8 x 8 (7 x 7 without the padding) from 224.
        third = TOP_LEFT if low_resolution else ((2, 1), (2, 1))
        settings = [{"padding": TOP_LEFT}, {"padding": BOTTOM_RIGHT}, {"padding": third} if final else last]
        self.transitions = nn.ModuleList(
            Transition(widths[i], widths[i + 1], dropout, **setting) for i, setting in enumerate(settings)
        )
        self.sets = nn.ModuleList()
        for i, (channels, hidden, depth) in enumerate(zip(widths, inner, depths, strict=True)):
            setting = last if i == len(widths) - 1 else {}
            self.sets.append(nn.Sequential(*(block(channels, hidden, dropout, **setting) for _ in range(depth))))
        self.final = FinalConv(widths[-1], final, dropout, padding=int(low_resolution)) if final else nn.Identity()
        self.norm = KernelNorm2d(dropout=min(5 * dropout, 0.25))
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal (fan out) convolutions and zero biases, as published."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H', W'), normalized and activated."""
        x = self.stem(x)
        for i, blocks in enumerate(self.sets):
            x = blocks(self.transitions[i - 1](x) if i else x)
        return self.norm(self.final(x)).relu()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))  # (N, C, H, W) -> (N, C)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def _stem(in_chans: int, channels: int, low_resolution: bool, dropout: float) -> nn.Sequential:
    if low_resolution:
        return nn.Sequential(KNConv2d(in_chans, channels, 3, padding=1, dropout=dropout))
    conv = KNConv2d(in_chans, channels, 7, stride=2, padding=3, dropout=dropout)
    return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))


@register
def knresnet18(**kwargs) -> KNResNet:
    """KNResNet-18: 11.69 M parameters, 3.56 G MACs at 224 x 224. ImageNet 71.17 % (TMLR Table 2)."""
    return KNResNet(Basic, (64, 256, 512, 724), (256, 256, 512, 724), (2, 2, 1, 1), 512, **kwargs)


@register
def knresnet34(**kwargs) -> KNResNet:
    """KNResNet-34: 21.79 M parameters, 7.51 G MACs at 224 x 224. ImageNet 74.60 % (TMLR Table 2)."""
    return KNResNet(Basic, (64, 256, 512, 512), (256, 320, 640, 843), (4, 5, 3, 2), 512, **kwargs)


@register
def knresnet50(**kwargs) -> KNResNet:
    """KNResNet-50: 25.56 M parameters, 10.51 G MACs at 224 x 224. ImageNet 76.54 % (TMLR Table 2)."""
    return KNResNet(Bottleneck, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 4, 2), None, **kwargs)


def load_published(model: KNResNet, checkpoint: str | Path | Mapping) -> KNResNet:
    """Load a checkpoint of the authors' release (norm-torch) into `model`, in place, and return the model.

    Args:
        model: the KNResNet of the same depth, classes and resolution.
        checkpoint: the ``.pth`` file, or its state dict; both may be nested under "model" or "state_dict".

    Raises:
        KNPortError: the checkpoint is of another network; the message lists what does not fit.
    """
    where = checkpoint if isinstance(checkpoint, str | Path) else "the checkpoint"
    if isinstance(checkpoint, str | Path):
        if not Path(checkpoint).is_file():
            raise KNPortError(f"{checkpoint}: no such file; expected a checkpoint of the authors' norm-torch release")
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    for nest in ("model", "state_dict"):
        checkpoint = checkpoint.get(nest, checkpoint)
    ours = _published_names(model)
    state = {ours(key): value for key, value in checkpoint.items()}
    expected = model.state_dict()
    wrong = [
        f"{key}: {tuple(state[key].shape) if key in state else 'missing'}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key not in state or state[key].shape != value.shape
    ] + [f"{key}: not in this network" for key in state.keys() - expected.keys()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise KNPortError(
            f"{where} does not fit this network: {'; '.join(wrong[:5])}{more}. Check depth, num_classes and "
            "low_resolution."
        )
    model.load_state_dict(state)
    return model


def _published_names(model: KNResNet):
    """A function from the authors' state-dict keys to ours."""
    names = {"block0": "stem", "conv_block_f": "final"}
    blocks = [f"sets.{i}.{j}" for i, blocks in enumerate(model.sets) for j in range(len(blocks))]
    names |= {f"res_block{k}": block for k, block in enumerate(blocks, start=1)}
    names |= {f"trans_block{k}": f"transitions.{k - 1}" for k in range(1, len(model.transitions) + 1)}

    def ours(key: str) -> str:
        key = re.sub(r"^module\.", "", key).replace(".conv1x1.", ".")
        root, _, rest = key.partition(".")
        return f"{names.get(root, root)}.{rest}"

    return ours
