"""What the layers must survive, and what their arguments mean."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import knport
from knport import functional
from knport.errors import KNPortError, UnknownName

KN_CONVS = {1: knport.KNConv1d, 2: knport.KNConv2d, 3: knport.KNConv3d}
KERNEL_NORMS = {1: knport.KernelNorm1d, 2: knport.KernelNorm2d, 3: knport.KernelNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZES = {1: (12,), 2: (12, 9), 3: (5, 6, 7)}

# every kind of layer once, small
LAYERS = {
    "3x3": lambda **kw: knport.KNConv2d(4, 6, 3, padding=1, **kw),
    "one side padded": lambda **kw: knport.KNConv2d(4, 6, 2, padding=((1, 0), (0, 1)), **kw),
    "strided": lambda **kw: knport.KNConv2d(4, 6, 2, stride=2, padding=((0, 1), (0, 1)), **kw),
    "depthwise": lambda **kw: knport.KNConv2d(4, 8, 3, padding=1, groups=4, **kw),
    "dilated": lambda **kw: knport.KNConv2d(4, 6, 3, padding=2, dilation=2, **kw),
    "window": lambda **kw: knport.KNConv2d(4, 6, 1, norm_window=3, **kw),
    "norm 1x1": lambda **kw: knport.KernelNorm2d(**kw),
    "norm 2x2": lambda **kw: knport.KernelNorm2d(2, 2, **kw),
}


def image(*shape, **options):
    return torch.randn(*(shape or (3, 4, 8, 8)), **options)


@pytest.fixture(params=LAYERS, ids=str)
def make(request):
    return LAYERS[request.param]


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_takes_the_arguments_of_torch_in_their_order(ndim):
    ours, theirs = (kind[ndim](4, 8, 3, 2, 1, 1, 2, False, "circular") for kind in (KN_CONVS, CONVS))
    assert isinstance(ours, CONVS[ndim])
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels"):
        assert getattr(ours, name) == getattr(theirs, name)
    x = image(2, 4, *SIZES[ndim])
    assert ours(x).shape == theirs(x).shape


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_layers_are_their_functionals(ndim):
    x = image(2, 4, *SIZES[ndim])
    conv = KN_CONVS[ndim](4, 6, 3, padding=1, dropout=0.2).eval()
    expected = functional.naive.kn_conv(x, conv.weight, conv.bias, padding=1, dropout=0.2, dropout_form="expected")
    torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-4)
    norm = KERNEL_NORMS[ndim](2, 2, dropout=0.2).eval()
    expected = functional.naive.kernel_norm(x, 2, 2, dropout=0.2, dropout_form="expected")
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-4)


def test_the_example_of_the_design():
    layer = knport.KNConv2d(6, 8, 3, padding=((1, 0), (0, 1)), groups=2, dropout=0.0).double()
    x = image(2, 6, 9, 7, dtype=torch.float64)
    expected = functional.naive.kn_conv(x, layer.weight, layer.bias, padding=((1, 0), (0, 1)), groups=2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_dropout_acts_in_training_only_and_repeats_under_a_seed(make):
    layer, x = make(dropout=0.2), image()
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(5)
    first = layer(x)
    torch.manual_seed(5)
    assert torch.equal(first, layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("form", ["moments", "shared", "unit"])
def test_eval_statistics(form):
    x = image(1, 16, 24, 24).relu()
    layer = knport.KNConv2d(16, 8, 3, dropout=0.25, dropout_form=form)
    scales = {}
    for mode in ("expected", "plain", "sample"):
        layer.eval_stats = mode
        layer.eval()
        scales[mode] = layer(x).std().item()
        assert torch.equal(layer(x), layer(x)) == (mode != "sample")
    training = torch.stack([layer.train()(x) for _ in range(20)]).std().item()
    assert scales["expected"] == pytest.approx(training, rel=0.01)
    assert scales["plain"] > 1.1 * training  # why "expected" is the default


def test_eval_never_sees_the_other_images(make):
    layer, x = make(dropout=0.0).double(), image(dtype=torch.float64)
    for mode in (True, False):
        layer.train(mode)
        for i in range(len(x)):
            torch.testing.assert_close(layer(x)[i : i + 1], layer(x[i : i + 1]), rtol=1e-12, atol=1e-12)


def test_channels_last_gives_the_same_and_stays(make):
    layer, x = make().eval(), image()
    y = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)
    if isinstance(layer, nn.Conv2d):
        assert y.stride(1) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(make, dtype):
    layer, x = make().eval(), image(requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    if isinstance(layer, nn.Conv2d):
        assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert x.grad.isfinite().all()


def test_low_precision_weights(make):
    layer, x = make().eval(), image()
    exact = layer(x)
    y = layer.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("training", [False, True])
def test_compile_without_a_graph_break(make, training):
    torch.compiler.reset()
    layer, x = make(dropout=0.2 if training else 0.05).train(training), image(requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    if training:
        assert gradient.isfinite().all()
        assert not torch.equal(compiled(x), compiled(x))
    else:
        torch.testing.assert_close(compiled(x), layer(x))
        torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])


def test_export(make):
    layer, x = make().eval(), image()
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(image(5, 4, 8, 8).copy_(x[:1])), layer(x[:1].expand(5, 4, 8, 8)))


@pytest.mark.parametrize("kind", ["3x3", "one side padded", "depthwise", "norm 1x1", "norm 2x2"])
def test_onnx(kind, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    layer, x = LAYERS[kind]().eval(), image()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x), rtol=1e-4, atol=1e-4)


def test_per_sample_gradients_by_vmap(make):
    layer, x = make(dropout=0.2).double(), image(dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    if not parameters:
        parameters = {"": torch.zeros(())}

    def loss(parameters, x):
        return torch.func.functional_call(layer, {k: v for k, v in parameters.items() if k}, x[None]).pow(3).sum()

    layer.eval()
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        alone = torch.func.grad(loss, argnums=(0, 1))(parameters, x[i])
        torch.testing.assert_close(each[1][i], alone[1])
        for name in parameters:
            torch.testing.assert_close(each[0][name][i], alone[0][name])
    layer.train()  # every image its own noise
    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, x)


def test_double_backward(make):
    layer, x = make().double().eval(), image(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)


def test_activation_checkpointing_draws_the_same_mask_again(make):
    layer, x = make(dropout=0.3), image(requires_grad=True)
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    assert torch.equal(*gradients)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Sequential(knport.KNConv2d(4, 6, 3), knport.KernelNorm2d(2, 2)))
        model(image()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


def test_deepcopy_pickle_and_state_dict(make):
    layer, x = make().eval(), image()
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), layer(x), rtol=0, atol=0)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make().eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def test_unbatched_input_and_batch_of_nothing(make):
    layer, x = make().eval(), image()
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    empty = layer(x[:0])
    assert empty.shape == (0, *layer(x).shape[1:])
    empty.sum().backward() if empty.requires_grad else None


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator here")
def test_runs_where_its_input_is(make):
    device = torch.accelerator.current_accelerator()
    layer, x = make().eval(), image()
    torch.testing.assert_close(copy.deepcopy(layer).to(device)(x.to(device)).cpu(), layer(x), rtol=1e-3, atol=1e-3)


def test_meta_device(make):
    with torch.device("meta"):
        layer = make()
        assert layer(torch.empty(3, 4, 8, 8)).device.type == "meta"


def test_prints_itself_as_code():
    text = repr(knport.KNConv2d(4, 6, 2, padding=((1, 0), (0, 1)), dropout=0.1, norm_window=3, eval_stats="plain"))
    for part in ("4, 6", "padding=((1, 0), (0, 1))", "dropout=0.1", "norm_window=(3, 3)", "eval_stats='plain'"):
        assert part in text
    assert repr(knport.KernelNorm2d(2)).startswith("KernelNorm2d(kernel_size=(2, 2), stride=(1, 1), padding=0")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dropout": 1.0}, r"dropout=1.0; expected a probability"),
        ({"dropout": -0.1}, r"dropout=-0.1"),
        ({"eps": 0.0}, r"eps=0.0"),
        ({"eval_stats": "expect"}, r"did you mean 'expected'"),
        ({"dropout_form": "moment"}, r"did you mean 'moments'"),
    ],
)
def test_mistakes_are_told_at_construction(make, options, message):
    with pytest.raises(KNPortError, match=message):
        make(**options)


def test_mistakes_in_shapes_are_told():
    with pytest.raises(KNPortError, match=r"expected \(N, C, H, W\)"):
        knport.KNConv2d(4, 6, 3)(torch.randn(8, 8))
    with pytest.raises(KNPortError, match="has 5 channels; expected 4"):
        knport.KNConv2d(4, 6, 3)(image(2, 5, 8, 8))
    with pytest.raises(KNPortError, match="smaller than the kernel"):
        knport.KNConv2d(4, 6, 3)(image(2, 4, 2, 2))
    with pytest.raises(KNPortError, match="stride 1 only"):
        knport.KNConv2d(4, 6, 3, stride=2, padding="same")
    with pytest.raises(KNPortError, match="norm_window"):
        knport.KNConv2d(4, 6, 3, norm_window=(3, 3, 3))
    assert issubclass(UnknownName, ValueError)
