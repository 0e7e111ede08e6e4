"""The attacks, on scores whose answer is known, and the report that shows them."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from experiments.membership import (
    Attacked,
    auc,
    bound,
    likelihood_ratio,
    log_odds,
    measure,
    members_of,
    pool,
    true_positives,
)
from experiments.privacy import privacy
from experiments.privacy_report import sections
from experiments.report import report
from experiments.run import resolve
from experiments.train import train
from knport.errors import KNPortError


def attacked(shift: float, models: int = 6, count: int = 400) -> Attacked:
    """Scores that differ by `shift` SDs between members and others, and by far more between images."""
    members = torch.stack([members_of(model, count) for model in range(models)])
    difficulty = 20 * torch.randn(count, dtype=torch.float64)
    noise = torch.randn(models, count, dtype=torch.float64)
    return Attacked(scores=difficulty + noise + shift * members, members=members)


def test_members_are_halves_and_every_image_is_in_half_of_the_networks():
    members = torch.stack([members_of(model, 101) for model in range(6)])
    assert members.sum(0).tolist() == [3] * 101
    assert sorted(members.sum(1).tolist()) == [50] * 3 + [51] * 3
    assert not torch.equal(members[0], members[2])


def test_the_pool_has_wrong_labels_where_it_says():
    images, wrong, test = pool()
    from experiments.data.digits import digits

    original = digits()[0].labels
    assert torch.equal(images.labels != original, wrong)
    assert int(wrong.sum()) == 121
    assert set(images.labels.tolist()) == set(range(10))
    assert len(test) == 355


def test_the_likelihood_ratio_finds_what_a_threshold_cannot():
    found = attacked(shift=3.0)
    ratios = likelihood_ratio(found)
    for model in range(6):
        assert auc(ratios[model], found.members[model]) > 0.9
        assert auc(found.scores[model], found.members[model]) < 0.65


@pytest.mark.parametrize("models", [4, 6])
def test_without_a_signal_the_likelihood_ratio_guesses(models):
    """Neither better nor worse: a score that knows how many shadows had an image would be worse."""
    nothing = attacked(shift=0.0, models=models, count=4000)
    values = [auc(ratio, member) for ratio, member in zip(likelihood_ratio(nothing), nothing.members, strict=True)]
    assert sum(values) / models == pytest.approx(0.5, abs=0.015)


def test_the_ratio_does_not_look_at_the_target_s_membership():
    found = attacked(shift=3.0)
    other = found.members.clone()
    other[0] = ~other[0]
    assert torch.equal(likelihood_ratio(found)[0], likelihood_ratio(Attacked(scores=found.scores, members=other))[0])


def test_true_positives():
    members = torch.arange(400) < 200
    scores = torch.where(members, 1.0, 0.0)
    assert true_positives(scores, members) == 1
    assert true_positives(torch.rand(400), members) < 0.06
    assert true_positives(torch.zeros(400), members) == 0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 1e-3), (2.0, 1e-4), (8.0, 0.1)])
def test_the_bound_is_the_area_under_the_tradeoff_curve(epsilon, delta):
    f = torch.linspace(0, 1, 1_000_001, dtype=torch.float64)
    curve = torch.minimum(math.exp(epsilon) * f + delta, 1 - math.exp(-epsilon) * (1 - delta - f)).clamp(max=1)
    assert bound(epsilon, delta) == pytest.approx(torch.trapezoid(curve, f).item(), abs=1e-6)


def test_no_privacy_no_bound():
    assert bound(None, 0.0) is None


def test_log_odds_are_those_of_the_trained_network(tmp_path):
    images, _, test = pool()
    run = resolve("digits", norm="kernel", run_dir=str(tmp_path), epochs=1, batch_size=64, augment="none")
    result = train(run, quiet=True, sets=(images, test))
    odds = log_odds(run, test)
    loss = torch.nn.functional.softplus(-odds).mean().item()  # -log p
    assert loss == pytest.approx(result["test_loss"], rel=1e-4)


def test_measure_names_every_network_attack_and_kind():
    _, wrong, _ = pool()
    found = attacked(shift=1.0, count=len(wrong))
    rows = measure(found, wrong)
    assert len({(row["attack"], row["images"], row["network"]) for row in rows}) == len(rows) == 2 * 2 * 6
    assert all(row["members"] + row["others"] == (121 if row["images"] == "wrong labels" else 1321) for row in rows)


@pytest.mark.slow
def test_the_command_and_its_report(tmp_path, capsys):
    """One epoch on the digits: the tables are whole, and a second call makes the same of them without training."""
    settings = {"norms": ["group"], "epsilons": [8.0], "seeds": [0, 1], "epochs": 1, "networks": 4, "attack_epochs": 1}
    page = privacy(out=tmp_path, **settings)
    tables = {name: (tmp_path / name).read_text() for name in ("accuracy.csv", "membership.csv")}
    accuracy = list(csv.DictReader(tables["accuracy.csv"].splitlines()))
    assert [(row["epsilon"], row["seed"]) for row in accuracy] == [("", "0"), ("8", "0"), ("", "1"), ("8", "1")]
    assert all(float(row["spent_epsilon"]) <= 8 for row in accuracy if row["epsilon"])
    membership = list(csv.DictReader(tables["membership.csv"].splitlines()))
    assert len(membership) == 2 * 2 * 2 * 4
    assert all(0 <= float(row["auc"]) <= 1 for row in membership)
    text = page.read_text()
    assert "<h2>Membership inference</h2>" in text
    assert text.count("<svg") == 2
    assert "python -m experiments privacy --norms group --epsilons 8 --seeds 0 1" in text
    privacy(out=tmp_path, **settings)
    assert tables == {name: (tmp_path / name).read_text() for name in tables}


def write_tables(folder) -> None:
    common = "cpu,2.15,python -m experiments privacy"
    (folder / "membership.csv").write_text(
        "norm,epsilon,delta,attack,images,network,auc,true_positives_at_1_percent,members,others,top1,device,torch,command\n"
        + "".join(
            f"kernel,{epsilon},{delta},loss threshold,wrong labels,{network},{value},0.1,60,61,90,{common}\n"
            for epsilon, delta, values in (("", "", (0.9, 0.8)), ("2", "0.0001", (0.5, 0.52)))
            for network, value in enumerate(values)
        )
    )


def test_the_report_from_the_tables_alone(tmp_path):
    write_tables(tmp_path)
    (section,) = sections(tmp_path)
    assert section.title == "Membership inference"
    assert [cell.text for cell in section.table.rows[0]] == [
        "wrong labels",
        "loss threshold",
        "85.0 ± 7.1",
        "51.0 ± 1.4",
    ]
    assert [cell.text for cell in section.table.rows[1]] == ["any", "bound", "100", f"{100 * bound(2.0, 1e-4):.2f}"]
    assert "Membership inference" in report(tmp_path).read_text()
    assert "| wrong labels | loss threshold | 85.0 ± 7.1" in (tmp_path / "report.md").read_text()


def test_too_few_networks():
    with pytest.raises(KNPortError, match="networks is 3; expected an even number of at least 4"):
        privacy(networks=3)
