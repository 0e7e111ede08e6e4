"""Private training: the steps that DP-SGD asks for, their account, and what an interruption may not change."""

from __future__ import annotations

import json
import math
import signal
import stat
import warnings
from itertools import chain
from pathlib import Path

import pytest
import torch
from processes import Processes, needs_fork, run_two
from safetensors.torch import load_file, save_file
from test_resume import at_step, contents, crash, wait_for_step
from test_train import TinyKN

from experiments.budget import Budget, default_delta
from experiments.data.digits import digits
from experiments.poisson import PoissonFeed
from experiments.private_loop import PrivateLoop
from experiments.run import resolve
from experiments.secret import Secret, make_key, read_key
from experiments.train import train
from knport.errors import KNPortError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """A network of kernel normalization alone, whose steps take milliseconds; dropout 0.1."""
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"], dropout=0.1))


@pytest.fixture
def without_dropout(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"], dropout=0.0))


def tiny(folder, **settings):
    """12 steps of about 16 of 64 digits, an evaluation every 4 and a checkpoint every 3."""
    fixed = {"batch_size": 16, "epochs": 3, "train_images": 64, "test_images": 50, "checkpoint_every": 3}
    private = {"noise_multiplier": 1.0, "privacy_seed": 7} if "epsilon" not in settings else {"privacy_seed": 7}
    return resolve("digits", run_dir=str(folder), norm="kernel", **{**fixed, **private, **settings})


def weights(folder) -> torch.Tensor:
    return torch.cat([v.flatten().double() for v in load_file(folder / "last" / "model.safetensors").values()])


def stored(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


def log(folder) -> list[dict[str, float]]:
    lines = (folder / "log.csv").read_text().splitlines()
    return [dict(zip(lines[0].split(","), map(float, line.split(",")), strict=True)) for line in lines[1:]]


# The step


@pytest.mark.parametrize("mode", ["hooks", "ghost", "functorch"])
@pytest.mark.parametrize("physical", [None, 7])
def test_without_noise_and_bound_it_is_sgd(tmp_path, without_dropout, mode, physical):
    settings = {"batch_size": 64, "steps": 5, "augment": "none", "ema": 0.5}
    private = {"noise_multiplier": 0.0, "clip": 1e6, "dp_mode": mode, "physical_batch_size": physical}
    train(tiny(tmp_path / "private", **settings, **private), quiet=True)
    train(tiny(tmp_path / "plain", **settings, noise_multiplier=None, privacy_seed=None), quiet=True)
    assert (weights(tmp_path / "private") - weights(tmp_path / "plain")).abs().max() < 1e-6
    assert log(tmp_path / "private")[-1]["epsilon"] == math.inf
    assert log(tmp_path / "private")[-1]["train_loss"] == pytest.approx(log(tmp_path / "plain")[-1]["train_loss"])


@pytest.mark.parametrize("physical", [None, 5])
def test_the_modes_agree_on_clipped_and_noised_steps(tmp_path, physical):
    settings = {"clip": 0.1, "physical_batch_size": physical, "steps": 4}
    train(tiny(tmp_path / "hooks", **settings), quiet=True)
    train(tiny(tmp_path / "ghost", dp_mode="ghost", **settings), quiet=True)
    torch.testing.assert_close(weights(tmp_path / "hooks"), weights(tmp_path / "ghost"), rtol=0, atol=1e-6)


def test_parts_are_no_steps_of_their_own(tmp_path, without_dropout):
    train(tiny(tmp_path / "parts", physical_batch_size=3), quiet=True)
    train(tiny(tmp_path / "whole"), quiet=True)
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), rtol=0, atol=1e-6)
    assert stored(tmp_path / "parts")["privacy"]["steps"] == 12


@pytest.mark.parametrize("secure", [False, True])
def test_the_noise_has_the_scale_that_is_accounted_for(tmp_path, monkeypatch, secure):
    monkeypatch.setattr(
        "experiments.train.build_for",
        lambda run, network: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 300), torch.nn.ReLU(), torch.nn.Linear(300, network["num_classes"])
        ),
    )
    monkeypatch.setattr(PoissonFeed, "rows", lambda feed, step: [])  # nothing but noise
    fixed = {"momentum": 0.0, "weight_decay": 0.0, "lr": 1.0, "schedule": "constant", "checkpoint_every": 1}
    settings = {"noise_multiplier": 1.5, "clip": 2.0, "secure_noise": secure, **fixed}
    train(tiny(tmp_path / "one", steps=1, **settings), quiet=True)
    train(tiny(tmp_path / "two", steps=2, **settings), quiet=True)
    noise = (weights(tmp_path / "two") - weights(tmp_path / "one")) * 16  # of step 1
    assert noise.std().item() == pytest.approx(1.5 * 2.0, rel=0.02)
    assert abs(noise.mean().item()) < 5 * 3 / len(noise) ** 0.5
    excess = ((noise / 3) ** 4).mean().item() - 3
    assert abs(excess) < 0.3, "not Gaussian"


