"""knport.save and knport.load: a converted model as a folder of a recipe, knport.json, and model.safetensors.

The recipe says how the original was built and which plans were carried out on it; loading builds the original, carries
them out again and puts the weights in. Nothing is unpickled, and nothing is imported that a file names but timm,
torchvision and architectures.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from knport.errors import KNPortError
from knport.origin import Origin, build, given_origin, origin_of, skeleton
from knport.recipe import Recipe, Weights, read_recipe, write_recipe
from knport.surgery.guard import refuse_wrapped
from knport.surgery.plan import structure_of
from knport.surgery.record import plans_of
from knport.weights import Packed, pack, unpack

RECIPE, WEIGHTS = "knport.json", "model.safetensors"
Factory = Callable[..., nn.Module]


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    base: str | Factory | None = None,
    base_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a converted model to `folder` as ``knport.json`` and ``model.safetensors``.

    The model is built once more, without weights, to make sure that what is written can be loaded. Both files are
    written beside their place and then moved there.

    Args:
        model: converted by `knport.convert`, `knport.replace_norm` or the `apply` of their plans.
        folder: made if it is not there; the two files in it are replaced.
        base: how the original is built: ``"timm/resnet50"``, ``"torchvision/resnet50"``, ``"architectures/NAME"``, or
            a function of a module of yours. Not needed for a network of timm.
        base_kwargs: its arguments, such as ``{"num_classes": 10}``; fit for JSON.

    Returns:
        The folder.

    Raises:
        KNPortError: the model is not a converted one, its base is unknown, or it was changed after it was converted;
            the message lists the differences. Nothing is written then.

    Example:
        >>> model = knport.convert(timm.create_model("resnet50", num_classes=10))
        >>> knport.save(model, "resnet50-kn")
    """
    refuse_wrapped(model)
    plans = plans_of(model)
    if not plans:
        raise KNPortError(f"{type(model).__name__} was not converted by knport; save its state_dict with safetensors")
    if base is None and (base_kwargs or origin_of(model) is None):
        hint = "pass base=, e.g. base='torchvision/resnet50' with base_kwargs={'num_classes': 10}, or your own function"
        raise KNPortError(f"how the original {type(model).__name__} was built is not known; {hint}")
    origin = origin_of(model) if base is None else given_origin(base, base_kwargs)
    _verify(model, plans, origin, base if callable(base) else None)
    packed, folder = pack(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = safetensors.torch.save(packed.tensors, metadata={"format": "pt"})
    recipe = Recipe(
        base=origin,
        plans=plans,
        weights=Weights(sha256=hashlib.sha256(weights).hexdigest(), size=len(weights), shared=packed.shared),
        training=model.training,
        frozen=tuple(name for name, p in model.named_parameters() if not p.requires_grad),
    )
    _write({folder / WEIGHTS: weights, folder / RECIPE: write_recipe(recipe).encode()})
    return folder


def load(folder: str | os.PathLike, *, base: Factory | None = None) -> nn.Module:
    """The model that `save` wrote, on the CPU, in the mode it was in.

    Args:
        folder: of `save`.
        base: the user's function that builds the original, where `save` was given one: what a file names is not
            imported.

    Raises:
        KNPortError: a file is missing, cut short, changed, or of a newer version; the original is built differently
            today; the weights do not fit. The message says which.

    Example:
        >>> model = knport.load("resnet50-kn")
    """
    folder = Path(folder)
    recipe = recipe_in(folder)
    weights = _weights(folder / WEIGHTS, recipe.weights)
    if recipe.base.own:
        _check_factory(base, recipe.base.name)
    model = _rebuilt(build(recipe.base, base), recipe)
    unpack(model, weights)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in recipe.frozen)
    return model.train(recipe.training)


def recipe_in(folder: str | os.PathLike) -> Recipe:
    """How a saved model is built, without its weights."""
    path = Path(folder) / RECIPE
    return read_recipe(_text(path), str(path))


def _rebuilt(model: nn.Module, recipe: Recipe) -> nn.Module:
    for plan in recipe.plans:
        model = plan.apply(model, inplace=True)
    return model


def _verify(model: nn.Module, plans: tuple, origin: Origin, factory: Factory | None) -> None:
    """Raise unless building `origin` and carrying the plans out gives the modules and tensors of `model`."""
    twin = skeleton(origin, factory)
    try:
        for plan in plans:
            twin = plan.apply(twin, inplace=True)
    except KNPortError as error:
        raise KNPortError(
            f"{origin.name} with {origin.kwargs} is not what was converted, or the model was changed since; pass the "
            f"base= and base_kwargs= of the original, and convert after any change of it ({error})"
        ) from error
    known, found = (dict(structure_of(m)) | _shapes(m) for m in (twin, model))
    lines = [
        f"  {path or '(the model itself)'}: {known.get(path, 'nothing')} by the plan, {found.get(path, 'nothing')} now"
        for path in {**known, **found}
        if known.get(path) != found.get(path)
    ]
    if lines:
        more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
        listed = "\n".join([*lines[:8], *more])
        raise KNPortError(
            f"{type(model).__name__} is no longer what {origin.name} with {origin.kwargs} converts to; change the "
            f"original first and convert then, or pass the base_kwargs= that it was built with:\n{listed}"
        )


def _shapes(model: nn.Module) -> dict[str, str]:
    return {f"tensor {name}": str(tuple(getattr(t, "shape", ()))) for name, t in model.state_dict().items()}


def _check_factory(base: Factory | None, name: str) -> None:
    if base is None:
        raise KNPortError(f"the original was built by a function of your own, {name}; pass it as base=")
    given = given_origin(base, None).name
    if given != name:
        raise KNPortError(f"base={given}; the original was built by {name}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        where = "is no folder" if not path.parent.is_dir() else f"has no {path.name}"
        raise KNPortError(f"{path.parent} {where}; expected one that knport.save wrote") from error
    except (OSError, UnicodeDecodeError) as error:
        raise KNPortError(f"{path} cannot be read: {error}") from error


def _weights(path: Path, expected: Weights) -> Packed:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise KNPortError(f"{path} is missing; {RECIPE} beside it belongs to it") from error
    if len(data) < expected.size:
        raise KNPortError(f"{path} is cut short: {len(data):,} bytes of {expected.size:,}")
    if hashlib.sha256(data).hexdigest() != expected.sha256:
        raise KNPortError(f"{path} is not the file that {RECIPE} belongs to: it was changed, or a save was interrupted")
    try:
        return Packed(safetensors.torch.load(data), expected.shared)
    except safetensors.SafetensorError as error:
        raise KNPortError(f"{path} is no safetensors file: {error}") from error


def _write(files: Mapping[Path, bytes]) -> None:
    """All files completely, each beside its place, before the first is moved there."""
    made = {path.with_name(f".{path.name}.{os.getpid()}"): path for path in files}
    try:
        for temporary, path in made.items():
            with temporary.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in made.items():
            temporary.replace(path)
    finally:
        for temporary in made:
            temporary.unlink(missing_ok=True)
