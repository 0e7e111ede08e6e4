"""The efficient form against the definition and the published layers: values and every gradient, in float64."""

import itertools

import golden
import pytest
import torch
import torch.nn.functional as F

from knport import functional
from knport import geometry as places
from knport.errors import KNPortError
from knport.functional.statistics import unit_statistics
from knport.kernels import Draw
from knport.kernels.eager import normal_pair

EXACT = {"rtol": 1e-10, "atol": 1e-10}

# (in, out, kernel, stride, padding, dilation, groups, padding_mode, norm_window): one row per argument that could break
GEOMETRIES = {
    "plain": (5, 7, 3, 1, 1, 1, 1, "zeros", None),
    "pointwise": (5, 7, 1, 1, 0, 1, 1, "zeros", None),
    "strided pointwise": (16, 7, 1, (2, 3), 0, 1, 1, "zeros", None),
    "even kernel, one side padded": (5, 7, 2, 1, ((1, 0), (0, 1)), 1, 1, "zeros", None),
    "strided, one side padded": (5, 7, 2, 2, ((0, 1), (0, 1)), 1, 1, "zeros", None),
    "strided, other side padded": (5, 7, 2, 2, ((1, 0), (1, 0)), 1, 1, "zeros", None),
    "rectangular": (5, 7, (3, 2), (2, 1), (2, 0), 1, 1, "zeros", None),
    "same": (5, 7, (2, 3), 1, "same", 1, 1, "zeros", None),
    "dilated": (5, 7, 3, 2, 2, 2, 1, "zeros", None),
    "dilated, one side padded": (5, 7, (2, 3), 1, ((0, 3), (1, 2)), (3, 2), 1, "zeros", None),
    "groups": (6, 8, 3, 1, 1, 1, 2, "zeros", None),
    "depthwise": (6, 12, 3, 2, 1, 1, 6, "zeros", None),
    "reflect": (5, 7, 3, 1, 1, 1, 1, "reflect", None),
    "replicate": (5, 7, 3, 2, 2, 1, 1, "replicate", None),
    "circular": (5, 7, 2, 1, ((1, 0), (0, 1)), 1, 1, "circular", None),
    "patches": (3, 7, 4, 4, 0, 1, 1, "zeros", None),
    "large": (3, 7, (6, 5), (2, 1), 2, 1, 1, "zeros", None),
    "pointwise, wider window": (5, 7, 1, 1, 0, 1, 1, "zeros", 3),
    "strided, even window": (5, 7, 3, 2, 1, 1, 1, "zeros", (4, 5)),
    "window smaller than kernel": (5, 7, 3, 1, 1, 1, 1, "zeros", 1),
    "window on a dilated kernel": (6, 8, 3, 1, 2, 2, 2, "zeros", 3),
}
SIZES = {1: (23,), 2: (13, 11), 3: (7, 5, 11)}


