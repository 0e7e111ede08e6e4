"""Differentially private training (DP-SGD) of kernel normalized networks with Opacus: exact per-sample gradients.

    from knport import privacy

    model = privacy.prepare(knport.convert(model))  # or privacy.prepare(architectures.create_model("knresnet18"))
    engine = opacus.PrivacyEngine()
    model, optimizer, loader = engine.make_private(module=model, optimizer=optimizer, data_loader=loader, ...)

Opacus has no rule for these layers. It would run each a second time, under `torch.func.vmap`, which refuses to draw the
dropout of the statistics again, and rightly: another draw is another function, and its gradient is not that of the
loss. Here every layer keeps the mean and the scale of each unit of its forward pass, and the rules use those.
"""

from knport.privacy.prepare import prepare, register
from knport.privacy.validate import validate

__all__ = ["prepare", "register", "validate"]
