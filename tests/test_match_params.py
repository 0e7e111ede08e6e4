"""match_params and match_macs: channel groups on networks small enough to know them, exact counts, whole networks."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import LayerNorm2d
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from knport.errors import KNPortError, UnknownName
from knport.layers import KNConv2d
from knport.surgery import KNConfig, convert, plan
from knport.surgery.budget import parameters_of
from knport.surgery.resizing import resize_to
from knport.surgery.stand_ins import stand_in
from knport.surgery.width_form import Form
from knport.surgery.width_network import WidthNetwork
from knport.surgery.width_search import search
from knport.surgery.widths import Widths

X = torch.zeros(2, 3, 8, 8)


class Net(nn.Module):
    """Layers by name, and how they are called."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self.call = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.call(self, x)


def conv(before: int, after: int, kernel: int = 1, **options) -> nn.Conv2d:
    return nn.Conv2d(before, after, kernel, padding=kernel // 2, **options)


def network(model: nn.Module, x: torch.Tensor = X) -> WidthNetwork:
    nothing = plan(model, KNConfig(final_norm=False), exclude=lambda name, module: True, example_inputs=x)
    made = WidthNetwork(model, nothing, x)
    made.settle()
    return made


def groups(model: nn.Module, x: torch.Tensor = X) -> dict[str, str]:
    """Layer -> its output channels as a sum of letters for the widths that may change and numbers for the rest."""
    made, letters = network(model, x), {}

    def word(width: int) -> str:
        if width in made.widths.frozen:
            return str(made.widths.size[width])
        return letters.setdefault(width, "abcdefgh"[len(letters)])

    return {path: "+".join(map(word, made.widths.resolve(axis))) for path, axis in made.flow.layers.items()}


# --- widths


def test_equal_axes_are_split_where_their_parts_end():
    widths = Widths()
    long, a, b = widths.new(12), widths.new(4), widths.new(8)
    widths.equate((long,), (a, b))
    assert widths.resolve((long,)) == widths.resolve((a, b)) and widths.total((long,), {a: 5}) == 13


def test_an_axis_of_equal_blocks_moves_in_their_number():
    widths = Widths()
    long, block = widths.new(12), widths.new(4)
    widths.equate((long,), (block,) * 3)
    assert widths.total((long,), {widths.resolve((block,))[0]: 5}) == 15


def test_blocks_of_two_sizes_share_their_greatest_common_divisor():
    widths = Widths()
    a, b, c = widths.new(12), widths.new(4), widths.new(6)
    widths.equate((a,), (b,) * 3)
    widths.equate((a,), (c,) * 2)
    (unit,) = set(widths.resolve((a,)))
    assert widths.size[unit] == 2 and len(widths.resolve((a,))) == 6


@pytest.mark.parametrize("first", [True, False], ids=["frozen before", "frozen after"])
def test_what_equals_a_fixed_width_is_fixed_with_its_reason(first):
    widths = Widths()
    a, b = widths.new(8), widths.new(8)
    if first:
        widths.freeze((a,), "the reason")
        widths.equate((a,), (b,))
    else:
        widths.equate((a,), (b,))
        widths.freeze((a,), "the reason")
    assert widths.is_fixed((b,)) and widths.frozen[widths.resolve((b,))[0]] == "the reason"


def test_marks_go_to_the_parts():
    widths = Widths()
    a = widths.new(8)
    widths.mark((a,), "residual sum")
    pieces = widths.cut((a,), (3, 5))
    assert [widths.total(piece) for piece in pieces] == [3, 5]
    assert all(widths.marks[w] == {"residual sum"} for piece in pieces for w in piece)


def test_axes_of_other_sizes_are_no_equals():
    widths = Widths()
    with pytest.raises(KNPortError, match="8 channels cannot equal one of 9"):
        widths.equate((widths.new(8),), (widths.new(9),))


# --- channel groups

HEAD = {"head": nn.Linear(8, 5)}


def pooled(x):
    return x.mean((2, 3))


def reshaped_like(m, x):
    """The channels of `x` are taken for those of a tensor of another width."""
    return m.c(m.b(x).flatten(1).view(2, x.shape[1], 8, 8))


COUPLED = {
    "a chain: every width its own": (
        Net(lambda m, x: m.head(pooled(m.b(m.a(x)))), a=conv(3, 6), b=conv(6, 8, 3), **HEAD),
        {"a": "a", "b": "b", "head": "5"},
    ),
    "a residual sum": (
        Net(lambda m, x: m.head(pooled(m.a(x) + m.c(m.b(m.a(x))))), a=conv(3, 8), b=conv(8, 4), c=conv(4, 8), **HEAD),
        {"a": "a", "b": "b", "c": "a", "head": "5"},
    ),
    "a sum in place": (
        Net(lambda m, x: m.head(pooled(m.a(x).add_(m.b(x)))), a=conv(3, 8), b=conv(3, 8), **HEAD),
        {"a": "a", "b": "a", "head": "5"},
    ),
    "a concatenation adds up": (
        Net(lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 6), b=conv(3, 2), c=conv(8, 5)),
        {"a": "a", "b": "b", "c": "5"},
    ),
    "a sum with a concatenation splits the other side": (
        Net(
            lambda m, x: m.head(pooled(torch.cat([m.a(x), m.b(x)], 1) + m.c(x))),
            a=conv(3, 6),
            b=conv(3, 2),
            c=conv(3, 8),
            **HEAD,
        ),
        {"a": "a", "b": "b", "c": "a+b", "head": "5"},
    ),
    "depthwise follows its input": (
        Net(lambda m, x: m.head(pooled(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8, 3, groups=8), **HEAD),
        {"a": "a", "b": "a", "head": "5"},
    ),
    "depthwise with two filters per channel": (
        Net(lambda m, x: m.head(pooled(m.b(m.a(x)))), a=conv(3, 4), b=conv(4, 8, 3, groups=4), **HEAD),
        {"a": "a", "b": "a+a", "head": "5"},
    ),
    "one number of groups: it stays": (
        Net(lambda m, x: m.head(pooled(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8, 3, groups=4), **HEAD),
        {"a": "a+a+a+a", "b": "b+b+b+b", "head": "5"},
    ),
    "one size of groups in all layers: it stays": (
        Net(
            lambda m, x: m.head(pooled(m.d(m.c(m.b(m.a(x)))))),
            a=conv(3, 6),
            b=conv(6, 8, 3, groups=2),
            c=conv(8, 12),
            d=conv(12, 8, 3, groups=4),
            **HEAD,
        ),
        {"a": "a+a+a", "b": "a+a+a+a", "c": "b+b+b", "d": "b+b", "head": "5"},
    ),
    "squeeze-excite gate": (
        Net(
            lambda m, x: m.head(pooled(m.a(x) * m.up(m.down(m.a(x).mean((2, 3), keepdim=True)).relu()).sigmoid())),
            a=conv(3, 8),
            down=conv(8, 2),
            up=conv(2, 8),
            **HEAD,
        ),
        {"a": "a", "down": "b", "up": "a", "head": "5"},
    ),
    "chunk in two: equal halves": (
        Net(lambda m, x: m.c(m.a(x).chunk(2, 1)[1]), a=conv(3, 8), c=conv(4, 5)),
        {"a": "a+a", "c": "5"},
    ),
    "channel shuffle": (
        Net(lambda m, x: m.c(m.a(x).unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), a=conv(3, 8), c=conv(8, 5)),
        {"a": "a+a", "c": "5"},
    ),
    "flattened into a linear layer": (
        Net(lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 2).flatten(1)), a=conv(3, 6), head=nn.Linear(24, 5)),
        {"a": "a", "head": "5"},
    ),
    "channels last and back": (
        Net(
            lambda m, x: m.c(m.b(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            a=conv(3, 6),
            b=nn.Linear(6, 7),
            c=conv(7, 5),
        ),
        {"a": "a", "b": "b", "c": "5"},
    ),
    "group norm divides": (
        Net(lambda m, x: m.head(pooled(m.n(m.a(x)))), a=conv(3, 8), n=nn.GroupNorm(2, 8), **HEAD),
        {"a": "a+a", "head": "5"},
    ),
    "a scale per channel": (
        Net(
            lambda m, x: m.head(pooled(m.a(x) * m.scale.view(1, -1, 1, 1))),
            a=conv(3, 8),
            scale=nn.Parameter(torch.ones(8)),
            **HEAD,
        ),
        {"a": "a", "head": "5"},
    ),
    "one channel broadcasts and stays": (
        Net(lambda m, x: m.head(pooled(m.a(x) * m.mask(x))), a=conv(3, 8), mask=conv(3, 1), **HEAD),
        {"a": "a", "mask": "1", "head": "5"},
    ),
    "a width written as a number in the code": (
        Net(lambda m, x: m.c(m.a(x).view(2, 8, 64)[:, :, :9].view(2, 8, 3, 3)), a=conv(3, 8), c=conv(8, 5)),
        {"a": "8", "c": "5"},
    ),
    "a slice at a number": (
        Net(lambda m, x: m.c(m.a(x)[:, :2]), a=conv(3, 8), c=conv(2, 5)),
        {"a": "2+a", "c": "5"},
    ),
    "zeros for missing channels": (
        Net(lambda m, x: m.head(pooled(F.pad(m.a(x), (0, 0, 0, 0, 1, 1)))), a=conv(3, 6), **HEAD),
        {"a": "a", "head": "5"},
    ),
    "two widths that only the code knows to be equal": (
        Net(
            lambda m, x: m.tied(m.a(x)),
            a=conv(3, 8),
            tied=Net(lambda m, x: reshaped_like(m, x), b=conv(8, 8), c=conv(8, 5)),
        ),
        {"a": "8", "tied.b": "8", "tied.c": "5"},
    ),
    "a mask of DropPath": (
        Net(
            lambda m, x: m.head(pooled(m.a(x) * x.new_ones(2, 1, 1, 1) + torch.zeros(2, 1, 1, 1))),
            a=conv(3, 8),
            **HEAD,
        ),
        {"a": "a", "head": "5"},
    ),
    "a function that is not known": (
        Net(lambda m, x: m.head(torch.linalg.vector_norm(m.a(x), dim=(2, 3))), a=conv(3, 8), **HEAD),
        {"a": "8", "head": "5"},
    ),
    "pixel shuffle": (
        Net(lambda m, x: m.c(F.pixel_shuffle(m.a(x), 2)), a=conv(3, 8), c=conv(2, 5)),
        {"a": "a+a+a+a", "c": "5"},
    ),
    "a matrix product of two maps": (
        Net(
            lambda m, x: m.head(pooled((m.a(x).flatten(2).transpose(1, 2) @ m.b(x).flatten(2))[..., None])),
            a=conv(3, 6),
            b=conv(3, 6),
            head=nn.Linear(64, 5),
        ),
        {"a": "a", "b": "a", "head": "5"},
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_channel_groups(name):
    model, expected = COUPLED[name]
    assert groups(copy.deepcopy(model)) == expected


@pytest.mark.parametrize("name", COUPLED)
def test_a_network_of_other_widths_runs_and_counts_what_the_form_says(name):
    """Every width changed by another amount: the resized network is run, and both counts are those of the form."""
    model = copy.deepcopy(COUPLED[name][0])
    made, shape = network(model), model(X).shape
    free = made.free()
    x = torch.tensor([made.widths.size[w] + 1 + i for i, w in enumerate(free)], dtype=torch.float64)
    resized = resize_to(model, *made.rows(dict(zip(free, map(int, x), strict=True))))
    assert resized(X).shape == shape
    assert parameters_of(resized) == Form(made.widths, free, made.terms)(x)
    with FlopCounterMode(display=False) as counter:
        resized(X)
    assert counter.get_total_flops() == 2 * Form(made.widths, free, made.products)(x)


def test_what_the_strategy_inner_leaves():
    model = Net(
        lambda m, x: m.head(pooled(m.d(torch.cat([m.c(x), m.b(m.a(x))], 1)))),
        a=conv(3, 6),
        b=conv(6, 4),
        c=conv(3, 4),
        d=conv(8, 8),
        **copy.deepcopy(HEAD),
    )
    made = network(model)
    seen = {path: made.widths.marks.get(made.widths.resolve(axis)[0]) for path, axis in made.flow.layers.items()}
    assert seen == {"a": None, "b": {"concatenation"}, "c": {"concatenation"}, "d": {"classifier"}, "head": None}


def test_heads_of_attention_keep_their_width():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, embed_dim=24, num_heads=3, num_classes=4)
    made = network(model, torch.zeros(2, 3, 32, 32))
    assert made.widths.is_fixed(made.flow.layers["blocks.0.attn.qkv"])
    assert "attention heads" in made.widths.frozen[made.widths.resolve(made.flow.layers["blocks.0.attn.qkv"])[0]]
    assert not made.widths.is_fixed(made.flow.layers["blocks.0.mlp.fc1"])


def test_heads_that_only_training_calls_are_followed_too():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = conv(3, 8, 3), nn.Linear(8, 5), conv(8, 6)

        def forward(self, x):
            x = self.body(x)
            return (self.head(pooled(x)), self.aux(x)) if self.training else self.head(pooled(x))

    model = Aux()
    made = network(model)
    (width,) = made.free()
    resized = resize_to(model, *made.rows({width: 11}))
    assert resized.train()(X)[1].shape == (2, 6, 8, 8) and resized.aux.in_channels == 11
    assert parameters_of(resized) == Form(made.widths, [width], made.terms)(torch.tensor([11.0], dtype=torch.float64))


# --- search


def test_one_multiplier_for_all_widths_then_repairs():
    """sum of a_i * a_i+1 over widths 64 to 512: at a quarter of the count each width is about half."""
    widths = Widths()
    chain = [widths.new(size) for size in (64, 128, 256, 512)]
    terms = [(9, ((a,), (b,))) for a, b in itertools.pairwise(chain)]
    form, sizes = Form(widths, chain, terms), torch.tensor([64.0, 128, 256, 512], dtype=torch.float64)
    found, factor = search(form, sizes, torch.ones(4, dtype=torch.float64), form(sizes) // 4, 0.005)
    assert factor == pytest.approx(0.5, abs=0.02) and form(found) == pytest.approx(form(sizes) // 4, rel=0.005)
    assert all(w % 8 == 0 for w in found.tolist())
    assert (found / sizes).tolist() == pytest.approx([0.5] * 4, abs=0.13)


def test_the_form_knows_what_moves_do():
    widths = Widths()
    a, b, c = (widths.new(size) for size in (3, 5, 7))
    form = Form(widths, [a, b, c], [(2, ((a, b), (b, c))), (3, ((c,),)), (11, ()), (5, ((a,), (a,)))])
    x, places = torch.tensor([3.0, 5, 7], dtype=torch.float64), torch.tensor([0, 1, 2])
    steps = torch.tensor([1.0, -2, 3], dtype=torch.float64)
    assert form(x) == 2 * 8 * 12 + 3 * 7 + 11 + 5 * 9

    def moved(*which):
        y = x.clone()
        for i in which:
            y[places[i]] += steps[i]
        return form(y) - form(x)

    assert form.moves(x, places, steps).tolist() == [moved(i) for i in range(3)]
    assert form.pairs(x, places, steps)[0, 2] == moved(0, 2) and form.pairs(x, places, steps)[1, 2] == moved(1, 2)


# --- match_params


def bottleneck() -> nn.Module:
    """A block of ResNet-50 with its stem and head: 1x1 convolutions that are enlarged."""
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)


BLOCKS = torch.zeros(2, 3, 64, 64)


def matched(model: nn.Module, wanted="model", **options):
    return convert(model, match_params=wanted, example_inputs=BLOCKS, **options)


@pytest.mark.parametrize(
    "wanted, strategy", [("model", "width"), (4_321_987, "width"), (12_345_678, "inner"), (30_000_000, "inner")]
)
def test_the_count_is_met_and_the_network_trains(wanted, strategy):
    model = bottleneck()
    new = matched(model, wanted, strategy=strategy)
    target = parameters_of(model) if wanted == "model" else wanted
    assert parameters_of(new) == pytest.approx(target, rel=0.005)
    y = new(torch.randn(2, 3, 64, 64))
    assert y.shape == (2, 10)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in new.parameters())
    assert (new.layer1[0].conv3.out_channels == 256) == (strategy == "inner")


def test_the_original_stays_as_it_was_and_inplace_is_the_same():
    model = bottleneck()
    before = copy.deepcopy(model.state_dict())
    new = matched(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    same = matched(model, inplace=True)
    assert same is model
    assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in new.state_dict().items()}


def test_a_plan_is_carried_out_on_another_instance():
    made = plan(bottleneck(), match_params="model", example_inputs=BLOCKS)
    new = made.apply(bottleneck())
    assert parameters_of(new) == made.parameters[1] == made.resizing.counts[2]
    assert made.parameters[0] == made.resizing.counts[0] == parameters_of(bottleneck())
    assert made.resizing.counts[1] == parameters_of(convert(bottleneck(), example_inputs=BLOCKS))


def test_a_second_time_changes_nothing():
    new = matched(bottleneck())
    with pytest.warns(UserWarning, match="converted already"):
        again = matched(new)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in new.state_dict().items()}
    assert not plan(new, match_params=parameters_of(bottleneck()), example_inputs=BLOCKS).changes


def test_a_converted_network_can_be_resized_afterwards():
    new = convert(bottleneck(), example_inputs=BLOCKS)
    small = matched(new, parameters_of(bottleneck()))
    assert parameters_of(small) == pytest.approx(parameters_of(bottleneck()), rel=0.005)
    assert isinstance(small.layer1[0].conv1, KNConv2d) and small(BLOCKS).shape == (2, 10)


@pytest.mark.parametrize("wanted", ["model", 30_000_000])
def test_multiply_accumulates_are_matched(wanted):
    model = bottleneck().eval()
    with FlopCounterMode(display=False) as counter:
        model(BLOCKS)
    original = counter.get_total_flops() // 4  # two images, two FLOPs per multiply-accumulate
    made = plan(model, match_macs=wanted, example_inputs=BLOCKS)
    target = original if wanted == "model" else wanted
    assert made.resizing.counts[0] == original and made.resizing.counts[2] == pytest.approx(target, rel=0.005)
    assert made.parameters[1] == parameters_of(made.apply(model))
    # The resized network's convolutions and linear layers, each counted by hand.
    shapes = {}
    new = made.apply(model).eval()
    hooks = [
        m.register_forward_hook(lambda m, a, out: shapes.__setitem__(m, out))
        for m in new.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    new(BLOCKS[:1])
    counted = sum(m.weight.numel() * out[0].numel() // out.shape[1] for m, out in shapes.items())
    assert counted == made.resizing.counts[2] and len(hooks) == len(shapes)


def test_the_plan_says_what_is_resized():
    made = plan(bottleneck(), match_params="model", example_inputs=BLOCKS)
    text = str(made)
    before, converted, after = (f"{n:,}" for n in made.resizing.counts)
    assert f"{before} -> {converted} converted -> {after} resized" in text
    assert "a trained network loses what it knew" in text
    conv1 = made.apply(bottleneck()).layer1[0].conv1
    assert f"resized to in {conv1.in_channels}, out {conv1.out_channels}" in text
    assert f"   64 -> {conv1.out_channels:<5} layer1.0.conv1" in text
    assert "kept           fc: the model's output" in text
    assert json.loads(made.to_json())["resizing"]["strategy"] == "width"
    assert "widths" not in str(plan(bottleneck(), example_inputs=BLOCKS))


def test_within_the_tolerance_nothing_is_resized():
    model = bottleneck()
    count = parameters_of(convert(model, example_inputs=BLOCKS))
    made = plan(model, match_params=count + count // 300, example_inputs=BLOCKS)
    assert made.resizing.changes == () and "widths        stay" in str(made)
    assert parameters_of(made.apply(model)) == count


# --- refusals


def test_a_target_out_of_reach_names_the_nearest_and_the_reasons():
    with pytest.raises(KNPortError, match=r"the nearest that was found is [\d,]+ \(\+") as error:
        matched(bottleneck(), 1_000_000, strategy="inner")
    assert "'inner' leaves what a residual sum sees: layer1.0.conv3" in str(error.value)
    assert "strategy='width'" in str(error.value)


def test_the_nearest_is_a_count_that_is_met():
    with pytest.raises(KNPortError) as error:
        matched(bottleneck(), 1_000_000, strategy="inner")
    nearest = int(str(error.value).split("found is ")[1].split(" (")[0].replace(",", ""))
    assert parameters_of(matched(bottleneck(), nearest, strategy="inner")) == pytest.approx(nearest, rel=0.005)


@pytest.mark.parametrize("bad", ["modle", 0, -5, True, 0.5, [1]])
@pytest.mark.parametrize("name", ["match_params", "match_macs"])
def test_bad_targets(name, bad):
    with pytest.raises(KNPortError, match=f'{name}=.*expected "model" or a number'):
        plan(bottleneck(), **{name: bad})


def test_bad_strategy_and_two_targets():
    with pytest.raises(UnknownName, match="inner"):
        plan(bottleneck(), match_params="model", strategy="iner")
    with pytest.raises(KNPortError, match="both given"):
        plan(bottleneck(), match_params="model", match_macs="model")


# --- weights


def small() -> nn.Sequential:
    return nn.Sequential(
        conv(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 32), nn.BatchNorm2d(32), nn.ReLU()
    ).append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)))


def test_what_shrinks_keeps_its_first_channels_scaled_to_the_fan_in():
    model = small()
    full, new = convert(model, example_inputs=X), convert(model, match_params="model", example_inputs=X)
    out, inner = new[3].weight.shape[:2]
    assert inner < 16 and out < 32
    expected = full[3].weight[:out, :inner] * (16 / inner) ** 0.5
    torch.testing.assert_close(new[3].weight, expected)
    assert new[3].weight.count_nonzero() == out * inner  # one tap of four, as embedded
    torch.testing.assert_close(new[0].weight, full[0].weight[:inner])  # its fan-in is that of the image


def test_what_grows_is_filled_with_numbers_of_the_same_spread():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), conv(64, 128), nn.BatchNorm2d(128))
    model = model.append(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 4)))
    target = 4 * parameters_of(convert(model, example_inputs=X))
    new = convert(model, match_params=target, example_inputs=X)
    old, grown = convert(model, example_inputs=X)[3].weight.detach(), new[3].weight.detach()
    ratio = grown.shape[1] / old.shape[1]
    assert ratio > 1.5
    tap = (grown != 0).any(0).any(0)
    assert torch.equal(tap, (old != 0).any(0).any(0))  # the zeros of an embedded kernel stay zero
    added = grown[128:, :, tap]
    assert added.std().item() == pytest.approx(old[:, :, tap].std().item() / ratio**0.5, rel=0.05)
    assert len(torch.unique(added)) > 0.99 * added.numel()  # drawn, not repeated


