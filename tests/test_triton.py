"""The Triton kernels against the definition: values and every gradient.

They run on a GPU where there is one, else in Triton's interpreter, which has to be asked for before triton is imported:
`test_in_the_interpreter` runs this file once more, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from knport import functional
from knport.functional import efficient, naive
from knport.geometry import Box, ntuple, padding_pairs
from knport.kernels import dispatch
from knport.kernels.cpu_units import Units

HERE = Path(__file__)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="no GPU; test_in_the_interpreter runs it" if HAS_TRITON else "triton is not installed",
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """In the interpreter a program costs the same whatever its tile: large tiles, but more than one program."""
    if INTERPRETED:
        from knport.kernels import triton_support

        monkeypatch.setattr(triton_support, "_ENOUGH_PROGRAMS", 2)


# dtype: atol, rtol of values and gradients that are of the order of 1
TOLERANCE = {
    torch.float64: {"atol": 1e-11, "rtol": 1e-11},
    torch.float32: {"atol": 2e-5, "rtol": 2e-5},
    torch.float16: {"atol": 1e-2, "rtol": 1e-2},
    torch.bfloat16: {"atol": 8e-2, "rtol": 4e-2},
}

# (size, in, out, kernel, stride, padding, dilation, norm_window)
GEOMETRIES = {
    "plain": ((13, 11), 5, 7, 3, 1, 1, 1, None),
    "pointwise": ((7, 5), 37, 3, 1, 1, 0, 1, None),
    "even kernel, one side padded": ((7, 11), 5, 7, 2, 1, ((1, 0), (0, 1)), 1, None),
    "strided, one side padded": ((7, 11), 5, 7, 2, 2, ((1, 0), (0, 1)), 1, None),
    "rectangular": ((11, 7), 5, 3, (3, 2), (2, 1), (2, 0), 1, None),
    "stride past the kernel": ((11, 7), 5, 3, 2, 3, 1, 1, None),
    "dilated": ((11, 13), 5, 3, 3, 2, 2, 2, None),
    "pointwise, wider window": ((7, 5), 5, 3, 1, 1, 0, 1, 3),
    "strided, even window": ((7, 5), 5, 3, 3, 2, 1, 1, (2, 4)),
    "window smaller than the kernel": ((7, 5), 5, 3, 3, 1, 1, 1, 1),
    "several blocks of channels": ((3, 2), 131, 67, 2, 1, 0, 1, None),
    "small": ((3, 2), 5, 3, 2, 1, 0, 1, None),
    "sequence": ((23,), 5, 7, 3, 2, ((2, 1),), 1, None),
    "volume": ((5, 3, 7), 3, 5, (3, 2, 2), (1, 2, 1), 1, 1, None),
}
FORMS = {
    "none": {},
    "expected": {"dropout": 0.3, "dropout_form": "expected"},
}


def make(geometry, dtype=torch.float64, memory_format=None):
    """Inputs in `dtype` (x of memory_format), and the keyword arguments of `kn_conv`."""
    size, c_in, c_out, kernel, stride, padding, dilation, window = GEOMETRIES[geometry]
    kernel = ntuple(kernel, len(size), "kernel_size")
    x = torch.randn(2, c_in, *size, dtype=torch.float64) + 0.5
    weight = torch.randn(c_out, c_in, *kernel, dtype=torch.float64) / (c_in * len(size)) ** 0.5
    bias = torch.randn(c_out, dtype=torch.float64)
    inputs = [t.to(DEVICE, dtype) for t in (x, weight, bias)]
    if memory_format is not None:
        inputs[0] = inputs[0].to(memory_format=memory_format)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "norm_window": window}
    return [t.requires_grad_() for t in inputs], settings


def layer(x, kernel_size, stride=1, padding=0, dilation=1, *, norm_window=None, eps=1e-5, **how):
    """What there is to know of a layer beside its tensors."""
    ndim = x.dim() - 2
    kernel_size, stride, dilation = (ntuple(value, ndim, "") for value in (kernel_size, stride, dilation))
    kernel = Box(kernel_size, stride, padding_pairs(padding, kernel_size, stride, dilation), dilation)
    defaults = {"dropout": 0.0, "dropout_form": "moments"}
    return Units(kernel, efficient._window(kernel, norm_window), eps, **defaults | how)


def fused_conv(x, weight, bias, *where, residual=None, activation="none", **how):
    """`knport.functional.kn_conv` on the Triton kernels, whatever would be chosen."""
    from knport.functional import gpu

    return gpu.kn_conv(x, weight, bias, layer(x, tuple(weight.shape[2:]), *where, **how), residual, activation)


def fused_norm(x, kernel_size, *where, **how):
    from knport.functional import gpu

    return gpu.kernel_norm(x, layer(x, kernel_size, *where, **how))


def doubles(inputs):
    return [t.detach().double().requires_grad_() for t in inputs]


def assert_same(ours, inputs, definition, exact, **tolerance):
    """Equal values, and equal gradients for one random cotangent; the definition in float64."""
    torch.testing.assert_close(ours.double(), definition, **tolerance)
    cotangent = torch.randn_like(definition).to(ours.dtype)
    mine = torch.autograd.grad(ours, inputs, cotangent)
    theirs = torch.autograd.grad(definition, exact, cotangent.double())
    for a, b in zip(mine, theirs, strict=True):
        scale = max(1.0, b.abs().max().item())  # bias gradients are sums of hundreds
        torch.testing.assert_close(a.double() / scale, b / scale, **tolerance)


# The interpreter and the compiler, from a machine without a GPU


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "KNPORT_KERNELS": "triton"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE), *_SLOW]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


_SLOW = ["-m", "not slow"]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow),
                                   pytest.param("float32", marks=pytest.mark.slow),
                                   pytest.param("float64", marks=pytest.mark.slow)])  # fmt: skip
def test_every_kernel_compiles(dtype, tmp_path):
    """For compute capability 9.0, down to machine code."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE.with_name("triton_compile.py")), dtype]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    compiled = {line.split()[0] for line in done.stdout.splitlines()}
    source = "".join(path.read_text() for path in (HERE.parents[1] / "knport/kernels").glob("triton_*.py"))
    assert compiled == {name for name in _jitted(source) if name.endswith("_kernel")}


