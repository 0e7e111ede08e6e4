"""Optimizers by name, the weight decay of norms, what a checkpoint keeps of them, and the schedule of ConvNeXt."""

from __future__ import annotations

import json

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from experiments.optimizer import UNFIT, build_optimizer, numbers, parameter_groups, restore_numbers
from experiments.run import resolve
from experiments.schedule import learning_rate
from experiments.settings import OptimizationSettings
from experiments.state import State
from experiments.train import train
from knport import KNConv2d
from knport.errors import UnknownName


def network() -> nn.Sequential:
    return nn.Sequential(KNConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), LayerNorm2d(4), nn.GroupNorm(2, 4))


def small(run, network) -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(
        KNConv2d(1, 8, 3, dropout=0.2), nn.GroupNorm(2, 8), nn.ReLU(), *pool, nn.Linear(8, network["num_classes"])
    )


def test_norms_are_set_apart():
    net = network()
    everything, norms = parameter_groups(net, OptimizationSettings(weight_decay=0.05, norm_weight_decay=0.0))
    assert (everything["weight_decay"], norms["weight_decay"]) == (0.05, 0.0)
    expected = [p for module in (net[1], net[3], net[4]) for p in module.parameters()]
    assert [id(p) for p in norms["params"]] == [id(p) for p in expected]
    assert len(everything["params"]) == 4
    settings = OptimizationSettings(weight_decay=0.05, norm_weight_decay=0.0, bias_weight_decay=0.0)
    weights, rest = parameter_groups(net, settings)
    assert [p.ndim for p in weights["params"]] == [4, 4] and len(rest["params"]) == len(list(net.parameters())) - 2
    assert len(parameter_groups(net, OptimizationSettings(bias_weight_decay=1e-5))) == 2
    assert len(parameter_groups(net, OptimizationSettings())) == 1
    assert len(parameter_groups(nn.Sequential(KNConv2d(3, 4, 3)), OptimizationSettings(norm_weight_decay=0.0))) == 1


def test_torch_optimizers_get_their_settings():
    sgd = build_optimizer(resolve("digits", momentum=0.5, weight_decay=0.1), network())
    assert type(sgd) is torch.optim.SGD and sgd.defaults["momentum"] == 0.5
    assert sgd.param_groups[0]["weight_decay"] == 0.1
    adamw = build_optimizer(resolve("imagenet_convnext"), network())
    assert type(adamw) is torch.optim.AdamW and [g["weight_decay"] for g in adamw.param_groups] == [0.05, 0.0]


def test_unknown_optimizers():
    with pytest.raises(UnknownName, match="unknown optimizer 'adamwq'; did you mean 'adamw'"):
        build_optimizer(resolve("digits", optimizer="adamwq"), network())
    with pytest.raises(UnknownName):
        build_optimizer(resolve("digits", optimizer="adahessian"), network())


def test_numbers_beside_tensors_come_back():
    net = nn.Linear(2, 1)
    named = dict(net.named_parameters())
    optimizer = build_optimizer(resolve("digits", optimizer="lamb"), net)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[net.weight]["count"] = 7
    stored = numbers(optimizer, named.items())
    assert stored["groups"][0]["step"] == [1.0] and stored["state"] == {"weight": {"count": 7}}
    other = build_optimizer(resolve("digits", optimizer="lamb"), net)
    restore_numbers(other, named, stored)
    assert other.param_groups[0]["step"] == 1 and other.state[net.weight]["count"] == 7
    restore_numbers(other, named, None)


def test_every_optimizer_goes_on_to_the_same_bits():
    from timm.optim import list_optimizers

    for name in list_optimizers():
        if name in UNFIT or name.startswith(("bnb", "fused")):  # those need a GPU
            continue
        run = resolve("digits", optimizer=name, lr=0.01)
        whole, stopped = steps(run, 4), steps(run, 2)
        again = State(run, nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)), 4, None)
        again.load(stopped.tensors(), json.loads(json.dumps(stopped.values())))
        for found, expected in zip(steps(run, 4, again).parameters, whole.parameters, strict=True):
            assert torch.equal(found, expected), name


def steps(run, count: int, state: State | None = None) -> State:
    """Train from where `state` is, or from a new one, to step `count`."""
    if state is None:
        torch.manual_seed(0)
        state = State(run, nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)), 4, None)
    while state.step < count:
        torch.manual_seed(state.step)
        state.net(torch.randn(3, 2, 4, 4)).square().sum().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
    return state


def test_the_bits_do_not_depend_on_a_crash(tmp_path, monkeypatch):
    from test_resume import at_step, contents, crash

    settings = {"optimizer": "adamw", "norm_weight_decay": 0.0, "ema": 0.9}
    fixed = {"batch_size": 16, "train_images": 80, "test_images": 20}
    fixed |= {"steps": 9, "checkpoint_every": 4, "eval_every": 10.0, "mixup": 0.2, "repeats": 2, "lr": 0.01}
    monkeypatch.setattr("experiments.run_folder._commit", lambda: None)  # git
    monkeypatch.setattr("experiments.train.build_for", small)
    train(resolve("digits", run_dir=str(tmp_path / "whole"), **fixed | settings), quiet=True)
    crashed = resolve("digits", run_dir=str(tmp_path / "crashed"), **fixed | settings)
    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(crashed, quiet=True)
    train(crashed, quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_warm_up_by_epochs_is_torchvisions():
    run = resolve("imagenet_convnext", epochs=20)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=run.lr)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=15, eta_min=0.0)
    theirs = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[5])
    for epoch in range(20):
        for step in (0, 6):
            assert learning_rate(run, 7 * epoch + step, 7, 140) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_trial_shorter_than_the_warm_up():
    run = resolve("imagenet_convnext")
    rates = [learning_rate(run, step, 1000, 2) for step in range(2)]
    assert all(0 < rate <= run.lr for rate in rates)


def test_the_cosine_ends_at_the_floor():
    run = resolve("imagenet_v1", model="knresnet50_v1", schedule="cosine-step")
    assert run.optimization.floor == 0.001
    assert learning_rate(run, 9999, 100, 10_000) == pytest.approx(0.001 * run.lr, rel=0.01)