def test_an_empty_batch_is_a_step(tmp_path):
    settings = {"batch_size": 1, "steps": 12, "train_images": 8}
    run = tiny(tmp_path, **settings)
    feed = PoissonFeed(digits()[0].select(None, 8), run, Secret.from_seed(7))
    sizes = [len(feed.rows(step)) for step in range(12)]
    assert 0 in sizes
    assert max(sizes) > 1
    train(run, quiet=True)
    assert stored(tmp_path)["privacy"]["steps"] == 12
    assert weights(tmp_path).isfinite().all()


# What is drawn


def test_the_draw_is_binomial_and_the_same_for_any_number_of_processes():
    images, run = digits()[0], resolve("digits", epsilon=8.0, batch_size=200, norm="kernel")
    feeds = [PoissonFeed(images, run, Secret.from_seed(1), rank, world) for world in (1, 3) for rank in range(world)]
    rate, count, steps = 200 / len(images), torch.zeros(len(images)), 300
    for step in range(steps):
        whole, *shares = [feed.rows(step) for feed in feeds]
        assert sorted(chain(*shares)) == whole
        count[whole] += 1
    assert count.sum().item() / steps == pytest.approx(200, abs=4 * (200 / steps) ** 0.5)
    variance = rate * (1 - rate) * steps
    assert count.var().item() == pytest.approx(variance, rel=0.2), "images must be drawn independently"


def test_draws_follow_from_the_key_and_their_purpose():
    one, other = Secret.from_seed(1), Secret.from_seed(2)
    noise = {
        name: torch.randn(1000, generator=secret.generator(CPU, *purpose))
        for name, secret, purpose in (
            ("same", one, ("noise", 3)),
            ("step", one, ("noise", 4)),
            ("purpose", one, ("sample", 3)),
            ("key", other, ("noise", 3)),
        )
    }
    assert torch.equal(noise["same"], torch.randn(1000, generator=one.generator(CPU, "noise", 3)))
    for name in ("step", "purpose", "key"):
        assert abs(torch.corrcoef(torch.stack([noise["same"], noise[name]]))[0, 1]) < 0.15


def test_the_whole_state_of_the_generator_is_drawn():
    """manual_seed keeps 32 bits: of 100,000 steps, two would be likely to have the same noise."""
    assert torch.equal(*(torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 5 + 2**32)))
    states = [Secret.from_seed(1).generator(CPU, "noise", step).get_state() for step in (0, 1)]
    words = torch.stack([state[24 : 24 + 8 * 624].view(torch.int64) for state in states])
    assert words.min() >= 0
    assert words.max() < 2**32
    assert (words[0] != words[1]).sum() > 620
    draws = torch.rand(100_000, dtype=torch.float64, generator=Secret.from_seed(1).generator(CPU, "x"))
    assert draws.mean().item() == pytest.approx(0.5, abs=0.005)
    assert draws.var().item() == pytest.approx(1 / 12, rel=0.02)


def test_dropout_is_as_secret_as_the_noise(tmp_path, monkeypatch):
    """It is drawn by place in the batch: with a public seed, one image would change the dropout of the others."""
    for name, seed in (("a", 7), ("b", 8)):
        settings = {"noise_multiplier": 0.0, "batch_size": 64, "steps": 1, "augment": "none", "clip": 1e6}
        train(tiny(tmp_path / name, privacy_seed=seed, **settings), quiet=True)  # the same images, no noise
    assert not torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


# The account


@pytest.mark.parametrize("accountant", ["rdp", "prv", "gdp"])
@pytest.mark.parametrize("target", [0.5, 8.0])
def test_the_target_is_met_and_nearly_used_up(accountant, target):
    run = resolve("digits", epsilon=target, accountant=accountant, norm="kernel")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "GDP accounting is experimental", UserWarning)
        budget = Budget(run, 50_000, 500)
        assert 0.98 * target < budget.epsilon(500) <= target
        assert budget.affordable() == 500
    assert budget.epsilon() == 0
    assert ("optimistic" in budget.record()["accountant"]) == (accountant == "gdp")
    assert any("optimistic" in note for note in budget.notes()) == (accountant == "gdp")


