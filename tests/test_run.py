"""Recipes, the resolved run, the learning rate, and the command line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from experiments import recipes
from experiments.__main__ import main
from experiments.recipe import depth, norm_kind, tabulated
from experiments.run import Run, differences, resolve
from experiments.schedule import learning_rate
from experiments.settings import OptimizationSettings
from knport.errors import KNPortError, UnknownName


@pytest.mark.parametrize(
    ("model", "norm", "batch_size", "lr"),
    [
        ("knresnet18", "original", 2, 0.0015625),
        ("knresnet50", "original", 32, 0.025),
        ("timm/resnet34", "kernel", 256, 0.2),
        ("timm/resnet18", "original", 2, 0.00078125),
        ("torchvision/resnet50", "original", 256, 0.1),
        ("timm/resnet50", "group", 2, 0.00078125),
        ("timm/resnet18", "layer", 32, 0.0125),
        ("timm/resnet18", "group", 256, 0.1),
    ],
)
def test_published_learning_rates(model, norm, batch_size, lr):
    run = resolve("cifar100", model=model, norm=norm, batch_size=batch_size)
    assert run.lr == lr
    assert run.scaling == ("unit" if "kn" in model or norm == "kernel" else "standard")
    published = OptimizationSettings(weight_decay=5e-4, momentum=0.9, schedule="cosine")
    assert (run.epochs, run.optimization) == (150, published)


@pytest.mark.parametrize(
    ("recipe", "model", "norm", "published"),
    [
        ("cifar100_v1", "knresnet50_v1", "original", (32, 150, 0.05, "unit", 5e-4, "cosine", 0.01)),
        ("cifar100_v1", "baseline_resnet18", "group_of_32", (32, 150, 0.0125, "standard", 5e-4, "cosine", 0.01)),
        ("cifar10_readme", "knresnet18", "original", (32, 75, 0.05, "unit", 0.0, "cosine", 0.01)),
        ("cifar10_nc", "nc_resnet18", "original", (2, 50, 0.01, "standard", 0.0, "step30", 0.01)),
        ("imagenet", "knresnet18", "original", (256, 100, 0.1, "standard", 1e-4, "step30", 0.01)),
        ("imagenet_v1", "knresnet18_v1", "original", (32, 100, 0.0125, "unit", 1e-4, "cosine", 0.01)),
        ("imagenet_v1", "knresnet50_v1", "original", (32, 100, 0.01, "unit", 1e-4, "cosine", 0.001)),
        ("imagenet_v1", "baseline_resnet50", "layer", (32, 100, 0.0125, "standard", 1e-4, "cosine", 0.01)),
        ("imagenet_convnext", "knconvnext_tiny", "original", (1024, 600, 1e-3, "standard", 0.05, "cosine", 0.0)),
    ],
)
def test_published_recipes(recipe, model, norm, published):
    run = resolve(recipe, model=model, norm=norm)
    settings = run.optimization.weight_decay, run.optimization.schedule, run.optimization.floor
    assert (run.batch_size, run.epochs, run.lr, run.scaling, *settings) == published


@pytest.mark.parametrize(
    ("model", "row"),
    [
        ("knresnet18", "18"), ("knresnet50_v1", "50"), ("preact_resnet34", "pre34"), ("timm/resnetv2_50", "pre50"),
        ("baseline_resnet34", "34"), ("cifar_resnet8x2", "18"), ("torchvision/resnet101", "18"), ("nc_resnet50", "50"),
    ],
)  # fmt: skip
def test_the_row_of_a_network(model, row):
    assert depth(model) == row


@pytest.mark.parametrize(
    ("model", "norm", "kind"),
    [
        ("fcn_knresnet18", "original", "kernel"), ("dp_knresnet8", "original", "kernel"),
        ("timm/resnet18", "kernel", "kernel"), ("timm/resnet18", "original", "batch"), ("x", "group_of_32", "group"),
        ("x", "group_ws", "group"), ("ws_resnet18", "original", "group"), ("nc_resnet18", "original", "layer"),
        ("knresnet50", "none", "kernel"), ("x", "none", "layer"), ("x", "instance", "layer"),
    ],
)  # fmt: skip
def test_the_column_of_a_norm(model, norm, kind):
    assert norm_kind(model, norm) == kind


def test_cifar10_defaults():
    run = resolve("cifar10", model="knresnet18")
    assert (run.batch_size, run.epochs, run.lr, run.optimization.weight_decay) == (128, 70, 0.1, 0.0)


def test_learning_rates_between_and_outside_the_table():
    table = {2: 0.01, 32: 0.08}
    assert tabulated(table, 8) == pytest.approx(0.01 * 8**0.5)
    assert tabulated(table, 1) == pytest.approx(0.005)
    assert tabulated(table, 64) == pytest.approx(0.16)


def test_cosine_is_the_published_schedule():
    run = resolve("cifar100", epochs=5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=run.lr)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5, eta_min=0.01 * run.lr)
    for epoch in range(5):
        for step in (0, 3, 6):
            assert learning_rate(run, 7 * epoch + step, 7, 35) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_cosine_by_step_and_warmup():
    run = resolve("digits", lr=1.0, schedule="cosine-step", warmup=9)
    rates = [learning_rate(run, step, 10, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], rel=0.05)
    assert rates[99] == pytest.approx(0.01, rel=0.05)
    assert sorted(rates[9:], reverse=True) == rates[9:]


def test_every_field_has_a_default_and_a_place_in_the_default_folder():
    assert len(fields(Run)) <= 30
    assert resolve("digits", model="timm/resnet18", norm="group", seed=3).run_dir == (
        "runs/digits/timm-resnet18-group-b32-s3"
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"recipe": "cifar1000"}, "unknown recipe 'cifar1000'; did you mean 'cifar100'"),
        ({"learning_rate": 1.0}, "unknown field of Run 'learning_rate'"),
        ({"batch_size": -1}, "batch_size is -1; expected at least 1"),
        ({"lr": 0.0}, "lr is 0.0; expected a finite number above 0"),
        ({"ema": 1.0}, r"ema is 1.0; expected in \[0, 1\)"),
        ({"schedule": "cosin"}, "schedule is 'cosin'; expected one of"),
        ({"steps": 0}, "steps is 0"),
        ({"lr": float("nan")}, "lr is nan"),
    ],
)
def test_bad_values(settings, match):
    with pytest.raises(KNPortError, match=match):
        resolve(**{"recipe": "digits", **settings})


def test_differences_are_those_that_change_the_result():
    run = resolve("digits")
    other = resolve("digits", lr=0.1, run_dir="elsewhere", checkpoint_every=3, track="tensorboard")
    assert differences(run.flat(), other) == {"lr": (0.05, 0.1)}


def test_help_is_fast_because_torch_is_not_imported():
    script = (
        "import sys; from experiments.__main__ import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    for args in ([], ["train", "cifar10", "--model", "knresnet18", "--help"]):
        done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "usage: python -m experiments" in done.stdout
    assert "(default: 0.1)" in done.stdout  # the recipe's learning rate for this model


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'"),
        (["train", "digit"], "unknown recipe 'digit'; did you mean 'digits'"),
        (["train", "cifar10", "--data-dir", "nowhere"], "nowhere does not exist"),
        (["train", "--batch-size", "30", "--accumulate", "4"], "does not divide over 1 processes x 4 micro-batches"),
        (["train", "--processes", "2"], "accelerate launch --multi_gpu --num_processes 2"),
        (["train", "--model", "cifar_resnet9"], "unknown model 'cifar_resnet9'; did you mean 'cifar_resnet"),
        (["train", "--norm", "grup"], "unknown norm 'grup'; did you mean 'group'"),
    ],
)
def test_errors_are_one_message(tmp_path, monkeypatch, capsys, args, match):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert match in error
    assert "Traceback" not in error


def test_unknown_names_are_value_errors():
    with pytest.raises(UnknownName):
        recipes.get("imagenette")
    assert issubclass(UnknownName, ValueError)


def test_list(capsys):
    assert main(["list", "knresnet"]) == 0
    assert "knresnet18" in capsys.readouterr().out