def arguments(geometry, ndim, dtype=torch.float64):
    """Inputs and keyword arguments for `kn_conv`; per-dimension settings are cut or repeated to `ndim`."""
    c_in, c_out, kernel, stride, padding, dilation, groups, mode, window = GEOMETRIES[geometry]

    def fit(value):
        return value if isinstance(value, int | str) or value is None else (*value, *value)[:ndim]

    kernel = fit(kernel) if not isinstance(kernel, int) else (kernel,) * ndim
    x = torch.randn(2, c_in, *SIZES[ndim], dtype=dtype, requires_grad=True)
    weight = torch.randn(c_out, c_in // groups, *kernel, dtype=dtype, requires_grad=True)
    bias = torch.randn(c_out, dtype=dtype, requires_grad=True)
    settings = {
        "stride": fit(stride),
        "padding": fit(padding),
        "dilation": fit(dilation),
        "groups": groups,
        "padding_mode": mode,
        "norm_window": fit(window),
    }
    return (x, weight, bias), settings


def assert_same(efficient, definition, inputs, **tolerance):
    """Equal values, and equal gradients for one random cotangent."""
    torch.testing.assert_close(efficient, definition, **tolerance)
    cotangent = torch.randn_like(definition)
    gradients = [torch.autograd.grad((y * cotangent).sum(), inputs) for y in (efficient, definition)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kn_conv_is_its_definition(geometry, ndim):
    inputs, settings = arguments(geometry, ndim)
    for dropout in ({}, {"dropout": 0.3, "dropout_form": "expected"}):
        ours = functional.kn_conv(*inputs, **settings, **dropout)
        assert_same(ours, functional.naive.kn_conv(*inputs, **settings, **dropout), inputs, **EXACT)


KNOWN_TO_TORCH = [
    "plain",
    "pointwise",
    "rectangular",
    "dilated",
    "groups",
    "depthwise",
    "patches",
    "strided, even window",
]


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("geometry", KNOWN_TO_TORCH)
def test_kn_conv_has_the_shape_of_a_convolution(geometry, ndim):
    (x, weight, bias), settings = arguments(geometry, ndim)
    y = functional.kn_conv(x, weight, bias, **settings)
    del settings["padding_mode"], settings["norm_window"]
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[ndim]
    assert y.shape == convolve(x, weight, bias, **settings).shape


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("kernel_size, stride, padding", [(1, 1, 0), (2, 2, 0), (2, 1, 0), (3, 2, 1), (2, 3, 1)])
def test_kernel_norm_is_its_definition(kernel_size, stride, padding, ndim):
    x = torch.randn(2, 5, *SIZES[ndim], dtype=torch.float64, requires_grad=True)
    for dropout in ({}, {"dropout": 0.3, "dropout_form": "expected"}):
        ours = functional.kernel_norm(x, kernel_size, stride, padding, **dropout)
        assert_same(ours, functional.naive.kernel_norm(x, kernel_size, stride, padding, **dropout), [x], **EXACT)


@pytest.mark.parametrize("form", [functional.kn_conv, functional.naive.kn_conv], ids=["efficient", "naive"])
@pytest.mark.parametrize("case", golden.CASES["conv"], ids=lambda case: case["name"])
def test_kn_conv_is_the_published_layer(case, form):
    names = ["x", "weight", "bias"] if case["bias"] else ["x", "weight"]
    inputs = [golden.array("conv", case, name).requires_grad_() for name in names]
    options = {"stride": tuple(case["stride"]), "padding": golden.padding(case), "groups": case["groups"]}
    y = form(*inputs, **options, eps=case["eps"])
    torch.testing.assert_close(y, golden.array("conv", case, "y"), **EXACT)
    gradients = torch.autograd.grad((y * golden.array("conv", case, "v")).sum(), inputs)
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(gradient, golden.array("conv", case, f"grad_{name}"), **EXACT)


@pytest.mark.parametrize("form", [functional.kernel_norm, functional.naive.kernel_norm], ids=["efficient", "naive"])
@pytest.mark.parametrize("case", golden.CASES["norm"], ids=lambda case: case["name"])
def test_kernel_norm_is_the_published_layer(case, form):
    y = form(golden.array("norm", case, "x"), tuple(case["kernel_size"]), tuple(case["stride"]), golden.padding(case))
    torch.testing.assert_close(y, golden.array("norm", case, "y"), **EXACT)


def statistics(x, kernel_size, stride=1, **options):
    """Unit statistics of an unpadded (N, C, H, W) map, flattened over units."""
    ones, none = (1, 1), ((0, 0), (0, 0))
    mean, var, _ = functional.unit_statistics(x, (kernel_size,) * 2, (stride,) * 2, none, ones, **options)
    return mean.flatten(), var.flatten()


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("form", ["shared", "unit", "moments"])
def test_kn_conv_normalizes_by_what_was_drawn(form, geometry):
    """The convolution of the definition under the statistics that the same seed draws."""
    (x, weight, bias), settings = arguments(geometry, 2)
    torch.manual_seed(1)
    y = functional.kn_conv(x, weight, bias, **settings, dropout=0.2, dropout_form=form)
    flat = {**settings, "norm_window": None}
    unscaled = functional.naive.kn_conv(x, weight, **flat, eps=1e30) * 1e15  # U * W - mu sum(W)
    window, ones = settings["norm_window"], (1, 1)
    kernel, stride, dilation = (places.ntuple(v, 2, "") for v in _sizes(weight, settings))
    pairs = places.padding_pairs(settings["padding"], kernel, stride, dilation)
    own = functional.unit_statistics(x, kernel, stride, pairs, dilation, padding_mode=settings["padding_mode"]).mean
    if window is not None:
        window = places.ntuple(window, 2, "")
        pairs, kernel, dilation = places.window_pairs(pairs, kernel, dilation, window), window, ones
    torch.manual_seed(1)
    drawn = functional.unit_statistics(
        x, kernel, stride, pairs, dilation, dropout=0.2, dropout_form=form, padding_mode=settings["padding_mode"]
    )
    moved = (own - drawn.mean) * weight.flatten(1).sum(1)[:, None, None]
    expected = (unscaled + moved) / (drawn.var + 1e-5).sqrt() + bias[:, None, None]
    assert_same(y, expected, (x, weight, bias), rtol=1e-8, atol=1e-8)


def _sizes(weight, settings):
    return tuple(weight.shape[2:]), settings["stride"], settings["dilation"]


@pytest.mark.parametrize("geometry", ["patches", "pointwise", "window smaller than kernel"])
def test_shared_masks_are_the_definitions_masks(geometry):
    inputs, settings = arguments(geometry, 2)
    settings["padding"] = 0  # the definition draws its mask on the padded input
    drawn = []
    for form in (functional.kn_conv, functional.naive.kn_conv):
        torch.manual_seed(1)
        drawn.append(form(*inputs, **settings, dropout=0.3, dropout_form="shared"))
    if geometry == "window smaller than kernel":  # which crops before it draws
        assert drawn[0].shape == drawn[1].shape
    else:
        assert_same(*drawn, inputs, **EXACT)


def test_one_mask_is_shared_by_overlapping_units():
    x, p = torch.randn(2, 5, 7, 7, dtype=torch.float64), 0.3
    torch.manual_seed(1)
    mean, var = statistics(x, 3, dropout=p, dropout_form="shared")
    torch.manual_seed(1)
    expected_mean, expected_var = statistics(F.dropout(x, p), 3)
    torch.testing.assert_close(mean, expected_mean, **EXACT)
    torch.testing.assert_close(var, expected_var, **EXACT)


def repeated(unit, count, form, p, take=None):
    """`count` draws of the statistics of one unit (C, k, k), every copy beside the others: (count,) each."""
    c, k, _ = unit.shape
    x = unit.repeat(1, 1, count).reshape(1, c, k, count * k)
    return (take or statistics)(x, k, k, dropout=p, dropout_form=form)


@pytest.mark.parametrize("form", ["shared", "unit", "moments", "moments, compiled"])
@pytest.mark.parametrize("p", [0.05, 0.25])
def test_every_dropout_form_has_the_moments_of_eq_1(form, p):
    """Mean, variance and covariance of (mu', m_2') over 100,000 draws against the closed form."""
    form, *compiled = form.split(", ")
    take = torch.compile(statistics, fullgraph=True, backend="aot_eager") if compiled else statistics
    unit, count = torch.randn(16, 3, 3, dtype=torch.float64).relu() + 0.1, 100_000
    n, m = unit.numel(), [unit.pow(j).mean().item() for j in range(5)]
    mean, var = repeated(unit, count, form, p, take)
    second = var + mean.square()
    spread = torch.cov(torch.stack([mean, second]))
    sure = 6 / count**0.5  # six standard errors
    assert mean.mean() == pytest.approx(m[1], abs=sure * (p * m[2] / ((1 - p) * n)) ** 0.5)
    assert second.mean() == pytest.approx(m[2] / (1 - p), abs=sure * (p * m[4] / ((1 - p) ** 3 * n)) ** 0.5)
    assert spread[0, 0].item() == pytest.approx(p * m[2] / ((1 - p) * n), rel=2 * sure)
    assert spread[1, 1].item() == pytest.approx(p * m[4] / ((1 - p) ** 3 * n), rel=2 * sure)
    assert spread[0, 1].item() == pytest.approx(p * m[3] / ((1 - p) ** 2 * n), rel=2 * sure)
    expected = statistics(unit[None], 3, dropout=p, dropout_form="expected")
    assert expected[1].item() == pytest.approx(var.mean().item(), rel=0.003)


def test_two_normal_numbers_from_64_bits():
    """Moments to the fourth and the independence of the two; the extreme bits are finite."""
    count = 1_000_000
    pair = torch.stack(normal_pair(torch.randint(-(2**63), 2**63 - 1, (count,)))).double()
    sure = 6 / count**0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (pair.pow(power).mean(1) - moment).abs().max() < sure * variance**0.5
    for a, b in ((1, 1), (2, 1), (1, 2), (2, 2)):
        product = (pair[0].pow(a) * pair[1].pow(b)).mean().item()
        assert product == pytest.approx(float(a == b == 2), abs=sure * 9**0.5)
    assert pair.abs().max() > 4.5
    extremes = torch.tensor([-(2**63), 2**63 - 1, 0, -1, 0x7FFFFFFF])
    assert all(numbers.isfinite().all() for numbers in normal_pair(extremes))


@pytest.mark.parametrize("form", ["shared", "unit"])
def test_dropout_has_the_gradient_of_what_was_drawn(form):
    x = torch.randn(1, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 9, 3, 3, dtype=torch.float64, requires_grad=True)

    def drawn(x, weight):
        torch.manual_seed(3)
        return functional.kn_conv(x, weight, padding=1, dropout=0.2, dropout_form=form)

    assert torch.autograd.gradcheck(drawn, (x, weight))


def test_a_draw_is_constant_to_the_gradient_and_free_of_scale():
    """mu' - mu and m_2' in units of sqrt(m_2) and m_2 are constants: the gradient is that of the rest."""
    x = torch.randn(1, 9, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 9, 3, 3, dtype=torch.float64, requires_grad=True)
    where = ((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
    shift, other = 0.05 * torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    drawn = Draw(shift, 1.2 + other)

    def layer(x, weight):
        statistics = unit_statistics(x, *where, dropout=0.2, drawn=drawn)
        return functional.kn_conv(x, weight, padding=1, statistics=statistics, eps=1e-30)

    assert torch.autograd.gradcheck(layer, (x, weight))
    assert torch.allclose(layer(x, weight), layer(1000 * x, weight))
    torch.manual_seed(0)
    one = unit_statistics(x, *where, dropout=0.2)
    torch.manual_seed(0)
    scaled = unit_statistics(1000 * x, *where, dropout=0.2)
    assert torch.allclose(1000 * one.mean, scaled.mean) and torch.allclose(1e6 * one.var, scaled.var)


def test_gradcheck_and_double_backward():
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def layer(x, weight, bias):
        return functional.kn_conv(x, weight, bias, padding=((1, 0), (0, 1)), dropout=0.1, dropout_form="expected")

    assert torch.autograd.gradcheck(layer, (x, weight, bias))
    assert torch.autograd.gradgradcheck(layer, (x, weight, bias))


@pytest.mark.parametrize("form", ["none", "expected", "shared", "unit", "moments"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e3])
def test_a_flat_image_does_not_spike(form, channels, value):
    """All units are constant: what comes out is the bias, up to what dropout can shift by one SD."""
    weight, bias = torch.randn(8, channels, 3, 3), torch.randn(8)
    dropout = {} if form == "none" else {"dropout": 0.05, "dropout_form": form}
    x = torch.full((64, channels, 8, 8), value)
    y = functional.kn_conv(x, weight, bias, **dropout) - bias[:, None, None]
    if form in ("none", "expected"):
        assert y.abs().max() < 1e-3
    else:
        assert (y.abs() <= 1.01 * weight.flatten(1).sum(1).abs()[:, None, None] + 1e-3).all()


@pytest.mark.parametrize("form", ["none", "expected", "shared", "unit", "moments"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_flat_regions_do_not_open_a_deep_network(value, form):
    """Beside content (a crop's black border, a white background) flat units must not multiply gradients by
    1 / sqrt(eps) = 316 in every layer: with zero biases, rounding would decide which activations are open."""
    x = torch.full((2, 16, 12, 12), value)
    x[..., 6:] = torch.rand(2, 16, 12, 6)
    x.requires_grad_()
    dropout = {} if form == "none" else {"dropout": 0.05, "dropout_form": form}
    y = x
    for _ in range(8):
        weight = torch.randn(16, 16, 3, 3) / 6
        y = functional.kn_conv(y.relu(), weight, torch.zeros(16), padding=1, **dropout)
    (gradient,) = torch.autograd.grad(y.square().mean(), x)
    if value == 0 or form == "none":  # elsewhere dropout makes flat units differ, as it should
        assert gradient[..., :4].abs().max() <= 3 * gradient[..., 7:].abs().max()
    spike = gradient.abs().max()
    if form == "expected" and value and 10 <= spike < 100:
        # Which seeds are above 10 depends on the CPU.
        pytest.xfail(
            "expected statistics give a flat unit a spread, so that with zero biases its output is rounding, not the "
            "bias, and the next layers are steep there; flat units are to be told by the spread without dropout"
        )
    assert spike < 10


def test_a_constant_unit_passes_no_gradient_and_a_varied_one_does():
    x = torch.cat([torch.full((1, 4, 3, 3), 2.0), torch.randn(1, 4, 3, 3)]).requires_grad_()
    bias = torch.randn(5, requires_grad=True)
    y = functional.kn_conv(x, torch.randn(5, 4, 3, 3), bias)
    torch.testing.assert_close(y[0].flatten(), bias)
    gradient, gradient_bias = torch.autograd.grad(y.sum(), (x, bias))
    assert gradient[0].abs().max() == 0 < gradient[1].abs().max()
    torch.testing.assert_close(gradient_bias, torch.full((5,), 2.0))


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.3, 1.0, 10.0])
def test_a_flat_image_yields_the_bias_in_low_precision(value, dtype, groups):
    weight, bias = torch.randn(16, 16 // groups, 3, 3) / 12, torch.randn(16)
    x = torch.full((2, 16, 8, 8), value)
    with torch.autocast("cpu", dtype=dtype):
        mixed = functional.kn_conv(x, weight, bias, groups=groups)
    pure = functional.kn_conv(x.to(dtype), weight.to(dtype), bias.to(dtype), groups=groups)
    for y, exact in ((mixed, bias), (pure, bias.to(dtype))):
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), exact.float()[:, None, None].expand_as(y), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("scale, offset", [(1, 0), (1, 1e3), (1e-3, 1.0), (1e3, 0)])
def test_float32_matches_float64_on_large_means_and_small_spreads(scale, offset, groups):
    x = torch.randn(2, 16, 9, 9, dtype=torch.float64) * scale + offset
    x = x.float().double()  # the same numbers in both precisions
    weight = torch.randn(8 * groups, 16 // groups, 3, 3, dtype=torch.float64) / 12
    y = functional.kn_conv(x.float(), weight.float(), groups=groups)
    torch.testing.assert_close(y.double(), functional.naive.kn_conv(x, weight, groups=groups), rtol=0, atol=1e-3)
    norm = functional.kernel_norm(x.float(), 3, 3)
    torch.testing.assert_close(norm.double(), functional.naive.kernel_norm(x, 3, 3), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kernels", ["auto", "eager"])
def test_padding_beside_a_large_mean(kernels, monkeypatch):
    """The zeros of the border cost the units inside no precision, by the operation and by the formula."""
    monkeypatch.setattr("knport.kernels.dispatch.WISH", kernels)
    x = (torch.randn(2, 16, 9, 9, dtype=torch.float64) + 1e3).float().double()
    weight = torch.randn(8, 16, 3, 3, dtype=torch.float64) / 12
    y = functional.kn_conv(x.float(), weight.float(), padding=1)[..., 1:-1, 1:-1]
    exact = functional.naive.kn_conv(x, weight, padding=1)[..., 1:-1, 1:-1]
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype, atol", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@pytest.mark.parametrize("groups", [1, 4])
def test_low_precision_inputs(dtype, atol, groups):
    x, weight = torch.randn(2, 16, 9, 9).to(dtype), (torch.randn(16, 16 // groups, 3, 3) / 12).to(dtype)
    y = functional.kn_conv(x, weight, groups=groups)
    assert y.dtype == dtype
    exact = functional.naive.kn_conv(x.double(), weight.double(), groups=groups)
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=atol)
    assert functional.kernel_norm(x).dtype == dtype


def test_batch_of_nothing():
    assert functional.kn_conv(torch.randn(0, 4, 8, 8), torch.randn(6, 4, 3, 3), padding=1).shape == (0, 6, 8, 8)
    assert functional.kernel_norm(torch.randn(0, 4, 8, 8), 2, 2).shape == (0, 4, 8, 8)


@pytest.mark.parametrize("form", ["expected", "shared", "moments"])
def test_images_do_not_see_each_other(form):
    x, weight = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.randn(6, 4, 3, 3, dtype=torch.float64)
    together = functional.kn_conv(x, weight, dropout=0.0, dropout_form=form)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], functional.kn_conv(x[i : i + 1], weight), **EXACT)


@pytest.mark.parametrize("padding", [-1, (1, 2, 3), ((1, 2, 3), (0, 0)), "sam", ((1, -1), (0, 0))], ids=repr)
def test_bad_padding_says_what_is_expected(padding):
    with pytest.raises(KNPortError, match=r"padding=.*expected"):
        functional.kn_conv(torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3), padding=padding)


def test_other_mistakes_are_named():
    x, weight = torch.randn(1, 2, 5, 5), torch.randn(2, 2, 3, 3)
    with pytest.raises(KNPortError, match="smaller than the kernel"):
        functional.kn_conv(x[..., :2], weight)
    with pytest.raises(KNPortError, match="stride 1 only"):
        functional.kn_conv(x, weight, stride=2, padding="same")
    with pytest.raises(KNPortError, match="did you mean 'moments'"):
        functional.kn_conv(x, weight, dropout=0.1, dropout_form="moment")


def test_the_statistics_need_no_tensor_of_the_kernels_area():
    """Saved for the backward pass of a 7 x 7 layer: as much as for a 1 x 1 layer, up to one-channel maps."""

    def saved(kernel_size):
        sizes = {}
        x = torch.randn(2, 32, 20, 20, requires_grad=True)
        weight = torch.randn(32, 32, kernel_size, kernel_size, requires_grad=True)

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = functional.kn_conv(x, weight, padding=kernel_size // 2, dropout=0.05)
        kernels = 2 * weight.untyped_storage().nbytes()
        del y
        return sum(sizes.values()) - kernels

    full = 2 * 32 * 20 * 20 * 4
    assert saved(7) < saved(1) + 0.5 * full


@pytest.mark.parametrize("sides", list(itertools.product([0, 1, 2], repeat=4)), ids=str)
def test_every_asymmetric_padding_equals_padding_by_hand(sides):
    top, bottom, left, right = sides
    x, weight = torch.randn(1, 3, 6, 5, dtype=torch.float64), torch.randn(2, 3, 2, 2, dtype=torch.float64)
    for stride in (1, 2):
        ours = functional.kn_conv(x, weight, stride=stride, padding=((top, bottom), (left, right)))
        by_hand = functional.kn_conv(F.pad(x, (left, right, top, bottom)), weight, stride=stride)
        torch.testing.assert_close(ours, by_hand, **EXACT)