# What each kernel writes, in the order of a forward and a backward pass of KNConv (with activation and residual) and
# KernelNorm. A kernel that seemed to write its inputs would have the compiler copy them.
TRACED = """\
_moments_kernel higher_ptr maps_ptr
_units_kernel rows_ptr
_epilogue_kernel y_ptr
_moments_kernel higher_ptr maps_ptr
_units_kernel rows_ptr
_norm_kernel y_ptr
_epilogue_backward_kernel grad_c_ptr grad_z_ptr partial_ptr rows_ptr
_units_backward_kernel out_ptr
_gather_kernel out_ptr
_norm_sums_kernel out_ptr
_units_backward_kernel out_ptr
_gather_kernel out_ptr
_norm_backward_kernel out_ptr
"""


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter shows the compiler no kernels")
def test_operators_show_the_compiler_their_kernels():
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE.with_name("triton_trace.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == TRACED


def _jitted(source: str) -> list[str]:
    lines = source.splitlines()
    return [lines[i + 1].split()[1].split("(")[0] for i, line in enumerate(lines) if line == "@triton.jit"]


# Layers against the definition


@needs_kernels
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_kn_conv_is_its_definition(geometry, form):
    inputs, settings = make(geometry)
    ours = fused_conv(*inputs, **settings, **FORMS[form])
    assert_same(ours, inputs, naive.kn_conv(*inputs, **settings, **FORMS[form]), inputs, **TOLERANCE[torch.float64])


@needs_kernels
@pytest.mark.parametrize("geometry", ["even kernel, one side padded", "strided, even window"])
@pytest.mark.parametrize("form", ["shared", "moments"])  # units of 20 entries draw a mask for both
def test_kn_conv_under_one_mask(geometry, form, monkeypatch):
    """As the plain operators with the same mask; the definition draws one for the padding too."""
    monkeypatch.setattr(dispatch, "WISH", "eager")
    inputs, settings = make(geometry)
    results = []
    for function in (fused_conv, functional.kn_conv):
        torch.manual_seed(9)
        results.append(function(*inputs, **settings, dropout=0.3, dropout_form=form))
    assert_same(results[0], inputs, results[1], inputs, **TOLERANCE[torch.float64])


def drawn_definition(x, weight, bias, noise, dropout, eps, kernel_size, stride, padding, dilation):
    """Eq. 4-5 with (mu', var') drawn from the moments of the unfolded units; the draw itself is a constant."""
    pairs = padding_pairs(padding, kernel_size, stride, dilation)
    units = naive.unfold(x, kernel_size, stride, pairs, dilation).flatten(3)  # (N, O, P, n)
    m1, m2, m3, m4 = (units.pow(j).mean(-1).unsqueeze(1) for j in (1, 2, 3, 4))
    keep, q = 1 - dropout, dropout / ((1 - dropout) * units.shape[-1])
    shift = (q**0.5 * noise[0]).detach()
    rest = (q * (m4 - m3**2 / m2)).sqrt() * noise[1]
    scale = ((m2 + m3 / m2.sqrt() * shift + rest) / (keep * m2)).detach()
    mean = m1 + shift * m2.sqrt()
    var = torch.maximum(scale * m2 - mean**2, (mean - m1) ** 2)
    normalized = (units - mean[:, 0, ..., None]) / (var[:, 0, ..., None] + eps).sqrt()
    return torch.einsum("nopi,ci->ncop", normalized, weight.flatten(1)) + bias[:, None, None]


@needs_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kn_conv_under_moments_dropout(dtype, memory_format):
    from knport.kernels import triton_units
    from knport.kernels.triton_support import draw_seed

    geometry = "several blocks of channels"
    inputs, _ = make(geometry, dtype, memory_format)
    exact = doubles(inputs)
    torch.manual_seed(3)
    ours = fused_conv(*inputs, dropout=0.1)
    torch.manual_seed(3)
    noise = triton_units.normals(draw_seed(inputs[0]), torch.empty(2, 1, *ours.shape[2:], device=DEVICE))
    definition = drawn_definition(*exact, noise.double(), 0.1, 1e-5, (2, 2), (1, 1), 0, (1, 1))
    assert ours.is_contiguous(memory_format=memory_format)
    assert_same(ours, inputs, definition, exact, **TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_and_layout(dtype, memory_format):
    for form in ("none", "expected"):
        inputs, settings = make("strided, one side padded", dtype, memory_format)
        exact = doubles(inputs)
        ours = fused_conv(*inputs, **settings, **FORMS[form])
        assert ours.dtype == dtype
        assert_same(ours, inputs, naive.kn_conv(*exact, **settings, **FORMS[form]), exact, **TOLERANCE[dtype])


# (size, kernel, stride, padding)
NORMS = {
    "pointwise": ((7, 5), 1, 1, 0),
    "tiles": ((7, 11), 2, 2, 0),
    "tiles, padded": ((7, 11), (3, 2), (3, 2), ((1, 1), (0, 1))),
    "gaps": ((11, 7), 2, 3, 1),
    "sequence": ((23,), 2, 2, 0),
    "volume": ((5, 3, 7), 2, 2, 1),
}


@needs_kernels
@pytest.mark.parametrize(
    ("geometry", "dtype"), [*[(g, torch.float64) for g in NORMS], *[("gaps", d) for d in TOLERANCE]]
)
def test_kernel_norm_is_its_definition(geometry, dtype):
    size, *where = NORMS[geometry]
    x = torch.randn(2, 37, *size, device=DEVICE, dtype=torch.float64).to(dtype).requires_grad_()
    for form in ({}, FORMS["expected"]):
        (exact,) = doubles([x])
        ours = fused_norm(x, *where, **form)
        assert ours.dtype == dtype
        assert_same(ours, [x], naive.kernel_norm(exact, *where, **form), [exact], **TOLERANCE[dtype])
        if len(size) == 2:
            x = x.detach().to(memory_format=torch.channels_last).requires_grad_()


@needs_kernels
def test_kernel_norm_under_moments_dropout():
    from knport.kernels import triton_units
    from knport.kernels.triton_support import draw_seed

    x = torch.randn(2, 37, 7, 5, device=DEVICE, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    ours = fused_norm(x, 2, 2, dropout=0.2)
    torch.manual_seed(3)
    noise = triton_units.normals(draw_seed(x), x.new_empty(2, 1, 3, 2))
    identity = torch.eye(148, device=DEVICE, dtype=torch.float64).reshape(148, 37, 2, 2)
    place = ((2, 2), (2, 2), 0, (1, 1))
    units = drawn_definition(x, identity, x.new_zeros(148), noise, 0.2, 1e-5, *place)  # (N, C k_h k_w, O, P)
    definition = F.pixel_shuffle(units, 2)
    assert_same(ours, [x], definition, [x], **TOLERANCE[torch.float64])


# Epilogue


@needs_kernels
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "silu", "mish"])
def test_residual_and_activation(activation, dtype=torch.float64):
    inputs, settings = make("even kernel, one side padded", dtype)
    residual = torch.randn(2, 7, 7, 11, device=DEVICE, dtype=dtype, requires_grad=True)
    exact = doubles([*inputs, residual])
    act = (lambda z: z) if activation == "none" else getattr(F, activation)
    definition = act(naive.kn_conv(*exact[:3], **settings) + exact[3])
    ours = fused_conv(*inputs, **settings, residual=residual, activation=activation)
    assert_same(ours, [*inputs, residual], definition, exact, **TOLERANCE[dtype])
    definition = act(naive.kn_conv(*exact[:3], **settings))
    ours = fused_conv(*inputs, **settings, activation=activation)
    assert_same(ours, inputs, definition, exact[:3], **TOLERANCE[dtype])


@needs_kernels
def test_an_unknown_activation_is_named():
    inputs, settings = make("plain")
    with pytest.raises(ValueError, match=r"tanh.*relu"):
        fused_conv(*inputs, **settings, activation="tanh")


# Numerics


@needs_kernels
@pytest.mark.parametrize("form", ["none", "expected"])
def test_large_means(form):
    inputs, settings = make("even kernel, one side padded", torch.float32)
    with torch.no_grad():
        inputs[0] += 1000
    settings["padding"] = 0
    exact = doubles(inputs)
    ours = fused_conv(*inputs, **settings, **FORMS[form])
    definition = naive.kn_conv(*exact, **settings, **FORMS[form])
    assert_same(ours, inputs, definition, exact, atol=1e-3, rtol=1e-3)


@needs_kernels
@pytest.mark.parametrize(
    ("value", "dtype"), [*((0.1, d) for d in TOLERANCE), (0.0, torch.float32), (1e4, torch.float32)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_a_constant_unit_yields_the_bias_and_passes_nothing(value, dtype, dropout):
    (x, weight, bias), _ = make("several blocks of channels" if value == 0.1 else "small", dtype)
    with torch.no_grad():
        x.fill_(value)
    form = {"dropout": dropout, "dropout_form": "expected" if value else "moments"} if dropout else {}
    y = fused_conv(x, weight, bias, **form)
    grad, grad_weight, grad_bias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert torch.equal(grad_bias, torch.full_like(bias, y.numel() / y.shape[1]))
    if value and dropout:  # the spread that dropout gives a constant unit; centred filters see none
        torch.testing.assert_close(y, bias[:, None, None].expand_as(y), **TOLERANCE[dtype])
    else:
        assert torch.equal(y, bias[:, None, None].expand_as(y))
        assert not grad.any() and not grad_weight.any()
    norm = fused_norm(x, 2, 2)
    assert not norm.any()
    assert not torch.autograd.grad(norm, x, torch.ones_like(norm))[0].any()


@needs_kernels
@pytest.mark.parametrize("scale", [1e-3, 1e-10, 1e-30])
def test_tiny_inputs(scale):
    inputs, settings = make("plain", torch.float32)
    with torch.no_grad():
        inputs[0] *= scale
    y = fused_conv(*inputs, **settings)
    reference = functional.kn_conv(*doubles(inputs), **settings)  # not the definition: flat up to rounding is flat
    assert torch.isfinite(torch.autograd.grad(y.sum(), inputs[0])[0]).all()
    if scale == 1e-3:
        torch.testing.assert_close(y.double(), reference, **TOLERANCE[torch.float32])
    else:
        torch.testing.assert_close(y, inputs[2][:, None, None].expand_as(y), **TOLERANCE[torch.float32])


@needs_kernels
def test_strided_inputs_and_gradients():
    """Crops, broadcasts and transposes: the kernels take strides as they come."""
    (x, weight, bias), settings = make("plain")
    wide = torch.randn(2, 5, 17, 19, device=DEVICE, dtype=torch.float64)
    views = [wide[:, :, 2:13, 3:16].transpose(2, 3), wide[:1, :, :13, :11].expand(3, -1, -1, -1), wide[:, :, ::2, 1::2]]
    for view in views:
        x = view.detach().requires_grad_()
        assert x.stride() == view.stride()
        ours, definition = (f(x, weight, bias, **settings) for f in (fused_conv, naive.kn_conv))
        torch.testing.assert_close(ours, definition, **TOLERANCE[torch.float64])
        for cotangent in (torch.ones_like(ours[:1, :1, :1, :1]).expand_as(ours), torch.randn_like(ours.mT).mT):
            mine, theirs = (torch.autograd.grad(y, x, cotangent, retain_graph=True)[0] for y in (ours, definition))
            torch.testing.assert_close(mine, theirs, **TOLERANCE[torch.float64])


@needs_kernels
def test_batch_independence():
    inputs, settings = make("plain")
    x = inputs[0].detach()
    whole = fused_conv(x, *inputs[1:], **settings)
    alone = [fused_conv(image[None], *inputs[1:], **settings) for image in x]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-14, rtol=1e-14)  # the convolution may sum otherwise


# Randomness


@needs_kernels
def test_the_draw_has_the_moments_of_dropout(monkeypatch):
    """Mean, variance and covariance of (mu', m_2') over many draws for one unit; see kernels/eager.py."""
    from knport.kernels import triton_functions, triton_units
    from knport.kernels.triton_support import Box3, draw_seed

    monkeypatch.setattr(triton_units, "_BLOCK", 4096)
    p, n, draws = 0.2, 96, 40000
    unit = torch.randn(1, n, 1, 1, device=DEVICE, dtype=torch.float64) + 0.7
    m = [unit.pow(j).mean().item() for j in range(5)]
    maps = [m.expand(draws, -1, -1, -1).contiguous() for m in triton_functions.channel_moments(unit, True)[1:]]
    box = Box3.of((1, 1), Box((1, 1), (1, 1), ((0, 0),) * 2, (1, 1)))
    mean, var, _ = triton_functions.unit_statistics(*maps, draw_seed(unit), box, triton_units.MOMENTS, p, n, (1, 1))
    drawn = torch.stack([mean.flatten(), (var + mean.square()).flatten()])
    q = p / ((1 - p) * n)
    expected = torch.tensor([[q * m[2], q * m[3] / (1 - p)], [q * m[3] / (1 - p), q * m[4] / (1 - p) ** 2]])
    covariance = drawn.cov().float().cpu()
    torch.testing.assert_close(covariance, expected, rtol=0.03, atol=0.03 * expected.diag().prod().sqrt().item())
    error = (drawn.mean(1).cpu() - torch.tensor([m[1], m[2] / (1 - p)], dtype=torch.float64)).abs()
    assert (error < 4 * (expected.diag() / draws).sqrt()).all()
    assert ((var - (mean - m[1]) ** 2) >= -1e-12).all()  # the shift that dropout causes is at most one SD


@needs_kernels
def test_the_seed_decides_the_draw():
    inputs, settings = make("several blocks of channels", torch.float32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(fused_conv(*inputs, **settings, dropout=0.1))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[2], fused_conv(*inputs, **settings, dropout=0.1))  # and the next draw is another


@needs_kernels
def test_checkpointing_draws_the_same_again():
    from torch.utils.checkpoint import checkpoint

    inputs, settings = make("several blocks of channels", torch.float32)

    def layer(x):
        return fused_conv(x, *inputs[1:], **settings, dropout=0.3)

    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(5)
        y = run(inputs[0])
        torch.randn(3, device=DEVICE)  # what comes between forward and backward
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


# What PyTorch asks of a function


def second_derivatives(y, inputs):
    """Of random projections of the gradients, for the inputs and for the cotangent; the same numbers at every call."""
    generator = torch.Generator().manual_seed(4)

    def random_like(t):
        return torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device)

    cotangent = random_like(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, cotangent, create_graph=True)
    projected = sum((g * random_like(g)).sum() for g in first)
    return torch.autograd.grad(projected, [*inputs, cotangent], allow_unused=True, materialize_grads=True)


@needs_kernels
@pytest.mark.parametrize("form", [{}, FORMS["expected"]])
def test_double_backward(form):
    inputs, settings = make("strided, one side padded")
    derivatives = [second_derivatives(f(*inputs, **settings, **form), inputs) for f in (fused_conv, naive.kn_conv)]
    x = [inputs[0].detach().requires_grad_()]
    derivatives += [second_derivatives(f(*x, (2, 3), (2, 3), 1, **form), x) for f in (fused_norm, naive.kernel_norm)]
    for ours, exact in (derivatives[:2], derivatives[2:]):
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@needs_kernels
def test_double_backward_under_moments_dropout():
    from knport.kernels import triton_units
    from knport.kernels.triton_support import draw_seed

    inputs, _ = make("several blocks of channels")
    torch.manual_seed(3)
    ours = second_derivatives(fused_conv(*inputs, dropout=0.1, activation="silu"), inputs)
    torch.manual_seed(3)
    noise = triton_units.normals(draw_seed(inputs[0]), torch.empty(2, 1, 2, 1, device=DEVICE)).double()
    definition = drawn_definition(*inputs, noise, 0.1, 1e-5, (2, 2), (1, 1), 0, (1, 1))
    for a, b in zip(ours, second_derivatives(F.silu(definition), inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@needs_kernels
def test_autocast_keeps_float32_for_statistics():
    inputs, settings = make("plain", torch.float32)
    exact = doubles(inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = fused_conv(*inputs, **settings)
    assert ours.dtype == torch.bfloat16
    grads = torch.autograd.grad(ours.float().sum(), inputs, retain_graph=True)
    assert all(g.dtype == torch.float32 for g in grads)
    assert_same(ours, inputs, naive.kn_conv(*exact, **settings), exact, **TOLERANCE[torch.bfloat16])


@needs_kernels
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compile_without_graph_breaks(dropout, monkeypatch):
    """The operators trace, with their derivatives: the same values as outside of the compiler."""
    monkeypatch.setattr(dispatch, "WISH", "triton")
    inputs, _ = make("several blocks of channels", torch.float32)

    def network(x, weight, bias):
        y = fused_conv(x, weight, bias, padding=1, dropout=dropout, activation="relu")
        y = fused_conv(y, weight[:, :67], bias, dropout=0.0, residual=y[..., 1:, 1:])
        return fused_norm(y, 1, dropout=dropout)

    # the interpreter has no kernel that inductor could generate code for
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    results = []
    for run in (network, compiled):
        torch.manual_seed(7)
        y = run(*inputs)
        results.append((y, *torch.autograd.grad(y.square().mean(), inputs)))
    same_numbers = not dropout or DEVICE == "cpu"  # inductor draws the seed from its own generator
    for a, b in zip(*results, strict=True):
        if same_numbers:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        else:
            torch.testing.assert_close(a.std(), b.std(), atol=0.0, rtol=0.1)


@needs_kernels
def test_operators_are_what_they_are_registered_as():
    """Schema, fake results and derivative of every operator, by PyTorch's own checks."""
    from knport.kernels import triton_ops, triton_units
    from knport.kernels.triton_support import Box3

    x = torch.randn(2, 17, 5, 7, device=DEVICE, requires_grad=True)
    box = Box3.of((5, 7), Box((2, 2), (2, 2), ((0, 0), (0, 1)), (1, 1))).flat()
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)
    maps, higher = triton_ops._channel_moments(x.detach(), True)
    maps.requires_grad_()
    where = (box, triton_units.MOMENTS, 0.1, 68)
    rows = triton_ops._unit_statistics(maps.detach(), higher, seed, *where, (2, 4))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for operator, arguments in [
        (triton_ops._channel_moments, (x, True)),
        (triton_ops._unit_statistics, (maps, higher, seed, *where, (2, 4))),
        (triton_ops._unit_statistics_backward, (maps.detach(), rows, rows[:3], *where)),
        (triton_ops._kernel_norm, (x, seed, *where, 1e-5, (2, 4), (4, 8))),
    ]:
        torch.library.opcheck(operator, arguments, test_utils=checks)
    c = torch.randn(2, 3, 2, 4, device=DEVICE, requires_grad=True)
    bias = torch.randn(3, device=DEVICE, requires_grad=True)
    sums = torch.randn(2, 3, device=DEVICE)
    means = rows[0], rows[1].abs(), rows[2]
    arguments = (c, *means, sums[1], sums, bias, c.detach(), 1e-5, torch.float32, 2, True, True)
    torch.library.opcheck(triton_ops._normalize_units, arguments, test_utils=checks)


# Which kernels run


def test_what_runs_on_a_cpu(monkeypatch):
    x = torch.randn(2, 3, 5, 5)
    how = layer(x, 3)
    monkeypatch.setattr(dispatch, "WISH", "auto")
    assert dispatch.backend(x, how).name == "cpu"
    assert dispatch.backend(x.double(), how).name == "eager"
    if HAS_TRITON:
        assert "cpu" in dispatch.backend(x.double(), how).reason
    monkeypatch.setattr(dispatch, "WISH", "eager")
    assert dispatch.backend(x, how) == ("eager", "KNPORT_KERNELS=eager")


def test_the_choice_traces_and_exports(monkeypatch):
    """No graph break by asking, and PyTorch's own operators in an exported graph."""
    monkeypatch.setattr(dispatch, "WISH", "auto")
    how = layer(torch.empty(1, 3, 5, 5), 3)

    class Asks(torch.nn.Module):
        def forward(self, x):
            return x + 1 if dispatch.backend(x, how).name == "eager" else x

    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(Asks()(x), x)  # as one operation, on a CPU
    assert torch.equal(torch.compile(Asks(), fullgraph=True, backend="eager")(x), x + 1)
    assert torch.equal(torch.export.export(Asks(), (x,)).module()(x), x + 1)


@needs_kernels
def test_the_reason_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "WISH", "triton")
    x = torch.randn(2, 4, 5, 5, device=DEVICE)
    weight = torch.randn(3, 4, 2, 2, device=DEVICE)
    conv, norm = layer(x, 2), layer(x, 2, 2)
    assert dispatch.backend(x, conv, weight, None).name == "triton"
    assert dispatch.backend(x, norm, norm=True).name == "triton"
    said = []
    torch.func.vmap(lambda v: (said.append(dispatch.backend(v[None], conv)), v)[1])(x)
    for (name, reason), expected in [
        (dispatch.backend(x, conv._replace(groups=2)), "groups=2"),
        (dispatch.backend(x, conv._replace(padding_mode="reflect")), "reflect"),
        (dispatch.backend(x, layer(x, 2, dropout=0.1, dropout_form="unit")), "unit"),
        (dispatch.backend(x, conv, statistics_given=True), "beforehand"),
        (dispatch.backend(x, conv, norm=True), "overlap"),
        (dispatch.backend(x, layer(x, 2, 2, dropout=0.1), norm=True), "64"),
        (dispatch.backend(x, layer(x, 2, 2, dropout=0.1, dropout_form="shared"), norm=True), "shared"),
        (dispatch.backend(x[:0], conv), "empty"),
        (dispatch.backend(x.to(torch.int32), conv), "int32"),
        (dispatch.backend(x, conv, weight.double()), "float64"),
        (said[0], "torch.func"),
    ]:
        assert name != "triton" and expected in reason


def test_a_wrong_wish_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import knport.functional, knport.kernels.dispatch"],
        env={**os.environ, "KNPORT_KERNELS": "cuda"}, capture_output=True, text=True, cwd=HERE.parents[1], timeout=300,
    )  # fmt: skip
    assert done.returncode and "KNPORT_KERNELS" in done.stderr and "eager" in done.stderr
