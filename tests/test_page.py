"""The page: whole, self-contained, and filled with what was measured and nothing else."""

from __future__ import annotations

import csv
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fabricated import comparison, run_folder, words_of
from test_report import APART, SUBSET, row

from experiments import activations, backbones, paper_report, paper_tables, tables
from experiments.comparison import find, is_comparison
from experiments.originals import with_originals
from experiments.paper_table import TMLR, V1
from experiments.plots_cost import COSTS, cost_plots, points_of
from experiments.report import COMMITTED, committed, report
from experiments.results import Results, read, write
from experiments.summary import metric_of, series_of
from knport.errors import KNPortError

ROOT = Path(__file__).parents[1]
VOID = {"meta", "img", "br", "wbr", "path", "use", "rect", "circle", "line", "polyline"}
FULL = {"recipe": "cifar100", "model": "knresnet18", "norm_family": "kernel", "classes": 100, "epochs": 150}


class Outline(HTMLParser):
    """Tags that are open, ids, links and what is loaded; raises where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: Counter[str] = Counter()
        self.loaded: list[str] = []
        self.anchors: list[str] = []
        self.without_alt = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] += 1
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loaded += [attrs[name] for name in ("src", "srcset", "data", "action") if name in attrs]
        self.loaded += [attrs["href"]] if tag in ("link", "image", "base") else []
        self.anchors += [attrs["href"]] if tag == "a" else []
        self.without_alt += tag == "img" and not attrs.get("alt")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The page of all committed results, as `python -m experiments report` makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return report(out=tmp_path_factory.mktemp("all"))


def test_the_page_of_the_committed_results_is_whole(everything):
    text = everything.read_text(encoding="utf-8")
    page = Outline(text)
    assert not page.open and text.startswith("<!doctype html>")
    assert (page.tags["html"], page.tags["main"], page.tags["h1"], page.tags["title"]) == (1, 1, 1, 1)
    assert page.tags["script"] == page.tags["iframe"] == page.tags["link"] == page.without_alt == 0
    assert all(source.startswith("data:image/") for source in page.loaded)
    assert not re.search(r"@import|url\((?!#|&quot;#)", text)
    assert 'name="viewport" content="width=device-width' in text and "prefers-color-scheme: dark" in text
    assert page.anchors and {anchor.removeprefix("#") for anchor in page.anchors} <= set(page.ids)
    assert str(ROOT) not in text


def test_every_name_on_the_page_is_of_one_thing(everything):
    """Pictures name their parts; the same name in two pictures would stand for the first."""
    text = everything.read_text(encoding="utf-8")
    named = Counter(Outline(text).ids)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert not [name for name, count in named.items() if count > 1]
    assert used and used <= set(named)


def test_the_page_shows_every_committed_comparison(everything):
    text = words_of(everything.read_text(encoding="utf-8"))
    folders = committed(ROOT / COMMITTED)
    assert {"cifar100", "nc"} <= {folder.name for folder in folders} and "sweep" not in {f.name for f in folders}
    for folder in folders:
        for one in find(folder).comparisons:
            for line in tables.accuracy(one.results.rows).rows:
                assert all(cell.text in text for cell in line)
    with (everything.parent / "results.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    rows = [one for folder in folders for found in find(folder).comparisons for one in found.results.rows]
    assert len(written) == len(rows) and {line["comparison"] for line in written} >= {"cifar100", "nc"}


def test_other_tables_are_no_comparison():
    assert not is_comparison(ROOT / COMMITTED / "dropout_forms/results.csv")
    with pytest.raises(KNPortError, match="call it from the checkout"):
        committed(ROOT / "docs")


def test_a_folder_of_two_recipes_is_two_comparisons(tmp_path):
    comparison(tmp_path, {("original", 2): 50.0})
    run_folder(tmp_path, recipe="cifar10", norm="group", top1=20.0)
    found = find(tmp_path).comparisons
    assert sorted({r.recipe for r in one.results.rows}.pop() for one in found) == ["cifar10", "digits"]
    page = Outline(report(tmp_path).read_text())
    assert sum(name.startswith("comparison-") for name in page.ids) == 2 and not page.open


# The papers' tables


def test_nothing_measured_is_not_run():
    sections = paper_report.sections([])
    assert len(sections) == len(paper_tables.TABLES) + 1
    one = next(s for s in sections if s.title.startswith("Table 1"))
    line = next(line for line in one.table.rows if line[0].text == "PreactResNet-50" and line[1].text == "GroupNorm")
    assert [(cell.text, cell.small) for cell in line[2:6]] == [
        ("75.67", "v1 75.06"), ("not run", ""), ("76.08", "v1 75.17"), ("not run", ""),
    ]  # fmt: skip
    assert line[-1].text == (
        "python -m experiments train cifar100 --model preact_resnet50 --norm group --batch-size B --data-dir DIR"
    )
    assert one.lead.startswith("Not run here: none of the")


def test_whole_runs_fill_their_cell():
    rows = [row(batch_size=2, top1=top1, seed=seed, **FULL) for seed, top1 in enumerate((79.0, 79.5))]
    one = next(s for s in paper_report.sections(rows) if s.title.startswith("Table 1"))
    line = one.table.rows[0]
    assert (line[2].text, line[3].text, line[3].small) == ("79.10 ± 0.10", "79.25 ± 0.35", "n=2, 150 epochs")
    assert one.lead.startswith("Measured here: 1 of")


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 20}, {"train_images": 10_000}, {"model": "knresnet18_v1"}, {"batch_size": 8}, {"dropout": 0.0},
        {"status": "failed"}, {"recipe": "cifar10"}, {"norm": "group", "norm_family": "group"},
    ],
    ids=str,
)  # fmt: skip
def test_other_runs_do_not(change):
    rows = [row(**{"batch_size": 2, **FULL, **change})]
    assert paper_report.measured(paper_tables.CIFAR100, rows)[0] == 0


def test_the_ablation_is_of_runs_without_dropout():
    rows = [row(batch_size=32, dropout=0.0, **FULL | {"model": "knresnet50"})]
    assert paper_report.measured(paper_tables.ABLATION, rows)[0] == 1
    assert paper_report.measured(paper_tables.CIFAR100, rows)[0] == 0


def test_scores_of_segmentation_fill_three_columns():
    scores = {"score": "miou", "miou": 64.0, "pixel_accuracy": 93.5, "mean_accuracy": 73.25, "top1": None}
    city = FULL | {"recipe": "cityscapes", "model": "fcn_knresnet18", "classes": 19, "epochs": 500}
    rows = [row(batch_size=16, **{**city, **scores})]
    one = next(s for s in paper_report.sections(rows) if s.title.startswith("Table 3"))
    assert [cell.text for cell in one.table.rows[0][2:8]] == [
        "64.37 ± 0.14", "64.00", "93.73", "93.50", "73.46", "73.25",
    ]  # fmt: skip


def test_published_values_are_in_range_and_complete():
    for table in paper_tables.TABLES:
        assert set(table.recipes) >= {version for line in table.lines for version in line.values}
        for line in table.lines:
            for version, values in line.values.items():
                assert version in table.recipes and len(values) == len(table.columns)
                assert all(value is None or 10 < value.mean < 100 for value in values)
    best = {line.kind: line.values[TMLR][0].mean for line in paper_tables.IMAGENET.lines if TMLR in line.values}
    assert best["kernel"] == 76.54 and V1 in paper_tables.IMAGENET.recipes


# Segmentation, several backbones, costs, activations


def test_segmentation_is_ranked_by_mean_iou(tmp_path):
    scores = {"score": "miou", "top1": None, "pixel_accuracy": 80.0, "mean_accuracy": 40.0, "recipe": "camvid"}
    rows = [
        row(norm, miou=miou, seed=s, **scores) for norm, miou in (("original", 20.0), ("kernel", 25.0)) for s in (0, 1)
    ]
    write(tmp_path, Results(tuple(rows), ()))
    assert read(tmp_path).rows[0].value == 20.0
    text = report(tmp_path).read_text()
    assert "KernelNorm is best (25.0" in text and "Mean IoU at batch size 2" in text and "pixel accuracy" in text
    with pytest.raises(KNPortError, match="cannot stand in one table"):
        metric_of([*rows, row()])


def families(kernel: dict[str, float], rival: float = 50.0):
    rows = []
    for name, top1 in kernel.items():
        rows += [
            row(norm, model=name, top1=rival - 5 * (norm == "group"), test_images=10_000)
            for norm in ("original", "group")
        ]
        rows.append(row(model=f"kn{name}", original=name, norm_family="kernel", top1=top1, test_images=10_000))
    return rows


def test_several_backbones_are_counted():
    rows = families({"a": 60.0, "b": 50.1, "c": 40.0, "d": 60.0})
    assert backbones.statement(rows).endswith(
        "at batch size 2 ahead in 2, level in 1, behind in 1 of 4 networks"
        " (one seed in places: its spread is not known)."
    )
    assert backbones.statement(rows[:6]).startswith("a: at batch size 2")
    table = backbones.matrix(rows, 2)
    assert table.header == ("network", "BatchNorm", "GroupNorm", "KernelNorm, as built")
    assert [[cell.text for cell in line if cell.strong] for line in table.rows] == [
        ["60.0"],
        ["50.1"],
        ["50.0"],
        ["60.0"],
    ]
    picture = backbones.picture(rows)
    assert picture == backbones.picture(rows) and "<svg" in picture and "var(" not in picture


def test_a_hand_built_network_stands_with_its_original():
    found = [(one.model, one.norm) for one in series_of(families({"a": 60.0, "b": 40.0})[::-1])]
    assert found == [(m, n) for x in "ba" for m, n in ((x, "original"), (x, "group"), (f"kn{x}", "original"))]


def test_an_original_that_is_not_there_is_no_backbone():
    alone = [row(model="knresnet18", original="baseline_resnet18", norm_family="kernel")]
    assert [one.backbone for one in series_of(alone)] == ["knresnet18"]
    older = [row(model="cifar_resnet8x2"), row(model="kncifar_resnet8x2", norm_family="kernel", top1=60.0)]
    assert {one.backbone for one in series_of(with_originals(older))} == {"cifar_resnet8x2"}


@pytest.mark.parametrize(
    ("model", "norm", "kind"),
    [
        ("kncifar_resnet8x2", "original", "kernel"), ("knvit_test", "original", "kernel"),
        ("nc_cifar_resnet8x2", "original", "normalized"), ("timm/test_resnet", "original", "batch"),
        ("torchvision/resnet18", "original", "batch"), ("timm/test_resnet", "group_ws", "group_ws"),
        ("baseline_vit_test", "original", "layer"), ("gone_since", "original", ""),
    ],
)  # fmt: skip
def test_the_kind_of_norm_is_known_without_costs(model, norm, kind):
    (found,) = with_originals([row(norm, model=model, norm_family="")])
    assert found.norm_family == kind and series_of([found])[0].kind == kind


def test_cost_pictures_show_networks_with_cost_and_score(tmp_path):
    rows = find(comparison(tmp_path, APART, **SUBSET)).comparisons[0].results.rows
    series = series_of(rows)
    points = points_of(series, 2, COSTS[0])
    assert [round(point.x) for point in points] == [10, 9, 21] and len(cost_plots(series, 2)) == 3
    assert all("KernelNorm" in svg for svg in cost_plots(series, 2))
    assert cost_plots(series_of([row(), row("kernel")]), 2) == []


def test_activations_of_a_folder_are_shown(tmp_path):
    comparison(tmp_path, {("original", 2): 50.0, ("kernel", 2): 50.0})
    stages = [activations.Stage("cifar_resnet8", "kernel", 2, 0, i, f"blocks.{i}", 1.0, 2.0**i) for i in range(3)]
    activations.write(tmp_path / "cifar_resnet8-kernel-b2-s0" / activations.FILE, stages)
    text = report(tmp_path).read_text()
    assert "Scale of activations by stage" in text and activations.read(tmp_path / activations.FILE) == stages
    assert "Scale of activations" not in report(comparison(tmp_path / "none", {("kernel", 2): 50.0})).read_text()