PAPERS = {  # images, batch size, epochs, delta, epsilon: ImageNet32 as in the TMLR paper and its first version
    "tmlr": (1_281_167, 8192, 100, 8e-7, 8.0),
    "v1, kernel": (1_281_167, 8192, 100, 1e-5, 8.0),
    "v1, group": (1_281_167, 4096, 100, 1e-5, 8.0),
    "cifar10": (50_000, 512, 100, 1e-5, 8.0),
}


@pytest.mark.parametrize("setting", PAPERS)
def test_epsilon_of_the_papers_settings_is_what_two_other_accountants_say(setting):
    from dp_accounting import dp_event
    from dp_accounting.rdp import RdpAccountant
    from opacus.accountants import RDPAccountant

    images, batch, epochs, delta, epsilon = PAPERS[setting]
    run = resolve("digits", epsilon=epsilon, delta=delta, batch_size=batch, norm="kernel")
    steps = epochs * (images // batch)
    budget = Budget(run, images, steps)
    ours = budget.epsilon(steps)
    direct = RDPAccountant()
    direct.history = [(budget.noise_multiplier, batch / images, steps)]
    event = dp_event.PoissonSampledDpEvent(batch / images, dp_event.GaussianDpEvent(budget.noise_multiplier))
    second = RdpAccountant().compose(event, steps).get_epsilon(delta)
    assert ours == pytest.approx(direct.get_epsilon(delta), rel=0.01)
    assert ours == pytest.approx(second, rel=0.01)
    assert ours == pytest.approx(epsilon, rel=0.01)


def test_prv_agrees_with_the_privacy_loss_distribution():
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    run = resolve("digits", epsilon=8.0, delta=1e-5, batch_size=512, accountant="prv", norm="kernel")
    budget = Budget(run, 50_000, 9700)
    event = dp_event.PoissonSampledDpEvent(512 / 50_000, dp_event.GaussianDpEvent(budget.noise_multiplier))
    second = PLDAccountant(value_discretization_interval=1e-3).compose(event, 9700).get_epsilon(1e-5)
    assert budget.epsilon(9700) == pytest.approx(second, rel=0.01)


def test_default_delta():
    assert default_delta(50_000) == pytest.approx(1e-5)
    assert default_delta(1_281_167) == pytest.approx(1e-7)
    assert default_delta(1000) < 1 / 1000


def test_every_line_of_the_log_says_what_is_spent(tmp_path, capsys):
    run = tiny(tmp_path, epsilon=3.0)
    result = train(run)
    said, spent = capsys.readouterr().out, [row["epsilon"] for row in log(tmp_path)]
    assert len(spent) == 3
    assert spent == sorted(spent)
    assert 0 < spent[0] < spent[-1] == result["epsilon"] <= 3.0
    assert all(f"epsilon {value:.4g}" in said for value in spent)
    assert "private: target epsilon 3 at delta 0.01" in said
    assert "whoever knows the seed" in said


def test_run_json_is_enough_to_compute_epsilon_again(tmp_path):
    from opacus.accountants import RDPAccountant

    train(tiny(tmp_path, epsilon=3.0), quiet=True)
    said, account = stored(tmp_path)["privacy"], RDPAccountant()
    account.history = [(said["noise_multiplier"], said["sample_rate"], said["steps"])]
    again = account.get_epsilon(said["delta"], alphas=said["alphas"])
    assert again == stored(tmp_path)["result"]["epsilon"] == said["epsilon"]
    assert (said["sample_rate"], said["steps"], said["clip"], said["accountant"]) == (0.25, 12, 1.0, "rdp")


def test_it_stops_before_the_step_that_would_overrun(tmp_path, capsys):
    run = tiny(tmp_path, epsilon=3.0, noise_multiplier=1.0)
    result = train(run)
    budget = Budget(run, 64, 12)
    assert 0 < result["steps"] < 12
    assert budget.epsilon(result["steps"]) <= 3.0 < budget.epsilon(result["steps"] + 1)
    assert result["epsilon"] == budget.epsilon(result["steps"])
    assert f"will stop at step {result['steps']} of 12" in capsys.readouterr().out
    assert stored(tmp_path)["status"] == "finished"
    assert log(tmp_path)[-1]["step"] == result["steps"]


def test_a_spent_account_takes_no_further_step(tmp_path, monkeypatch):
    """Whatever the loop believes."""
    monkeypatch.setattr(PrivateLoop, "_last_step", lambda loop: loop.state.budget.__setattr__("planned", 2) or 12)
    with pytest.raises(KNPortError, match="budget of 2 steps is spent"):
        train(tiny(tmp_path), quiet=True)


def test_no_step_is_affordable(tmp_path):
    with pytest.raises(KNPortError, match=r"does not allow one step within epsilon 0\.1"):
        train(tiny(tmp_path, epsilon=0.1, noise_multiplier=0.5), quiet=True)


# Interruptions


GHOST = {"ema": 0.9, "physical_batch_size": 5, "dp_mode": "ghost"}


@pytest.mark.parametrize(("settings", "steps"), [({}, (1,)), ({}, (4,)), ({}, (2, 11)), (GHOST, (5,)), (GHOST, (2, 8))])
def test_neither_bits_nor_account_depend_on_a_crash(tmp_path, monkeypatch, steps, settings):
    """With a key of its own, as in earnest; the second folder gets the same."""
    for name in ("whole", "crashed"):
        (tmp_path / name).mkdir()
    make_key(tmp_path / "whole" / "privacy.key")
    (tmp_path / "crashed" / "privacy.key").write_bytes((tmp_path / "whole" / "privacy.key").read_bytes())
    settings = {"epsilon": 3.0, "privacy_seed": None, **settings}
    train(tiny(tmp_path / "whole", **settings), quiet=True)
    for step in steps:
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(RuntimeError, match="plug"):
                train(tiny(tmp_path / "crashed", **settings), quiet=True)
    train(tiny(tmp_path / "crashed", **settings), quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")
    assert stored(tmp_path / "crashed")["privacy"] == stored(tmp_path / "whole")["privacy"]
    assert stored(tmp_path / "crashed")["privacy"]["steps"] == 12, "the steps that were repeated count once"


def interrupted(tmp_path, monkeypatch, **settings):
    with monkeypatch.context() as patch:
        at_step(patch, 7, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(tmp_path, **settings), quiet=True)


def test_the_key(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, privacy_seed=None)
    key = tmp_path / "privacy.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    text = key.read_text().strip()
    assert len(read_key(key).key) == 32
    assert text not in (tmp_path / "run.json").read_text()
    key.rename(tmp_path / "elsewhere")
    with pytest.raises(KNPortError, match=r"no key of 32 bytes.*spent twice"):
        train(tiny(tmp_path, privacy_seed=None), quiet=True)
    key.write_text(text[:20])
    with pytest.raises(KNPortError, match=r"no key of 32 bytes \(10 bytes\)"):
        train(tiny(tmp_path, privacy_seed=None), quiet=True)
    (tmp_path / "elsewhere").replace(key)
    train(tiny(tmp_path, privacy_seed=None), quiet=True)
    assert not key.exists(), "a finished run needs no key"


def test_runs_have_keys_of_their_own(tmp_path):
    for name in ("a", "b"):
        train(tiny(tmp_path / name, privacy_seed=None), quiet=True)
    assert not torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("name", ["device", "processes", "torch"])
def test_going_on_elsewhere_is_refused(tmp_path, monkeypatch, name):
    interrupted(tmp_path, monkeypatch)
    content = stored(tmp_path)
    content["environment"][name] = "other"
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(KNPortError, match=f"began elsewhere .{name} was other .*spent twice"):
        train(tiny(tmp_path), quiet=True)


def test_an_account_that_does_not_fit_the_step_is_refused():
    budget = Budget(resolve("digits", noise_multiplier=1.0, batch_size=16, norm="kernel"), 64, 12)
    state = {"history": [[1.0, 0.25, 6]], "mechanism": "rdp"}
    budget.load(state, 6)
    assert budget.epsilon() > 0
    with pytest.raises(KNPortError, match="checkpoint is of step 7"):
        budget.load(state, 7)
    with pytest.raises(KNPortError, match="sample rate"):
        budget.load({**state, "history": [[1.0, 0.5, 6]]}, 6)


# Several processes


@needs_fork
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_two_processes_do_what_one_does(tmp_path, monkeypatch, without_dropout, mode):
    """With dropout 0, which is drawn by process: the same draws, noise, account and weights; nothing halved."""
    settings = {"epsilon": 8.0, "physical_batch_size": 3, "batch_size": 15, "epochs": 1, "steps": 6, "dp_mode": mode}
    close = PrivateLoop.close

    def also_save(loop):
        path = Path(loop.run.run_dir) / f"rank{loop.accelerator.process_index}.safetensors"
        save_file({name: value.contiguous() for name, value in loop.state.net.state_dict().items()}, path)
        close(loop)

    monkeypatch.setattr(PrivateLoop, "close", also_save)
    for name in ("images", "noise"):
        run_two(lambda name=name: train(tiny(tmp_path / name, **settings), quiet=True), tmp_path / "processes")
        train(tiny(tmp_path / f"one {name}", **settings), quiet=True)
        ranks = [load_file(tmp_path / name / f"rank{rank}.safetensors") for rank in (0, 1)]
        assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
        two, alone = weights(tmp_path / name), weights(tmp_path / f"one {name}")
        torch.testing.assert_close(two, alone, rtol=0, atol=1e-5)
        assert stored(tmp_path / name)["environment"]["processes"] == 2
        assert stored(tmp_path / name)["privacy"] == stored(tmp_path / f"one {name}")["privacy"]
        assert stored(tmp_path / name)["privacy"]["steps"] == 6
        monkeypatch.setattr(PoissonFeed, "rows", lambda feed, step: [])  # and once more with nothing but noise


@needs_fork
@pytest.mark.parametrize("processes", [1, 2])
def test_kill_9_and_sigterm(tmp_path, processes):
    """With a key of its own, as in earnest; the second folder gets the same."""
    settings = {"epsilon": 4.0, "epochs": 20, "privacy_seed": None}

    def work(name: str) -> None:
        train(tiny(tmp_path / name, **settings), quiet=True)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "privacy.key").write_text("ab" * 32)
    for step, number in ((20, signal.SIGKILL), (40, signal.SIGTERM)):
        with Processes(lambda: work("killed"), tmp_path / "processes", processes) as killed:
            wait_for_step(killed, tmp_path / "killed", step)
            killed.kill(number)
            assert killed.wait() == [{signal.SIGKILL: -9, signal.SIGTERM: 143}[number]] * processes, killed.said()
        assert stored(tmp_path / "killed")["status"] == "running"
        assert (tmp_path / "killed" / "privacy.key").exists()
    for name in ("killed", "whole"):
        with Processes(lambda name=name: work(name), tmp_path / "processes", processes) as again:
            assert again.wait() == [0] * processes, again.said()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    account = stored(tmp_path / "killed")["privacy"]
    assert account == stored(tmp_path / "whole")["privacy"]
    assert account["steps"] == 80
    assert 3.9 < account["epsilon"] <= 4
    assert not (tmp_path / "killed" / "privacy.key").exists()


# Mistakes


def test_batch_norm_is_refused_and_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.undo()
    run = resolve("digits", epsilon=8.0, run_dir=str(tmp_path))
    with pytest.raises(
        KNPortError, match=r"cifar_resnet8 with --norm original.*--norm kernel or --norm group[\s\S]*norm"
    ):
        train(run, quiet=True)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"epsilon": 0.0}, "epsilon is 0.0; expected a finite number above 0"),
        ({"epsilon": math.inf}, "epsilon is inf"),
        ({"noise_multiplier": -1.0}, "noise_multiplier is -1.0"),
        ({"epsilon": 1.0, "delta": 1.0}, r"delta is 1.0; expected in \(0, 1\)"),
        ({"epsilon": 1.0, "clip": 0.0}, "clip is 0.0"),
        ({"epsilon": 1.0, "accumulate": 2}, "accumulate is 2; expected 1 with --epsilon"),
        ({"epsilon": 1.0, "mixed_precision": "fp16"}, "scaled gradients cannot be clipped"),
        ({"epsilon": 1.0, "compile": True}, "cannot be compiled"),
        ({"epsilon": 1.0, "accountant": "rpd"}, "accountant is 'rpd'; expected one of rdp, prv, gdp"),
        ({"physical_batch_size": 8}, "physical_batch_size is 8; expected None without --epsilon"),
        ({"secure_noise": True}, "secure_noise is True; expected False without --epsilon"),
    ],
)
def test_bad_values(settings, match):
    with pytest.raises(KNPortError, match=match):
        resolve("digits", norm="kernel", **settings)


def test_functorch_with_dropout_says_what_to_do(tmp_path):
    with pytest.raises(KNPortError, match="set --dropout 0, or use --dp-mode hooks"):
        train(tiny(tmp_path, dp_mode="functorch"), quiet=True)


def test_after_a_mistake_the_folder_can_be_used(tmp_path):
    with pytest.raises(KNPortError, match="does not allow one step"):
        train(tiny(tmp_path, epsilon=0.1, noise_multiplier=0.5), quiet=True)
    train(tiny(tmp_path, epsilon=3.0), quiet=True)


def test_runs_of_another_epsilon_have_folders_of_their_own():
    folders = {resolve("digits", norm="kernel", epsilon=epsilon).run_dir for epsilon in (None, 2.0, 8.0)}
    assert len(folders) == 3
    assert "runs/digits/cifar_resnet8-kernel-b32-e8-s0" in folders
