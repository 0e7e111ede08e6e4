"""The grid: planned, run, skipped, failed, interrupted, and reported."""

from __future__ import annotations

import shlex
from functools import wraps
from types import SimpleNamespace

import pytest

from experiments import __main__ as command_line_interface
from experiments import activations
from experiments import compare as comparing
from experiments import demo as demonstration
from experiments import families as all_families
from experiments.collect import collect, read_notes
from experiments.compare import command_line, compare
from experiments.grid import grid, key_of, parse_cell, parse_fields
from experiments.originals import original_of
from experiments.results import read
from knport.errors import KNPortError, UnknownName

TINY = {"norms": ("original", "none"), "batch_sizes": (4, 8), "steps": (3,), "train_images": 40, "test_images": 30}
PER_BATCH_SIZE = {"epochs": (), "lr": ()}
LISTS = {"models": ("a", "b/c"), "norms": ("original", "group"), "batch_sizes": (2, 32), "seeds": (0, 1)}


def planned(tmp_path, **changes):
    return grid("digits", **LISTS | {"per_batch_size": PER_BATCH_SIZE, "extra": (), "out": tmp_path} | changes)


def tiny(tmp_path, **changes):
    return compare(
        "digits", out=str(tmp_path / "out"), **TINY | {"seeds": (0,), "cost_seconds": 0, "quiet": True} | changes
    )


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; `trained.runs` fills with what was asked for, `trained.by` decides what comes of it."""
    spy = SimpleNamespace(runs=[], by=lambda run: {"top1": 50.0})

    def train(run, quiet):
        spy.runs.append(key_of(run))
        return spy.by(run)

    monkeypatch.setattr(comparing, "train", train)
    return spy


def test_grid_is_every_combination_one_seed_after_the_other(tmp_path):
    runs = planned(tmp_path)
    assert len(runs) == len({key_of(run) for run in runs}) == 16
    assert [run.seed for run in runs] == [0] * 8 + [1] * 8
    assert runs[4].run_dir == str(tmp_path / "a-original-b32-s0") and "b-c-group-b32-s1" in runs[-1].run_dir


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"epochs": (3, 6), "lr": (0.01,)}, {2: (3, 0.01), 32: (6, 0.01)}),
        ({"epochs": (4,), "lr": (0.01, 0.05)}, {2: (4, 0.01), 32: (4, 0.05)}),
        ({"epochs": (), "lr": ()}, {2: (15, 0.005), 32: (15, 0.05)}),
    ],
)
def test_values_by_batch_size(given, expected, tmp_path):
    runs = planned(tmp_path, per_batch_size=given)
    assert {(run.batch_size, run.epochs, run.lr) for run in runs} == {(b, *values) for b, values in expected.items()}


def test_extra_cells_come_for_every_seed_and_override(tmp_path):
    runs = planned(tmp_path, extra=("x:kernel:8:epochs=1:lr=0.5", "y:original:2:seed=1", "a:group:32:epochs=2"))
    assert len(runs) == 16 + 2 + 1
    by_key = {tuple(key_of(run)): run for run in runs}
    assert by_key["x", "kernel", 8, 1].epochs == 1 and by_key["x", "kernel", 8, 0].lr == 0.5
    assert ("y", "original", 2, 0) not in by_key and by_key["a", "group", 32, 1].epochs == 2


@pytest.mark.parametrize("text", ["resnet", "m:kernel", "m:kernel:big", "m:kernel:2:epochs"])
def test_malformed_extra_cell(text):
    with pytest.raises(KNPortError, match="expected MODEL:NORM:BATCH_SIZE"):
        parse_cell(text)


def test_overrides_reach_every_cell(tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(comparing, "run_grid", lambda given, *args, **options: runs.extend(given))
    tiny(tmp_path, override=("augment=none", "weight_decay=0", "compile=True"))
    assert {(run.augmentation.augment, run.optimization.weight_decay, run.compile) for run in runs} == {
        ("none", 0, True)
    }


@pytest.mark.parametrize(
    ("override", "message"), [("augment", "expected FIELD=VALUE"), ("augmnt=none", "augment"), ("lr=-1", "above 0")]
)
def test_bad_override(override, message, tmp_path):
    with pytest.raises(KNPortError, match=message):
        tiny(tmp_path, override=(override,))


def test_an_empty_grid_is_an_error(tmp_path):
    with pytest.raises(KNPortError, match="nothing to run"):
        tiny(tmp_path, models=())


def test_unknown_names_before_anything_runs(tmp_path, trained):
    with pytest.raises(UnknownName, match="epochs"):
        parse_cell("m:kernel:2:epoch=1")
    with pytest.raises(UnknownName, match="digits"):
        compare("digit", out=str(tmp_path))
    with pytest.raises(UnknownName, match="cifar_resnet8"):
        tiny(tmp_path, models=("cifar_resnet9",))
    with pytest.raises(UnknownName, match="original"):
        tiny(tmp_path, norms=("orignal",))
    assert not trained.runs


def test_numbers_of_values_must_match(tmp_path):
    with pytest.raises(KNPortError, match="3 values of epochs for 2 batch sizes"):
        planned(tmp_path, per_batch_size={"epochs": (1, 2, 3)})


def test_grid_runs_reports_and_is_skipped_the_second_time(tmp_path, capsys, monkeypatch):
    page = tiny(tmp_path, seeds=(0, 1), cost_seconds=0.2)
    rows = read(page.parent).rows
    assert len(rows) == 8 and all(r.finished and r.steps == 3 and r.train_images == 40 for r in rows)
    assert all(r.ms_per_step > 0 and r.macs and r.parameters and r.saved_mib for r in rows)
    assert {r.slowdown for r in rows if r.norm == "original"} == {1.0}
    printed = capsys.readouterr().out
    assert "[8/8]" in printed and "batch size 4" in printed and f"Report: {page}" in printed
    assert {path.name for path in page.parent.iterdir() if path.is_file()} == {
        "results.csv", "curves.csv", "activations.csv", "report.md", "report.html", "compare.json",
    }  # fmt: skip
    stages = activations.read(page.parent / "activations.csv")
    assert len({stage[:4] for stage in stages}) == 4 and {stage.seed for stage in stages} == {0}
    assert all(stage.initial_sd > 0 and stage.trained_sd > 0 for stage in stages)
    before = (page.parent / "results.csv").read_text()
    monkeypatch.setattr(comparing, "train", None)
    monkeypatch.setattr(comparing, "measure", None)
    tiny(tmp_path, seeds=(0, 1), cost_seconds=0.2)
    assert (page.parent / "results.csv").read_text() == before
    assert "8 runs, 8 of them finished before" in capsys.readouterr().out


def test_a_failed_run_is_a_row_and_the_grid_goes_on(tmp_path, capsys):
    page = tiny(tmp_path, batch_sizes=(4,), lr=(1e30,), extra=("cifar_resnet8:none:8:lr=0.01",))
    rows = {(r.norm, r.batch_size): r for r in read(page.parent).rows}
    failed = [r for r in rows.values() if r.status == "failed"]
    assert failed and all("loss" in r.reason for r in failed) and rows["none", 8].finished
    assert "failed, NonFiniteLoss" in capsys.readouterr().out and "Failed: cifar_resnet8" in page.read_text()


def test_a_run_that_raises_early_is_a_row_until_it_succeeds(tmp_path, trained):
    def out_of_memory(run):
        raise RuntimeError("out of\nmemory")

    trained.by = out_of_memory
    rows = read(tiny(tmp_path).parent).rows
    assert [r.status for r in rows] == ["failed"] * 4 and rows[0].reason == "RuntimeError: out of memory"
    trained.by = lambda run: {"top1": 50.0}
    assert {r.status for r in read(tiny(tmp_path).parent).rows} == {"not run"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(130)])
def test_ctrl_c_keeps_everything_and_says_how_to_go_on(stop, tmp_path, trained, capsys):
    def second_is_stopped(run):
        if len(trained.runs) == 2:
            raise stop
        return {"top1": 50.0}

    trained.by = second_is_stopped
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        tiny(tmp_path)
    assert len(trained.runs) == 2 and len(collect(tmp_path / "out").rows) == 4
    assert "Stopped. Nothing is lost" in (printed := capsys.readouterr().out)
    assert "python -m experiments compare digits" in printed and (tmp_path / "out/report.html").exists()


def test_a_folder_of_another_configuration_is_refused_before_any_training(tmp_path, monkeypatch):
    tiny(tmp_path, batch_sizes=(4,))
    before = (tmp_path / "out/results.csv").read_text()
    monkeypatch.setattr(comparing, "train", None)
    with pytest.raises(KNPortError, match="another configuration: lr"):
        tiny(tmp_path, batch_sizes=(4,), lr=(0.5,))
    assert (tmp_path / "out/results.csv").read_text() == before


def test_a_second_comparison_in_the_same_folder_adds_to_it(tmp_path, trained):
    tiny(tmp_path, batch_sizes=(4,))
    tiny(tmp_path, batch_sizes=(8,))
    cells = read_notes(tmp_path / "out")["cells"]
    assert len(cells) == 4 and len({cell["command"] for cell in cells}) == 2


@pytest.mark.parametrize("changes", [{}, {"models": (), "norms": (), "batch_sizes": ()}])
def test_the_command_stated_is_the_command(monkeypatch, changes):
    """What the report prints, typed into a shell, gives the same call."""
    given = {
        "models": ("a", "timm/b"), "norms": ("original",), "batch_sizes": (2, 32), "seeds": (0,), "epochs": (3, 6),
        "lr": (0.001, 0.05), "extra": ("x:kernel:8:epochs=1",), "override": ("augment=none",), "classes": 20,
        "train_images": 1000, "dropout": 0.1, "data_dir": "some where", "out": "runs/x", **changes,
    }  # fmt: skip
    calls = []

    @wraps(compare)
    def recorded(*args, **options):
        calls.append((args, options))

    monkeypatch.setattr(comparing, "compare", recorded)
    text = command_line("cifar100", given)
    assert command_line_interface.main(shlex.split(text)[3:]) == 0
    ((args, options),) = calls
    got = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    assert ("cifar100" in args or got["recipe"] == "cifar100") and {name: got[name] for name in given} == given


def test_command_hides_absolute_folders():
    command = command_line("digits", {"data_dir": "/some/where", "out": "/some/where/else"})
    assert command == "python -m experiments compare digits --data-dir DIR --out DIR"


def test_demo_is_a_small_comparison_on_digits(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(demonstration, "compare", lambda *args, **options: calls.append((args, options)))
    demonstration.demo()
    demonstration.demo(seeds=(3,), out=tmp_path)
    (recipe,), options = calls[0]
    assert recipe == "digits" and options["norms"] == ("original", "group", "kernel") and options["seeds"] == (0, 1)
    assert options["batch_sizes"] == (2, 32) and options["out"] == "runs/demo"
    assert options["command"] == "python -m experiments demo"
    assert calls[1][1]["command"] == "python -m experiments demo --seeds 3 --out DIR"


# All six families


@pytest.mark.parametrize("scale", [all_families.SMALL, all_families.FULL], ids=["small", "full"])
def test_cells_of_the_families(scale, tmp_path):
    extra = all_families.cells(scale, tuple(scale.families), all_families.RIVALS, all_families.BATCH_SIZES)
    further = parse_fields(scale.override)
    runs = planned(tmp_path, models=(), norms=(), batch_sizes=(), seeds=(0,), extra=extra, **further)
    assert len(runs) == 6 * 4 * 3 and {run.batch_size for run in runs} == {2, 8, 32}
    backbones = {original_of(run.model) or run.model for run in runs}
    assert backbones == {family.original for family in scale.families.values()} and len(backbones) == 6
    rates = {(original_of(run.model) or run.model, run.batch_size): set() for run in runs}
    for run in runs:
        rates[original_of(run.model) or run.model, run.batch_size].add((run.lr, run.optimization.optimizer, run.steps))
    assert all(len(found) == 1 for found in rates.values())  # all norms of a backbone are trained alike


def test_families_is_a_comparison(monkeypatch):
    calls = []
    monkeypatch.setattr(all_families, "compare", lambda recipe, **options: calls.append(options))
    all_families.families()
    all_families.families(("vit",), full=True, batch_sizes=(2,), seeds=(0, 1), data_dir="elsewhere")
    small, full = calls
    assert (small["classes"], len(small["extra"]), small["command"]) == (20, 72, "python -m experiments families")
    assert (full["classes"], len(full["extra"])) == (None, 4)
    told = "python -m experiments families --only vit --batch-sizes 2 --seeds 0 1 --full --data-dir DIR"
    assert full["command"] == told
    for wrong in ({"only": ("vgg",)}, {"batch_sizes": (4,)}):
        with pytest.raises(UnknownName):
            all_families.families(**wrong)
