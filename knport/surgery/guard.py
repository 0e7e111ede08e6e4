"""Models that must be converted before something else was done to them."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from knport.errors import AlreadyWrapped, KNPortError, UnsupportedModule

_WRAPPERS = {  # class name -> what to run first
    "DistributedDataParallel": "model = model.module",
    "DataParallel": "model = model.module",
    "FullyShardedDataParallel": "convert the bare model before FullyShardedDataParallel(model)",
    "FSDPModule": "convert the bare model before fully_shard(model)",
    "OptimizedModule": "model = model._orig_mod",
    "ScriptModule": "convert the Python model before torch.jit.script(model)",
    "DeepSpeedEngine": "model = model.module",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `AlreadyWrapped` when the model, or a part of it, is wrapped, compiled or prepared."""
    if not isinstance(model, nn.Module):
        raise KNPortError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        where = path or "the model"
        for cls in type(module).__mro__:
            if cls.__name__ in _WRAPPERS and cls.__module__.startswith(("torch", "deepspeed")):
                raise AlreadyWrapped(f"{where} is wrapped in {cls.__name__}; run this first: {_WRAPPERS[cls.__name__]}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise AlreadyWrapped(f"{where} is compiled; convert it before model.compile()")
        if hasattr(module, "_hf_hook"):
            line = "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            raise AlreadyWrapped(f"{where} has hooks of accelerate; run this first: {line}")
        if hasattr(module, "_original_forward"):
            line = "model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            raise AlreadyWrapped(f"{where} was prepared by accelerate; run this first: {line}")
        _refuse_foreign_forward(path, module)
    if any(is_lazy(p) for p in model.parameters()):
        raise KNPortError("the model has lazy parameters; run one forward pass first, so that they get their shapes")


def _refuse_foreign_forward(path: str, module: nn.Module) -> None:
    """A function put in the place of a forward may hold on to the original modules, which a copy would then run."""
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "__self__", None) is not module:
        hint = "restore it (del module.forward), and make the change in a sub-class or a hook"
        raise UnsupportedModule(path, "its forward is replaced on the instance", hint)
