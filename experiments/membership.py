"""Membership inference: can one tell from a network which images it was trained on?

A sanity check of private training, not a proof: an attack that fails shows nothing, one that beats the bound of the
stated epsilon would show an error. Two attacks: a threshold on the loss (Yeom et al., 2018), and the likelihood ratio
against shadow models (LiRA; Carlini et al., 2022) with the other networks of the same setting as shadows.

Some images carry wrong labels. A network that learns digits has no reason to fit them but to memorize them, so they
show what an attacker can hope for at best.

Legend: M networks, each trained on its own half of N images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from experiments.data.digits import digits
from experiments.data.images import ImageSet
from experiments.models import build
from experiments.randomness import generator
from experiments.run import Run
from experiments.train import train

WRONG_EVERY = 12  # one image of so many carries a wrong label
LEAST_SPREAD = 1e-3  # of the shadows' scores, against division by zero
FALSE_POSITIVES = 0.01


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """M networks of one setting on N images."""

    scores: Tensor
    """float64 (M, N): log odds that the network gives an image's label."""
    members: Tensor
    """bool (M, N): whether the network was trained on the image."""


def pool() -> tuple[ImageSet, Tensor, ImageSet]:
    """The digits' training images with some labels made wrong, which these are, and the test images."""
    images, test = digits()
    wrong = torch.arange(len(images)) % WRONG_EVERY == 0
    shift = 1 + torch.arange(len(images)) // WRONG_EVERY % 9  # never a whole turn
    labels = torch.where(wrong, (images.labels + shift) % 10, images.labels)
    return replace(images, labels=labels), wrong, test


def members_of(model: int, count: int) -> Tensor:
    """The half of `count` images that network `model` is trained on; of each pair of networks, one has each image."""
    half = torch.zeros(count, dtype=torch.bool)
    half[torch.randperm(count, generator=generator(model // 2, "members"))[: count // 2]] = True
    return ~half if model % 2 else half


def train_on_halves(runs: list[Run], *, quiet: bool = True) -> Attacked:
    """Train network m by `runs[m]` on its half of the pool; finished runs are only read.

    Args:
        runs: of one setting, an even number of them, with different seeds and folders.
        quiet: say nothing.
    """
    images, _, test = pool()
    members = torch.stack([members_of(model, len(images)) for model in range(len(runs))])
    for run, half in zip(runs, members, strict=True):
        train(run, quiet=quiet, sets=(images.take(half), test))
    return Attacked(scores=torch.stack([log_odds(run, images) for run in runs]), members=members)


@torch.no_grad()
def log_odds(run: Run, images: ImageSet) -> Tensor:
    """log p / (1 - p) of each image's label under the finished network of `run`: float64 (N,)."""
    _, channels, size, _ = images.images.shape
    options = {"dropout": run.dropout, "activation": run.activation}
    net = build(run.model, run.norm, num_classes=images.num_classes, in_chans=channels, image_size=size, **options)
    net.load_state_dict(load_file(Path(run.run_dir) / "last" / "model.safetensors"))
    logits = net.eval()(images.scale(images.images, run.scaling)).double()  # (N, classes)
    own = logits.gather(1, images.labels.unsqueeze(1))
    others = logits.scatter(1, images.labels.unsqueeze(1), -math.inf)
    return own.squeeze(1) - others.logsumexp(1)


def likelihood_ratio(attacked: Attacked) -> Tensor:
    """LiRA's score of each network and image, (M, N): how much likelier its log odds are for a member.

    The in and out distributions of an image are normal, with the means over the shadows that were and were not trained
    on it and a variance shared by all images, as is advised for few shadows. The shadows of a network are all but
    itself and the one with the other half: of these, half have each image, so that their number gives nothing away.
    Four networks at least.
    """
    ratios = []
    for model in range(len(attacked.scores)):
        rest = torch.arange(len(attacked.scores)) // 2 != model // 2
        scores, member = attacked.scores[rest], attacked.members[rest]
        inside, outside = _mean_and_variance(scores, member), _mean_and_variance(scores, ~member)
        own = attacked.scores[model]
        ratios.append(_log_normal(own, *inside) - _log_normal(own, *outside))
    return torch.stack(ratios)


def auc(scores: Tensor, members: Tensor) -> float:
    """Area under the curve of one network's scores (N,): 0.5 is guessing."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(members.numpy(), scores.numpy()))


def true_positives(scores: Tensor, members: Tensor) -> float:
    """Share of members found where 1 % of the others are taken for members."""
    allowed = int(FALSE_POSITIVES * int((~members).sum()))
    threshold = scores[~members].sort(descending=True).values[allowed]
    return float((scores[members] > threshold).double().mean())


def bound(epsilon: float | None, delta: float) -> float | None:
    """The largest AUC that (epsilon, delta) allows any attack; None without privacy.

    The curve of true against false positives lies below min(e^eps f + delta, 1 - e^-eps (1 - delta - f)) (Kairouz et
    al., 2015); this is the area under it.
    """
    if epsilon is None:
        return None
    growth = math.exp(epsilon)
    crossing = (1 - delta) / (1 + growth)  # where the two lines meet
    rising = growth * crossing**2 / 2 + delta * crossing
    falling = (1 - crossing) - math.exp(-epsilon) * ((1 - delta) * (1 - crossing) - (1 - crossing**2) / 2)
    flat = delta**2 * math.exp(-epsilon) / 2  # beyond 1 - delta the curve is at 1
    return min(1.0, rising + falling - flat)


def measure(attacked: Attacked, wrong: Tensor) -> list[Mapping[str, object]]:
    """Rows of `membership.csv`: each network, attack and kind of image."""
    attacks = {"loss threshold": attacked.scores, "likelihood ratio": likelihood_ratio(attacked)}
    rows = []
    for attack, scores in attacks.items():
        for kind, chosen in (("right labels", ~wrong), ("wrong labels", wrong)):
            for model, (own, member) in enumerate(zip(scores[:, chosen], attacked.members[:, chosen], strict=True)):
                row = {"attack": attack, "images": kind, "network": model, "auc": auc(own, member)}
                counts = {"members": int(member.sum()), "others": int((~member).sum())}
                rows.append(row | {"true_positives_at_1_percent": true_positives(own, member)} | counts)
    return rows


def _mean_and_variance(scores: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Per image over the networks where `chosen`, (N,), and one variance of all images about their means."""
    count = chosen.sum(0)
    mean = (scores * chosen).sum(0) / count
    freedom = (count - 1).clamp_min(0).sum().clamp_min(1)
    return mean, (((scores - mean) * chosen) ** 2).sum() / freedom + LEAST_SPREAD**2


def _log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return -((x - mean) ** 2) / (2 * variance) - variance.log() / 2
