"""The report: rows from run folders, statements from rows, one page that needs nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fabricated import comparison, cost, run_folder, words_of

from experiments import plots, tables
from experiments.collect import collect
from experiments.comparison import Comparison
from experiments.published import published
from experiments.readme_table import BEGIN, END, PICTURE, readme_table, section, updated
from experiments.report import load, markdown, report
from experiments.results import COLUMNS, Results, Row, read, write
from experiments.summary import best_norms, clearly_apart, format_cell, headline, series_of
from experiments.terminal import plain
from knport.errors import KNPortError

NORMS = ("original", "group", "kernel")
EVEN = {(norm, size): 97.8 for norm in NORMS for size in (2, 32)}
APART = {("original", 2): 27.1, ("group", 2): 36.2, ("kernel", 2): 41.9}
APART |= {("original", 32): 55.6, ("group", 32): 43.2, ("kernel", 32): 54.9}
SUBSET = {"recipe": "cifar100", "train_images": 10_000, "test_images": 2000, "classes": 20}


@pytest.fixture
def apart(tmp_path):
    return comparison(tmp_path / "apart", APART, **SUBSET)


def row(norm="original", batch_size=2, top1=50.0, seed=0, **more) -> Row:
    family = {"original": "batch"}.get(norm, norm)
    setting = {"recipe": "cifar100", "model": "m", "status": "finished", "test_images": 2000, "steps": 100}
    return Row(
        **setting | {"norm": norm, "norm_family": family, "batch_size": batch_size, "seed": seed} | more, top1=top1
    )


def test_collect_joins_run_folder_and_cost(apart):
    found = next(r for r in collect(apart).rows if (r.norm, r.batch_size, r.seed) == ("kernel", 32, 1))
    assert (found.status, found.steps, found.epochs, found.train_images) == ("finished", 4 * 312, 4, 10_000)
    assert found.seconds == 21.34 and found.torch == "2.15.0" and found.command.startswith("python -m experiments")
    assert found.slowdown == cost("kernel").slowdown and found.norm_family == "kernel"


def test_csv_gives_back_what_was_written(apart, tmp_path):
    results = collect(apart)
    write(tmp_path, results)
    again = read(tmp_path)
    assert [r.key for r in again.rows] == [r.key for r in results.rows]
    for name in COLUMNS:
        for ours, theirs in zip(again.rows, results.rows, strict=True):
            value, expected = getattr(ours, name), getattr(theirs, name)
            assert value == (pytest.approx(expected, rel=1e-3, abs=0.06) if isinstance(expected, float) else expected)
    assert len(again.curves) == len(results.curves) and again.curves[0]["top1"] == results.curves[0]["top1"]
    write(tmp_path / "twice", again)
    assert (tmp_path / "twice/results.csv").read_bytes() == (tmp_path / "results.csv").read_bytes()


@pytest.mark.parametrize("lr", [0.0015625, 0.000195313, 0.1])
def test_csv_keeps_the_learning_rate(lr, tmp_path):
    write(tmp_path, collect(tmp_path)._replace(rows=(row(lr=lr),)))
    assert read(tmp_path).rows[0].lr == lr


def test_report_from_tables_alone_equals_report_from_run_folders(apart, tmp_path):
    report(apart)
    committed = tmp_path / "committed"
    committed.mkdir()
    for name in ("results.csv", "curves.csv"):
        (committed / name).write_bytes((apart / name).read_bytes())
    report(committed)
    assert (committed / "report.md").read_bytes() == (apart / "report.md").read_bytes()


def test_page_needs_nothing_else(apart):
    page = report(apart).read_text()
    assert not re.search(r"<(link|script|img|iframe)\b|@import|url\((?!#)", page)
    assert set(re.findall(r"https?://[^\"' )<]+", page)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }
    assert "prefers-color-scheme: dark" in page and page.count("<svg") == 1 + 2 + 2 * 3
    assert str(apart) not in page


def test_page_shows_the_numbers_of_the_table(apart):
    page = words_of(report(apart).read_text())
    for line in tables.accuracy(load(apart).rows).rows:
        for cell in line:
            assert cell.text in page
    strong = re.findall(r"<strong>(.*?)</strong>", page)
    assert len(strong) == 2 and strong[0].startswith("55.") and strong[1].startswith("4")


def test_pictures_take_the_page_s_colours(apart):
    results = load(apart)
    svg = plots.curves_plot(series_of(results.rows), results.curves, 2)
    assert "var(--cd55e00)" in svg and not re.search("#(d55e00|0072b2|009e73)", svg, re.IGNORECASE)
    variables = set(re.findall(r"var\((--\w+)\)", svg))
    page = report(apart).read_text()
    assert all(f"{name}:" in page for name in variables)
    alone = plots.accuracy_plot(series_of(results.rows), [2, 32], themed=False)
    assert "var(" not in alone and alone == plots.accuracy_plot(series_of(results.rows), [2, 32], themed=False)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        (EVEN, ["At batch size 2 all 3 norms are within the spread", "at batch size 32 all 3 norms"]),
        (APART, ["At batch size 2 KernelNorm is best", "above GroupNorm", "BatchNorm and KernelNorm are within"]),
        ({("kernel", 2): 90.0}, ["No two norms"]),
    ],
)  # fmt: skip
def test_headline_says_what_the_numbers_say(accuracies, expected, tmp_path):
    text = headline(collect(comparison(tmp_path, accuracies, test_images=2000)).rows)
    assert all(part in text for part in expected), text


def test_headline_owns_up_to_a_single_seed():
    assert "one seed" in headline([row("original", top1=20.0), row("kernel", top1=60.0)])


def test_headline_names_the_model_where_there_are_several():
    rows = [row(seed=s, top1=t, norm=n) for s in (0, 1) for n, t in (("original", 20.0), ("kernel", 60.0))]
    assert headline(rows).startswith("At batch size 2 KernelNorm is best (60.0 %), 40.0 points above BatchNorm")
    assert headline([*rows, row(model="other")]).startswith("m: at batch size 2 KernelNorm is best")


def test_headline_of_equal_means_gives_one_number():
    rows = [row(norm, top1=98.0, seed=seed) for norm in ("original", "kernel") for seed in (0, 1)]
    assert headline(rows) == "At batch size 2 both norms are within the spread (98.0 %)."


def test_two_seeds_that_agree_by_chance_do_not_make_a_difference():
    """On 359 test images one image is 0.28 points: equal seeds alone prove nothing."""
    rows = [
        row(norm, top1=top1, seed=s, test_images=359)
        for norm, top1 in (("original", 98.0), ("kernel", 98.6))
        for s in (0, 1)
    ]
    a, b = (one.cells[2] for one in series_of(rows))
    assert a.sd == b.sd == 0 and not clearly_apart(a, b)


def test_cells_without_a_result_say_why():
    rows = [row(), row("group", status="failed", top1=None, reason="the loss is NaN at step 7"), row("kernel", 32)]
    rows.append(row("layer", status="not run", top1=None))
    table = tables.accuracy(rows)
    assert [[cell.text for cell in line[1:]] for line in table.rows] == [
        ["50.0", "not run"], ["failed", "not run"], ["not run", "50.0"], ["not run", "not run"],
    ]  # fmt: skip
    notes = " ".join(tables.remarks(rows))
    assert "m group batch 2 seed 0: the loss is NaN at step 7" in notes and "m layer batch 2 seed 0" in notes


def test_another_budget_is_marked_and_not_ranked():
    rows = [row(), row("group", top1=40.0), row("kernel", top1=90.0, steps=900)]
    assert best_norms(series_of(rows), 2) == {("m", "original")}
    assert tables.accuracy(rows).rows[2][1].text == "90.0†" and "†" in tables.remarks(rows)[0]


def test_another_budget_is_not_drawn_as_if_it_were_the_batch_size():
    rows = [row(norm, size) for norm in ("original", "kernel") for size in (2, 32)]
    assert plots.accuracy_plot(series_of([*rows, row("group", 2)]), [2, 32]).count("GroupNorm") > 0
    assert plots.accuracy_plot(series_of([*rows, row("group", 2, steps=900)]), [2, 32]).count("GroupNorm") == 0


def test_seeds_of_different_budgets_are_pointed_out():
    assert "the seeds differ" in " ".join(tables.remarks([row(seed=0), row(seed=1, steps=200)]))


def test_one_seed_shows_no_spread():
    one, two = series_of([row(), row("kernel", top1=40.0), row("kernel", top1=42.0, seed=1)])
    assert format_cell(one.cells[2]) == "50.0" and format_cell(two.cells[2]) == "41.0 ± 1.4"


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (("cifar100", "knresnet18", "kernel", 2), 79.10),
        (("cifar100", "torchvision/resnet50", "batch", 32), 80.39),
        (("cifar100", "baseline_resnet18", "layer", 2), 72.68),
        (("cifar100", "timm/resnetv2_50", "batch", 2), 70.83),
        (("cifar100", "baseline_resnet18", "group_ws", 2), None),
        (("cifar100_v1", "knresnet18_v1", "kernel", 2), 79.09),
        (("cifar100_v1", "knresnet18", "kernel", 2), None),
        (("cifar100_v1", "preact_resnet50", "group_of_32", 256), 74.35),
        (("cifar100_v1", "preact_resnet50", "group", 256), None),
        (("cityscapes", "fcn_resnet34", "local_context", 16), 64.75),
        (("cityscapes", "fcn_knresnet50", "kernel", 16), 68.02),
        (("cityscapes", "fcn_knresnet50", "kernel", 8), None),
        (("imagenet_v1", "baseline_resnet50", "group_of_32", 32), 75.9),
        (("imagenet", "knresnet50", "kernel", 256), 76.54),
        (("cifar10_nc", "nc_resnet18", "normalized", 2), 91.48),
        (("cifar100", "timm/resnet34", "group", 256), 75.44),
        (("cifar100", "torchvision/resnet18", "kernel", 32), None),
        (("cifar100", "cifar_resnet8", "batch", 32), None),
        (("cifar100", "knresnet18", "kernel", 64), None),
        (("cifar10", "knresnet18", "kernel", 32), None),
        (("cifar100", "knresnet18", "kernel", 32, 100), 79.29),
        (("cifar100", "knresnet18", "kernel", 32, 20), None),
    ],
)
def test_published_only_for_the_same_cell(cell, expected):
    assert published(*cell) == expected


def test_paper_column_appears_where_the_paper_has_the_cell(apart):
    assert "paper" not in tables.accuracy(collect(apart).rows).header
    rows = [row(), row(model="knresnet18", norm_family="kernel")]
    table = tables.accuracy(rows)
    assert table.header[-1] == "paper" and [line[-1].text for line in table.rows] == ["", "79.1"]
    assert "TMLR" in markdown([Comparison("x", Results(tuple(rows), ()))])


def test_plain_table_is_aligned(apart):
    lines = plain(tables.accuracy(collect(apart).rows)).splitlines()
    assert len({len(line) for line in lines}) == 1 and sum("* " in line for line in lines) == 2


def test_running_and_damaged_run_folders(tmp_path):
    run_folder(tmp_path, status="running", result=None)
    assert format_cell(series_of(load(tmp_path).rows)[0].cells[2]) == "running"
    report(tmp_path)
    next(tmp_path.glob("*/run.json")).write_text(json.dumps({"run": 1})[:-3])
    with pytest.raises(KNPortError, match=r"run\.json: not valid JSON"):
        report(tmp_path)


@pytest.mark.parametrize("name", ["missing", "."])
def test_nothing_to_report(name, tmp_path):
    with pytest.raises(KNPortError, match=r"no such folder|no such file"):
        report(tmp_path / name)


def test_csv_of_something_else(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(KNPortError, match="columns missing: recipe, model"):
        report(tmp_path)


def test_readme_table_replaces_what_stands_between_the_markers(apart, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report(apart)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\nold 99.9\n{END}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        readme_table((apart / "results.csv").relative_to(tmp_path), readme.relative_to(tmp_path))
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old 99.9" not in text
    assert text.count("| BatchNorm |") == 1 and "(apart/results.csv)" in text and str(tmp_path) not in text
    assert (apart / "accuracy.svg").read_text().lstrip().startswith("<?xml")
    rows = read(apart).rows
    assert updated(text, section(rows, "apart/results.csv", "apart/accuracy.svg")) == text


@pytest.mark.parametrize("text", ["no markers", f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_readme_without_markers(text):
    with pytest.raises(KNPortError, match="expected the line"):
        updated(text, "x")


def test_the_readme_shows_the_committed_results():
    """The table is what `python -m experiments.readme_table` makes of the CSV."""
    root = Path(__file__).parents[1]
    csv, text = Path("experiments/results/families/results.csv"), (root / "README.md").read_text(encoding="utf-8")
    content = section(read(root / csv).rows, csv.as_posix(), csv.with_name(PICTURE).as_posix())
    assert updated(text, content) == text
