"""Mixup, CutMix and repeated augmentation of batches."""

from __future__ import annotations

from random import Random

import pytest
import torch
from test_data import ramp

from experiments.feed import Feed, epoch_order
from experiments.mixing import MixedFeed, cutmix, mixup, partner
from experiments.run import resolve
from experiments.tasks import Classification
from experiments.train import start_accelerator
from knport.errors import KNPortError


def mixed(rank: int = 0, world: int = 1, **settings) -> MixedFeed:
    run = resolve("digits", **{"batch_size": 8, "scaling": "unit", "augment": "none", **settings})
    return MixedFeed(Feed(ramp(50), run, rank, world), run, 4)


def test_the_partner_is_the_other_of_the_pair():
    assert partner(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_mixup_is_the_weighted_mean():
    images = torch.rand(4, 1, 5, 7)
    found, share = mixup(images, 0.3, Random(0))
    assert share == 0.3
    torch.testing.assert_close(found[2], 0.3 * images[2] + 0.7 * images[3])


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_a_box(seed):
    images = torch.rand(4, 2, 20, 30)
    found, share = cutmix(images, 0.6, Random(seed))
    own = (found == images).all(1)
    assert torch.equal(own[0], own[1]) and torch.equal(own[0], own[3])
    other = ~own[0]
    assert torch.equal(found[1][:, other], images[0][:, other])
    assert share == pytest.approx(float(own[0].double().mean()))
    rows, columns = other.any(1).nonzero(), other.any(0).nonzero()
    assert int(other.sum()) == len(rows) * len(columns)  # a box
    assert 1 - share <= 0.4 + 1e-6


@pytest.mark.parametrize("settings", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}])
def test_labels_are_the_shares_of_the_pixels(settings):
    run = resolve("digits", batch_size=8, scaling="unit", augment="none")
    for step in range(12):
        images, shares = mixed(**settings).batch(step)
        plain, labels = Feed(ramp(50), run).batch(step)
        torch.testing.assert_close(shares.sum(1), torch.ones(8))
        # every image is of one grey, so that its mean tells how much of each there is
        own = shares.gather(1, labels.unsqueeze(1)).squeeze(1)
        same = labels == partner(labels)
        own = torch.where(same, torch.nan, own)
        grey, other = plain.mean((1, 2, 3)), partner(plain.mean((1, 2, 3)))
        expected = own * grey + (1 - own) * other
        torch.testing.assert_close(images.mean((1, 2, 3))[~same], expected[~same])


def test_both_methods_are_drawn():
    feed = mixed(mixup=0.2, cutmix=1.0)
    flat = [len(feed.batch(step)[0][0].unique()) == 1 for step in range(30)]  # of mixup; cutmix leaves an edge
    assert 5 < sum(flat) < 25


def test_processes_have_whole_pairs():
    settings = {"mixup": 0.2, "cutmix": 1.0, "augment": "crop"}
    for step in (0, 7):
        whole = [part.unflatten(0, (-1, 2)) for part in mixed(**settings).batch(step)]
        for rank in (0, 1):
            for found, pairs in zip(mixed(rank, 2, **settings).batch(step), whole, strict=True):
                assert torch.equal(found, pairs[rank::2].flatten(0, 1))


def test_the_loss_takes_shares_of_the_classes():
    run = resolve("digits", label_smoothing=0.1, mixup=0.2)
    task = Classification(run, ramp(50), start_accelerator(run))
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    shares = torch.nn.functional.one_hot(labels, 4).float()
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(task.loss(logits, shares, task.total(shares)), expected)
    assert isinstance(task.feed(ramp(50)), MixedFeed)


@pytest.mark.parametrize("repeats", [1, 2, 4])
def test_repeats(repeats):
    run = resolve("digits", batch_size=8, repeats=repeats)
    order = epoch_order(50, run, epoch=3)
    assert order.shape == (6, 8)
    for keys in order:
        rows = (keys % 50).view(repeats, -1)
        assert len(rows[0].unique()) == 8 // repeats
        assert all(torch.equal(copy, rows[0]) for copy in rows)
        assert (keys // 50).view(repeats, -1).tolist() == [[copy] * (8 // repeats) for copy in range(repeats)]
    assert len(order.unique()) == 48


def test_copies_of_small_images_are_shifted_apart():
    run = resolve("digits", batch_size=8, repeats=4, scaling="unit")
    x, labels = Feed(ramp(50), run).batch(0)
    assert labels[:2].tolist() * 4 == labels.tolist()
    assert len({copy.numpy().tobytes() for copy in x.unflatten(0, (4, 2))[:, 0]}) > 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mixup": 0.2, "batch_size": 9}, "batch_size is 9; expected a multiple of 2"),
        ({"repeats": 4, "batch_size": 6}, "batch_size is 6; expected a multiple of 4"),
        ({"repeats": 2, "cutmix": 1.0, "batch_size": 6}, "expected a multiple of 4"),
        ({"mixup": -1.0}, "mixup is -1.0; expected a finite number of at least 0"),
        ({"mixup": 0.2, "epsilon": 8.0}, "mixup is 0.2; expected 0 with --epsilon"),
        ({"repeats": 2, "epsilon": 8.0}, "repeats is 2; expected 1 with --epsilon"),
    ],
)
def test_bad_values(settings, match):
    with pytest.raises(KNPortError, match=match):
        resolve("digits", **settings)
