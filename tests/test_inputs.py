"""Inputs of a forward pass: by default, image by image, and distinct where they were all alike."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from knport import text
from knport.inputs import call_of, distinct, image, images_in, moved

X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("given", "call"),
    [(X, ((X,), {})), ((X, 1), ((X, 1), {})), ([X], ((X,), {})), ({"x": X}, ((), {"x": X}))],
)
def test_what_was_given(given, call):
    assert str(call_of(nn.Identity(), given)) == str(call)


def test_the_default_is_noise_of_the_size_the_model_states():
    (x,), kwargs = call_of(timm.create_model("test_resnet"), None)
    assert x.shape == (2, 3, 160, 160) and not kwargs and not torch.equal(x[0], x[1])
    assert call_of(nn.Sequential(nn.Conv1d(5, 2, 3)), None)[0][0].shape[:2] == (2, 5)


def test_images_are_counted_and_cut():
    call = ((X, [X[0], X[1], X[2]], 7), {"more": {"y": X}, "scale": torch.tensor(2.0)})
    assert images_in(call) == 3 and images_in((([X, X],), {})) == 2 and images_in(((1,), {})) == 1
    (x, listed, number), kwargs = image(call, 1, 3)
    assert torch.equal(x, X[1:2]) and len(listed) == 1 and torch.equal(listed[0], X[1]) and number == 7
    assert torch.equal(kwargs["more"]["y"], X[1:2]) and kwargs["scale"] == 2


def test_images_that_are_alike_become_noise_and_others_stay():
    (x, y, n), _ = distinct(((torch.ones(1, 2), X, torch.ones(3, 2, dtype=torch.long)), {}))
    assert x.shape == (2, 2) and not torch.equal(x[0], x[1])
    assert y is X and n.eq(1).all()
    assert torch.equal(distinct(((torch.zeros(2, 3),), {}))[0][0], distinct(((torch.zeros(2, 3),), {}))[0][0])


def test_only_floating_point_inputs_change_their_dtype():
    (x, n), _ = moved(((X, torch.ones(2, dtype=torch.long)), {}), dtype=torch.float64)
    assert (x.dtype, n.dtype) == (torch.float64, torch.int64)


def test_columns_are_aligned():
    table = text.aligned(("name", "n", "why"), [("a", "10", "first"), ("long", "2", "")], right=(1,))
    assert table == "name   n  why\na     10  first\nlong   2"