def test_what_belongs_to_a_parameter_stays():
    model = small().to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    new = convert(model, match_params="model", example_inputs=X.bfloat16())
    assert new[0].weight.dtype == torch.bfloat16 and not new[0].weight.requires_grad and new[3].weight.requires_grad
    assert new[0].weight.shape[0] != 16 and new[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_norms_that_stay_are_resized_with_their_statistics():
    model = small()
    new = convert(model, exclude="4", match_params=3000, example_inputs=X)
    norm = new[4]
    assert norm.num_features == len(norm.running_mean) == len(norm.weight) == new[3].out_channels != 32
    assert new(X).shape == (2, 4)


# --- numbers that state widths


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext"])
def test_timm_networks_state_their_new_widths(name):
    model = timm.create_model(name)
    x = torch.randn(2, 3, 64, 64)
    new = convert(model, match_params=4 * parameters_of(model), example_inputs=x).eval()
    features = new.forward_features(x)
    assert new.num_features == features.shape[1] != model.num_features
    assert new.forward_head(features, pre_logits=True).shape[1] == new.head_hidden_size
    maps = new.forward_intermediates(x, intermediates_only=True)
    assert [row["num_chs"] for row in new.feature_info] == [map.shape[1] for map in maps]
    assert [row["num_chs"] for row in model.feature_info] != [map.shape[1] for map in maps]
    new.reset_classifier(7)
    assert new(x).shape == (2, 7)


def test_a_feature_extractor_keeps_the_widths_it_gives_out():
    model = timm.create_model("test_resnet", features_only=True)
    x = torch.randn(2, 3, 64, 64)
    new = convert(model, match_params="model", example_inputs=x)
    assert parameters_of(new) == pytest.approx(parameters_of(model), rel=0.005)
    assert [map.shape[1] for map in new(x)] == new.feature_info.channels() == model.feature_info.channels()


def test_layer_norm_of_maps_states_its_shape():
    model = Net(lambda m, x: m.head(pooled(m.n(m.a(x)))), a=conv(3, 8), n=LayerNorm2d(8), **copy.deepcopy(HEAD))
    made = network(model)
    norm = made.flow.attributes["n", "normalized_shape"]
    (width,) = made.widths.resolve(norm)
    assert resize_to(model, *made.rows({width: 9})).n.normalized_shape == (9,)


# --- the networks that are promised


NAMED = [
    "timm/resnet50",
    "timm/densenet121",
    "timm/efficientnet_b0",
    "timm/mobilenetv2_100",
    "timm/regnety_002",
    "timm/convmixer_768_32",
    "timm/resnext50_32x4d",
    "timm/convnext_atto",
    "torchvision/resnet50",
    "torchvision/densenet121",
    "torchvision/efficientnet_b0",
    "torchvision/mobilenet_v2",
    "torchvision/resnext50_32x4d",
]
GROUPED = ("regnety_002", "resnext50_32x4d")


def build(name: str) -> nn.Module:
    library, _, name = name.partition("/")
    return timm.create_model(name) if library == "timm" else torchvision.models.get_model(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, factor",
    [*((name, "model") for name in NAMED), *((name, (0.8, 1.2)[i % 2]) for i, name in enumerate(NAMED[:8]))],
)
def test_the_promised_networks(name, factor):
    with torch.device("meta"):
        model = build(name)
    count = parameters_of(model)
    wanted = factor if factor == "model" else round(factor * count)
    made = plan(model, match_params=wanted)
    tolerance = 0.01 if name.endswith(GROUPED) else 0.005
    target = count if factor == "model" else wanted
    assert made.parameters[1] == pytest.approx(target, rel=tolerance)
    new = made.apply(model)
    assert parameters_of(new) == made.parameters[1]
    assert not plan(new, match_params=target).changes
    assert stand_in(new)(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm/regnety_002", "timm/convnext_atto"])
def test_promised_networks_train_after_matching(name):
    model = build(name)
    new = convert(model, match_params="model").train()
    y = new(torch.randn(2, 3, 64, 64))
    y.square().mean().backward()
    assert y.isfinite().all() and all(p.grad is not None for p in new.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["regnety_002", "mobilenetv2_100"])
def test_promised_feature_extractors(name):
    model = timm.create_model(name, features_only=True)
    new = convert(model, match_params="model")
    assert parameters_of(new) == pytest.approx(parameters_of(model), rel=0.005)
    assert [map.shape[1] for map in new(torch.randn(1, 3, 64, 64))] == model.feature_info.channels()
