"""The originals of KN-ViT: timm's ViTs, for images of any size."""

from __future__ import annotations

import functools

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from architectures.registry import register
from architectures.vit import patch_and_image
from knport import replace_norm


def build_vit(
    channels: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
    *,
    norm: str = "layer",
    patch_size: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    low_resolution: bool = False,
    drop_path: float = 0.0,
    **kwargs,
) -> VisionTransformer:
    """timm's ViT for images of any size, with another norm.

    Args:
        channels, depth, heads, mlp_ratio, patch_size, img_size, low_resolution, drop_path: as `KNVisionTransformer`.
        norm: "layer", or what `knport.replace_norm` offers for tokens.
        kwargs: timm's, ``num_classes`` and ``in_chans`` among them.
    """
    patch_size, img_size = patch_and_image(patch_size, img_size, low_resolution)
    model = VisionTransformer(
        img_size,
        patch_size,
        embed_dim=channels,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        dynamic_img_size=True,
        drop_path_rate=drop_path,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        **kwargs,
    )
    return model if norm == "layer" else replace_norm(model, norm, inplace=True)


@register
def baseline_vit_test(**kwargs) -> VisionTransformer:
    """timm's test_vit: 0.38 M parameters, 0.09 G MACs at 224 x 224."""
    return build_vit(64, 6, 2, 3.0, **kwargs)


@register
def baseline_vit_tiny(**kwargs) -> VisionTransformer:
    """timm's vit_tiny_patch16_224: 5.72 M parameters, 1.25 G MACs at 224 x 224."""
    return build_vit(192, 12, 3, **kwargs)


@register
def baseline_vit_small(**kwargs) -> VisionTransformer:
    """timm's vit_small_patch16_224: 22.05 M parameters, 4.60 G MACs at 224 x 224."""
    return build_vit(384, 12, 6, **kwargs)


@register
def baseline_vit_base(**kwargs) -> VisionTransformer:
    """timm's vit_base_patch16_224: 86.57 M parameters, 17.56 G MACs at 224 x 224."""
    return build_vit(768, 12, 12, **kwargs)
