"""include= and exclude=: what they match, and that a filter which matches nothing is an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from knport.errors import KNPortError, NothingToConvert, UnmatchedPattern
from knport.surgery import convert, plan

X = torch.zeros(2, 3, 16, 16)


def model() -> nn.Module:
    """Twelve conv-norm pairs, 0.0 ... 0.11, so that 0.1 is the beginning of three names."""
    pairs = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(12)]
    return nn.Sequential(nn.Sequential(*pairs))


def pairs(**filters) -> set[int]:
    """Which of the twelve pairs are converted, norm and convolution alike."""
    made = plan(model(), example_inputs=X, **filters)
    norms = {int(v.path.split(".")[1]) for v in made.verdicts if v.kind == "norm" and v.changes}
    convs = {int(v.path.split(".")[1]) for v in made.verdicts if v.kind == "conv" and v.changes}
    assert norms <= convs
    return norms


ALL = set(range(12))


@pytest.mark.parametrize(
    ("value", "matched"),
    [
        ("0.1", {1}),
        ("0.1.1", {1}),
        ("0.1*", {1, 10, 11}),
        ("0.1?", {10, 11}),
        ("re:0\\.1\\d", {10, 11}),
        ("re:0\\.[35]\\..*", {3, 5}),
        (["0.2", "re:0\\.4"], {2, 4}),
        (("0.2",), {2}),
        (nn.BatchNorm2d, ALL),
        (nn.Sequential, ALL),
        (lambda name, module: isinstance(module, nn.BatchNorm2d) and name.startswith("0.7"), {7}),
        ("*", ALL),
    ],
)
class TestMatching:
    def test_exclude(self, value, matched):
        assert pairs(exclude=value) == ALL - matched

    def test_include(self, value, matched):
        assert pairs(include=value) == matched


def test_layer_1_never_means_layer_10():
    whole = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(11)))
    for value in ("1", "re:1", "1.*"):
        changed = {v.path.split(".")[0] for v in plan(whole, example_inputs=X, include=value).verdicts if v.changes}
        assert changed == {"1"}


def test_a_container_covers_all_that_is_in_it_and_an_alias_of_it_too():
    net = model()
    net.twin = net[0]
    for value in ("0", "twin", nn.Sequential):
        made = plan(net, example_inputs=X, exclude=value)
        assert not made.changes and all(v.reason.startswith("excluded by") for v in made.verdicts)


def test_including_a_convolution_includes_the_norm_behind_it():
    assert pairs(include="0.3.0") == {3}


def test_exclude_wins_and_says_by_what():
    made = plan(model(), example_inputs=X, include="0.1*", exclude="0.10")
    reasons = {v.path: v.reason for v in made.verdicts}
    assert "10 BatchNorm stay" in str(made)
    assert reasons["0.10.1"] == "excluded by '0.10'" and reasons["0.5.1"] == "not in include"
    assert pairs(include="0.1*", exclude="0.10") == {1, 11}


def test_an_excluded_norm_stays_with_a_plain_convolution():
    alone = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    new = convert(alone, exclude="1", example_inputs=X)
    assert type(new[0]) is nn.Conv2d and type(new[1]) is nn.BatchNorm2d
    assert type(new[2]).__name__ == "KNConv2d" and type(new[3]) is nn.Identity


def test_an_alias_names_the_module_too():
    net = model()
    net.also = net[0][4]
    changed = [v.path for v in plan(net, example_inputs=X, include="also").verdicts if v.changes]
    assert changed == ["0.4.0", "0.4.1"]


@pytest.mark.parametrize("name", ["include", "exclude"])
@pytest.mark.parametrize(
    "value", ["0.12", "layer", "re:0\\.1", "0.1.2", nn.Linear, lambda name, module: False, ["0.1", "0.99"], ""]
)
def test_a_filter_that_matches_nothing_is_an_error(name, value):
    if value == "re:0\\.1":  # a container, so this one does
        assert pairs(**{name: value}) in ({1}, ALL - {1})
        return
    with pytest.raises(UnmatchedPattern, match=f"{name}=.*matches no norm, convolution or linear layer"):
        convert(model(), example_inputs=X, **{name: value})


def test_the_error_lists_near_names():
    with pytest.raises(UnmatchedPattern, match=r"near names: .*0\.3\.0"):
        convert(model(), example_inputs=X, exclude="0.3.00")


@pytest.mark.parametrize("value", [3, "re:(", [None, 1.5]])
def test_a_filter_of_another_kind_is_an_error(value):
    with pytest.raises(KNPortError, match=r"expected a glob|no regular expression"):
        convert(model(), exclude=value)


def test_excluding_everything_leaves_nothing_to_convert():
    with pytest.raises(NothingToConvert, match="excluded by"):
        convert(model(), example_inputs=X, exclude="*")
