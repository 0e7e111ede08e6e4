"""KNResNet-18/34/50 against the authors' published networks."""

import golden
import pytest
import timm
import torch
from torch import nn

import architectures
import knport

# parameters of the published networks, counted by running them (100 classes and 1000 classes, low and high resolution)
PARAMETERS = {
    ("knresnet18", 100, True): 11_215_840,
    ("knresnet18", 1000, True): 11_677_540,
    ("knresnet18", 1000, False): 11_685_220,
    ("knresnet18", 10, True): 11_169_670,
    ("knresnet34", 100, True): 21_323_450,
    ("knresnet34", 1000, True): 21_785_150,
    ("knresnet34", 1000, False): 21_792_830,
    ("knresnet34", 10, True): 21_277_280,
    ("knresnet50", 100, True): 23_681_570,
    ("knresnet50", 1000, True): 25_525_670,
    ("knresnet50", 1000, False): 25_556_390,
    ("knresnet50", 10, True): 23_497_160,
}


def build(case, **options):
    name, resolution = case["name"].split("_")
    return architectures.create_model(name, num_classes=10, low_resolution=resolution == "low", **options)


@pytest.mark.parametrize("case", golden.CASES["net"], ids=lambda case: case["name"])
def test_gives_the_published_logits(case):
    model = architectures.load_published(build(case, dropout=0.0).double().eval(), golden.published_state(case))
    with torch.no_grad():
        logits = model(golden.published_input(case))
    torch.testing.assert_close(logits, golden.array("net", case, "logits"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", PARAMETERS, ids=str)
def test_has_the_published_parameters(setting):
    name, num_classes, low_resolution = setting
    with torch.device("meta"):
        model = architectures.create_model(name, num_classes=num_classes, low_resolution=low_resolution)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[setting]


def test_loads_a_released_file(tmp_path):
    case = golden.CASES["net"][0]
    state = {f"module.{key}": value for key, value in golden.published_state(case).items()}
    torch.save({"model": state}, tmp_path / "knresnet18.pth")
    model = architectures.load_published(build(case).double(), tmp_path / "knresnet18.pth")
    assert torch.equal(model.stem[0].weight, state["module.block0.0.weight"])


def test_a_checkpoint_of_another_network_is_an_error_and_changes_nothing():
    low, high = golden.CASES["net"][:2]
    model = build(high)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(knport.KNPortError, match=r"stem.0.weight: \(64, 3, 3, 3\), expected \(64, 3, 7, 7\)"):
        architectures.load_published(model, golden.published_state(low))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(knport.KNPortError, match="no such file"):
        architectures.load_published(model, "nowhere.pth")


def test_timm_knows_the_names():
    model = timm.create_model("knresnet18", num_classes=7, in_chans=1, low_resolution=True)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    model.reset_classifier(3)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    with pytest.raises(knport.KNPortError, match="load_published"):
        timm.create_model("knresnet18", pretrained=True)
    assert "knresnet50" in architectures.list_models()
    with pytest.raises(knport.UnknownName, match="did you mean 'knresnet18'"):
        architectures.create_model("knresnet-18")


@pytest.mark.parametrize("name, lr", [("knresnet18", 0.01), ("cifar_resnet8", 0.1)])
def test_learns_one_batch(name, lr):
    model = architectures.create_model(name, num_classes=4, low_resolution=True)
    model = model.to(memory_format=torch.channels_last)  # far faster on a CPU
    x, target = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_images_do_not_see_each_other():
    model = architectures.create_model("knresnet18", num_classes=4, low_resolution=True, dropout=0.0)
    x = torch.randn(3, 3, 32, 32)
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(training)(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["knresnet18", "knresnet50", "knresnet18_v1", "kncifar_resnet8x2"])
@pytest.mark.parametrize("low_resolution", [True, False])
def test_takes_every_image_from_its_smallest_on(name, low_resolution):
    with torch.device("meta"):
        model = architectures.create_model(name, num_classes=3, low_resolution=low_resolution).eval()
    smallest = model.minimum_size
    assert smallest <= (32 if low_resolution else 113)
    for size in (smallest, smallest + 1):
        assert model(torch.empty(2, 3, size, 2 * size, device="meta")).shape == (2, 3)
    with pytest.raises(knport.KNPortError, match=f"enlarge them to {smallest} x {smallest}"):
        model(torch.empty(2, 3, 2 * size, smallest - 1, device="meta"))
    model.minimum_size = 0
    with pytest.raises((RuntimeError, knport.KNPortError)):  # the bound is not too high
        model(torch.empty(2, 3, 2 * size, smallest - 1, device="meta"))
