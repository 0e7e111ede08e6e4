"""`python -m experiments families`: kernel normalization against the original norm, GroupNorm and GroupNorm with weight
standardization, for all six families of networks at batch sizes 2, 8 and 32.

Without a GPU a stated part of CIFAR-100 and small networks, hours on one core; with `--full` the whole data set and the
usual sizes, for a GPU. The result is a folder as of `compare`: README's table is made of it by
`python -m experiments.readme_table`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from experiments.compare import compare
from knport.errors import UnknownName

COMMAND = "python -m experiments families"
BATCH_SIZES = (2, 8, 32)
RIVALS = ("original", "group", "group_ws")
ADAMW = "optimizer=adamw:weight_decay=0.05"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A network, its kernel normalized form, and how both are trained."""

    original: str
    kernel: str
    lr: dict[int, float]
    """By batch size; the same for all norms."""
    further: str = ""
    """Fields of a run, as in `--extra` of `compare`."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Networks and budget."""

    families: dict[str, Family]
    budget: dict[int, str]
    """Fields of a run that set its length, by batch size."""
    classes: int | None = None
    override: tuple[str, ...] = field(default=())


SGD_LR = {2: 0.003125, 8: 0.0125, 32: 0.05}
ADAMW_LR = {2: 0.0005, 8: 0.001, 32: 0.002}
SMALL = Scale(
    families={
        "resnet": Family(original="cifar_resnet8x2", kernel="kncifar_resnet8x2", lr=SGD_LR),
        "densenet": Family(original="densenet40_k12", kernel="kndensenet40_k12", lr=SGD_LR),
        "convnext": Family(original="cifar_convnext", kernel="kncifar_convnext", lr=ADAMW_LR, further=ADAMW),
        "convmixer": Family(original="cifar_convmixer", kernel="kncifar_convmixer", lr=ADAMW_LR, further=ADAMW),
        "vit": Family(original="baseline_vit_test", kernel="knvit_test", lr=ADAMW_LR, further=ADAMW),
        "conformer": Family(original="baseline_conformer_test", kernel="knconformer_test", lr=ADAMW_LR, further=ADAMW),
    },
    budget={2: "steps=3000", 8: "steps=1250", 32: "steps=936"},
    classes=20,
    override=("schedule=cosine-step", "epochs=1"),
)
FULL = Scale(
    families={
        "resnet": Family(original="baseline_resnet18", kernel="knresnet18", lr=SGD_LR),
        "densenet": Family(original="densenet100_k12", kernel="kndensenet100_k12", lr=SGD_LR),
        "convnext": Family(
            original="baseline_convnext_atto", kernel="knconvnext_full_atto", lr=ADAMW_LR, further=ADAMW
        ),
        "convmixer": Family(
            original="baseline_convmixer_256_8", kernel="knconvmixer_256_8", lr=ADAMW_LR, further=ADAMW
        ),
        "vit": Family(original="baseline_vit_tiny", kernel="knvit_tiny", lr=ADAMW_LR, further=ADAMW),
        "conformer": Family(original="baseline_conformer_tiny", kernel="knconformer_tiny", lr=ADAMW_LR, further=ADAMW),
    },
    budget=dict.fromkeys(BATCH_SIZES, "epochs=150"),
)


def families(
    only: Sequence[str] = tuple(SMALL.families),
    *,
    full: bool = False,
    norms: Sequence[str] = RIVALS,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seeds: Sequence[int] = (0,),
    data_dir: str = "data",
    out: str = "runs/families",
    cost_seconds: float = 20.0,
) -> Path:
    """Compare the families on CIFAR-100; returns the report's path. The same command goes on where it stopped.

    Args:
        only: families: resnet, densenet, convnext, convmixer, vit, conformer.
        full: the whole data set and the usual sizes, 150 epochs: for a GPU. Else 20 classes, small networks, at batch
            sizes 2, 8 and 32 3,000, 1,250 and 936 steps.
        norms: of the original network, beside its kernel normalized form.
        batch_sizes: 2, 8, 32, or some of them.
        seeds: of initialization, order, augmentation and dropout.
        data_dir: folder of the data set, or its parent.
        out: folder of the report and the run folders.
        cost_seconds: about how long the timing may take, per batch size; 0 leaves costs unmeasured.

    Raises:
        KNPortError: an unknown family, norm or batch size, or no data.
    """
    scale = FULL if full else SMALL
    where = data_dir if data_dir == "data" else "DIR"
    return compare(
        "cifar100",
        models=(),
        norms=(),
        batch_sizes=(),
        seeds=seeds,
        extra=cells(scale, only, norms, batch_sizes),
        override=scale.override,
        classes=scale.classes,
        data_dir=data_dir,
        out=out,
        cost_seconds=cost_seconds,
        quiet=True,
        command=_command(only, norms, batch_sizes, seeds, full=full, data_dir=where),
    )


def cells(scale: Scale, only: Sequence[str], norms: Sequence[str], batch_sizes: Sequence[int]) -> list[str]:
    """The cells of the grid as `--extra` of `compare` takes them, smallest batch size first."""
    for names, given, what in ((scale.families, only, "family"), (scale.budget, batch_sizes, "batch size")):
        for name in given:
            if name not in names:
                raise UnknownName(what, str(name), [str(known) for known in names])
    found = []
    for size in batch_sizes:
        for family in (scale.families[name] for name in only):
            fields = [scale.budget[size], f"lr={family.lr[size]:g}", *filter(None, [family.further])]
            networks = [(family.original, norm) for norm in norms] + [(family.kernel, "original")]
            found += [":".join([model, norm, str(size), *fields]) for model, norm in networks]
    return found


def _command(
    only: Sequence[str],
    norms: Sequence[str],
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    *,
    full: bool,
    data_dir: str,
) -> str:
    given = {"only": (only, tuple(SMALL.families)), "norms": (norms, RIVALS)}
    given |= {"batch-sizes": (batch_sizes, BATCH_SIZES), "seeds": (seeds, (0,))}
    words = [f"--{name} {' '.join(map(str, v))}" for name, (v, usual) in given.items() if tuple(v) != tuple(usual)]
    words += ["--full"] * full + [f"--data-dir {data_dir}"] * (data_dir != "data")
    return " ".join([COMMAND, *words])
