"""Dataclasses as JSON and back, checked against their annotations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm

import knport
from knport.surgery.norm_plan import NormPlan
from knport.typed_json import decode, encode


@dataclass(frozen=True, kw_only=True)
class Leaf:
    name: str
    size: int | tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    rate: float = 0.5
    flag: bool = False
    pair: tuple[str, int] = ("a", 1)
    words: list[str] = field(default_factory=list)
    table: dict[str, int] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)


TREE = Tree(
    leaves=(Leaf(name="a"), Leaf(name="b", size=(2, 3))), words=["x"], table={"k": 1}, more={"any": [1, {"b": None}]}
)


def through_json(value):
    return json.loads(json.dumps(encode(value)))


@pytest.mark.parametrize("tree", [TREE, Tree(leaves=(), rate=2, flag=True)])
def test_there_and_back(tree):
    assert decode(Tree, through_json(tree), "tree") == tree


@pytest.mark.parametrize("make", [knport.plan, lambda m: knport.plan(m, match_params="model", exclude="conv1")])
def test_plans(make):
    plan = make(timm.create_model("test_resnet"))
    assert decode(knport.surgery.Plan, through_json(plan), "plan") == plan
    norms = knport.plan_norm(timm.create_model("test_resnet"), "evonorm_s0", include="layer1")
    assert decode(NormPlan, through_json(norms), "plan") == norms


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rate": "fast"}, r"tree\.rate is 'fast'; expected float"),
        ({"rate": True}, r"tree\.rate is 'True'; expected float"),
        ({"flag": 1}, r"tree\.flag is '1'; expected bool"),
        ({"leaves": {}}, r"tree\.leaves is '{}'; expected a list"),
        ({"leaves": [{"name": "a", "size": [1, "b"]}]}, r"tree\.leaves\[0\]\.size is .*; expected int or"),
        ({"leaves": [{"name": True}]}, r"tree\.leaves\[0\]\.name is 'True'; expected str"),
        ({"leaves": [3]}, r"tree\.leaves\[0\] is '3'; expected an object"),
        ({"leaves": [{}]}, r"tree\.leaves\[0\]\.name is missing"),
        ({"pair": ["a"]}, r"tree\.pair is .*; expected a list of 2"),
        ({"table": {"k": "v"}}, r"tree\.table\.k is 'v'; expected int"),
        ({"table": []}, r"tree\.table is .*; expected an object"),
        ({"colour": "red"}, r"tree\.colour is unknown"),
    ],
)
def test_what_does_not_fit_is_named(change, match):
    with pytest.raises(knport.KNPortError, match=match):
        decode(Tree, {**through_json(TREE), **change}, "tree")


def test_other_objects_cannot_be_written():
    with pytest.raises(knport.KNPortError, match="cannot be written as JSON"):
        encode(Tree(leaves=(), more={"function": print}))
