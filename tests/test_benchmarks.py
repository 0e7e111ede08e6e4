"""The benchmarks: times on fabricated clocks, memory against pencil and paper, tiny cases end to end."""

from __future__ import annotations

import csv
import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

import architectures
from experiments.benchmarks import bars, layers, plot, profile, timing
from experiments.benchmarks import competitors as names
from experiments.benchmarks.__main__ import main
from experiments.benchmarks.competitors import CONV, MOMENTS, PrimitiveBatchNorm2d, UnfoldKNConv, competitor
from experiments.benchmarks.measure import Case, Setting, Step, Variant, run_case
from experiments.benchmarks.memory import MIB, saved_mib, step_memory
from experiments.benchmarks.options import Options
from experiments.benchmarks.rows import COLUMNS, Row, append, before, latest, read
from experiments.benchmarks.run import BENCHMARKS
from experiments.benchmarks.twin import PaddedConv2d, batchnorm_twin, materialize
from knport import KernelNorm2d, KNConv2d, KNPortError
from knport.errors import NothingToConvert
from knport.geometry import pad, padding_pairs

FLOAT = 4
QUICK = Setting(seconds=0.0, rounds=2)


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def step(self, seconds, log=None, name=""):
        def run():
            self.now += seconds() if callable(seconds) else seconds
            if log is not None:
                log.append(name)

        return run


# ---- times


def test_rounds_hold_every_step_once_in_random_order():
    clock, log = Clock(), []
    steps = {name: clock.step(1.0, log, name) for name in "abc"}
    times = timing.interleaved(steps, seconds=100, least=3, most=20, clock=clock)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 20 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(one) for one in rounds}) > 2
    assert all(set(own) == set(range(20)) for own in times.values())


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (9.5, 10), (1000, 12)])
def test_rounds_by_time(seconds, rounds):
    clock = Clock()
    times = timing.interleaved({"a": clock.step(1.0)}, seconds=seconds, least=3, most=12, clock=clock)
    assert times["a"] == dict.fromkeys(range(rounds), 1.0)


def test_ratios_are_paired():
    """A machine that gets slower and slower changes every time and no ratio; unpaired medians would differ."""
    clock, rounds = Clock(), {"base": 0, "mine": 0}

    def slowing(name, factor):
        def seconds():
            rounds[name] += 1
            return factor * 2.0 ** rounds[name]

        return seconds

    steps = {"base": clock.step(slowing("base", 1.0)), "mine": clock.step(slowing("mine", 1.5))}
    times = timing.interleaved(steps, seconds=0, least=6, clock=clock)
    assert len(set(times["mine"].values())) == 6
    assert timing.spread(timing.ratios(times["mine"], times["base"])) == (1.5, 1.5, 1.5)
    assert timing.differences(times["mine"], times["base"]) == [2.0**number for number in range(6)]


def test_a_step_that_takes_part_in_every_third_round():
    clock = Clock()
    steps = {"fast": clock.step(1.0), "slow": clock.step(8.0)}
    times = timing.interleaved(steps, seconds=0, least=7, every={"slow": 3}, clock=clock)
    assert list(times["slow"]) == [0, 3, 6] and len(times["fast"]) == 7
    assert timing.ratios(times["slow"], times["fast"]) == [8.0, 8.0, 8.0]


def test_spread():
    assert timing.spread([3.0]) == (3.0, 3.0, 3.0)
    assert timing.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)


# ---- memory


def test_saved_of_a_chain():
    x = torch.zeros(MIB // FLOAT, requires_grad=True)
    weight = torch.zeros(MIB // FLOAT, requires_grad=True)
    assert saved_mib(lambda: (x * weight).exp(), [weight]) == 2  # x and the exponential
    assert saved_mib(lambda: (x * weight).exp(), [weight, x]) == 1


def test_memory_beyond_what_was_there():
    x = torch.zeros(MIB // FLOAT)
    memory = step_memory(lambda: torch.cat([x, x]).sum(), [x], torch.device("cpu"))
    assert memory.peak == pytest.approx(2, abs=0.01) and memory.largest == 2


def test_a_layer_keeps_two_full_size_tensors():
    case = next(iter(layers.cases(Options(quick=True))))
    rows = {row.variant: row for row in run_case(case, QUICK)}
    n, channels, side = case.shape[0], case.shape[1], case.shape[2]
    full, one = FLOAT * n * channels * side**2 / MIB, FLOAT * n * side**2 / MIB
    for variant in (names.PLAIN, names.MOMENTS):
        assert 2 * full <= rows[variant].saved_mib <= 2 * full + bars.MOST_MAPS * one
        assert rows[variant].largest_tensor_mib <= 1.5 * max(full, FLOAT * channels**2 * 9 / MIB)


# ---- cases


@pytest.mark.parametrize("benchmark", [name for name in BENCHMARKS if name not in ("compile", "reach", "table6")])
def test_a_quick_case_of_every_benchmark(benchmark):
    case = next(iter(BENCHMARKS[benchmark](Options(quick=True))))
    rows = run_case(case, QUICK)
    assert [row.variant for row in rows] == [variant.name for variant in case.variants]
    for row in rows:
        assert row.median_ms > 0 and row.q25_ms <= row.median_ms <= row.q75_ms and row.repeats >= 1
        assert row.ratio > 0 and row.peak_memory_mib > 0 and (row.saved_mib is None) == (row.mode == "inference")
        assert (row.N, row.C_in, row.H, row.W) == case.shape and row.threads == torch.get_num_threads()
    assert {row.ratio for row in rows if row.variant == row.baseline} == {1.0}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("quick", [True, False])
def test_cases_are_told_apart(benchmark, quick):
    cases = list(BENCHMARKS[benchmark](Options(quick=quick)))
    assert len({(case.name, case.mode, case.layout) for case in cases}) == len(cases)
    for case in cases:
        chosen = [variant.name for variant in case.variants]
        assert len(set(chosen)) == len(chosen)
        assert {case.baseline, *(v.baseline or case.baseline for v in case.variants)} <= set(chosen)


def test_what_cannot_make_a_step_has_a_note():
    variants = (Variant(name="right", build=lambda: nn.Conv2d(3, 4, 1)), Variant(name="wrong", build=broken))
    case = Case(benchmark="layers", name="x", variants=variants, baseline="right", shape=(1, 3, 4, 4))
    right, wrong = run_case(case, QUICK)
    assert right.median_ms and not right.note
    assert wrong.median_ms is None and wrong.ratio is None and "channels" in wrong.note


def broken() -> nn.Module:
    return nn.Conv2d(5, 4, 1)


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        torch._dynamo.graph_break()
        return y.relu()


@pytest.mark.parametrize(("build", "breaks"), [(lambda: nn.Conv2d(3, 4, 1), 0), (Breaks, 1)])
def test_compiled_variants_count_graph_breaks(monkeypatch, build, breaks):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    variants = (Variant(name="eager", build=build), Variant(name="compiled", build=build, engine="compiled"))
    case = Case(benchmark="compile", name="x", variants=variants, baseline="eager", shape=(1, 3, 4, 4))
    eager, compiled = run_case(case, QUICK)
    assert eager.graph_breaks is None and compiled.graph_breaks == breaks
    assert compiled.engine == "compiled" and compiled.ratio > 0


def test_reach_is_of_one_layer_in_three_ways(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    training, inference = layers.reach_cases(Options(quick=True))
    for case in (training, inference):
        rows = {row.variant: row for row in run_case(case, QUICK)}
        assert all(row.ratio > 0 and not row.note for row in rows.values())
        compiled = {name for name, row in rows.items() if row.engine == "compiled"}
        assert compiled == {names.ALONE, names.ALONE_PLAIN} and not any(rows[name].graph_breaks for name in compiled)
        assert {name: row.dropout for name, row in rows.items() if "p=0" in name} == dict.fromkeys(
            (names.PLAIN, names.STRAIGHT_PLAIN, names.ALONE_PLAIN), 0.0
        )
    assert not list(layers.reach_cases(Options(device="cuda")))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_operators_alone_are_the_layer(p, training):
    layer = KNConv2d(**GEOMETRY, dropout=p).train(training)
    alone = names.StraightKNConv2d(**GEOMETRY, size=(8, 8), dropout=p).train(training)
    alone.load_state_dict(layer.state_dict())
    found = []
    for module in (layer, alone):
        x = torch.randn(2, GEOMETRY["in_channels"], 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        y = module(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, *module.parameters()))))
    assert all(map(torch.equal, *found))


def test_a_training_step_leaves_no_gradients_and_keeps_the_layout():
    case = next(iter(layers.cases(Options(quick=True))))
    step = Step(competitor(MOMENTS, GEOMETRY).build(), case, QUICK)
    step()
    assert step.x.grad is None and all(p.grad is None for p in step.model.parameters())
    assert step.x.is_contiguous(memory_format=torch.channels_last) and step.x.requires_grad and step.model.training


def test_autocast_computes_in_the_dtype_asked_for():
    case = dataclasses.replace(next(iter(layers.cases(Options(quick=True)))), mode="inference")
    step = Step(competitor(CONV, GEOMETRY).build(), case, Setting(dtype="bfloat16"))
    with torch.no_grad():
        assert step.forward().dtype == torch.bfloat16


GEOMETRY = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1}


def test_the_published_form_is_the_same_layer():
    torch.manual_seed(0)
    ours = KNConv2d(4, 6, 3, padding=1, dropout=0.0)
    theirs = UnfoldKNConv(4, 6, 3, padding=1, dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 5, 7)
    torch.testing.assert_close(theirs(x), ours(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_of_primitives_is_batchnorm(training):
    torch.manual_seed(0)
    ours, theirs = PrimitiveBatchNorm2d(5).train(training), nn.BatchNorm2d(5).train(training)
    x = 3 * torch.randn(4, 5, 3, 3) + 1
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


# ---- the twin


def small(**kwargs) -> nn.Module:
    return architectures.create_model("kncifar_resnet8x2", num_classes=5, low_resolution=True, **kwargs)


def test_twin_has_batchnorm_in_each_place():
    model = small()
    twin = materialize(batchnorm_twin(model), (2, 3, 32, 32))
    kinds = [type(module) for module in twin.modules()]
    layers_, norms = (sum(isinstance(m, kind) for m in model.modules()) for kind in (KNConv2d, KernelNorm2d))
    assert KNConv2d not in kinds and KernelNorm2d not in kinds
    assert (
        kinds.count(nn.BatchNorm2d) == layers_ + norms and kinds.count(nn.Conv2d) + kinds.count(PaddedConv2d) == layers_
    )
    assert shapes(twin) == shapes(model)
    assert any(isinstance(module, KNConv2d) for module in model.modules())  # the model itself is as before


def shapes(model: nn.Module) -> list[torch.Size]:
    return [module.weight.shape for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("kernel_size", "options"),
    [
        (3, {"padding": 1}),
        (2, {"padding": ((1, 0), (0, 1))}),
        (3, {"padding": ((2, 0), (1, 3)), "stride": 2}),
        (3, {"padding": "same", "dilation": 2}),
        (3, {"padding": 1, "padding_mode": "reflect"}),
        ((2, 3), {"groups": 2, "stride": (1, 2)}),
    ],
)
def test_twin_has_the_geometry(kernel_size, options):
    layer = KNConv2d(4, 6, kernel_size, dropout=0.0, **options)
    twin = batchnorm_twin(layer)
    x = torch.randn(2, 4, 9, 8)
    assert twin(x).shape == layer(x).shape
    # the same places of the same input: the convolution of the twin is the layer's own, before normalization
    ones = torch.ones(2, 4, 9, 8)
    plain = nn.functional.conv2d(padded(ones, layer), layer.weight, None, layer.stride, 0, layer.dilation, layer.groups)
    torch.testing.assert_close(twin[0](ones), plain, atol=1e-5, rtol=1e-5)


def padded(x, layer):
    return pad(x, padding_pairs(layer.padding, layer.kernel_size, layer.stride, layer.dilation), layer.padding_mode)


def test_twin_of_nothing():
    with pytest.raises(NothingToConvert, match="KNConv2d"):
        batchnorm_twin(nn.Conv2d(1, 1, 1))


# ---- the table


def row(**columns) -> Row:
    usual = {"device": "cpu: x", "threads": 2, "benchmark": "layers", "case": "N16 C64 32x32 k3", "mode": "training"}
    usual |= {"variant": MOMENTS, "median_ms": 10.0, "ratio": 1.0, "ratio_q25": 0.9, "ratio_q75": 1.1, "torch": "2"}
    usual |= {"date": "2026-01-02T03:04:05", "commit": "0123456789", "baseline": names.BATCH}
    return Row(**(usual | columns))


def test_rows_round_trip_and_only_grow(tmp_path):
    path = tmp_path / "sub" / "b.csv"
    rows = [row(N=3, note="a, b"), row(variant=CONV, median_ms=None, ratio=None)]
    append(path, rows[:1])
    before = path.read_text()
    append(path, rows[1:])
    assert path.read_text().startswith(before) and read(path) == rows
    assert next(csv.reader(path.open())) == list(COLUMNS)


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "b.csv"
    path.write_text("date,something\n1,2\n")
    for use in (read, lambda p: append(p, [row()])):
        with pytest.raises(KNPortError, match="something"):
            use(path)
    assert path.read_text() == "date,something\n1,2\n"


def test_a_bad_field_names_its_line(tmp_path):
    path = tmp_path / "b.csv"
    append(path, [row(), row()])
    path.write_text(path.read_text().replace(",10,", ",ten,", 1))
    with pytest.raises(KNPortError, match=r"line 2: median_ms='ten'"):
        read(path)


def test_the_latest_of_repeated_rows():
    first, other, second = row(ratio=1.0), row(case="other"), row(ratio=2.0)
    assert latest([first, other, second]) == [second, other]
    assert before([first, other, second], 1) == [first] and before([first, other, second], 2) == []


# ---- bars


def lines(text: str) -> dict[str, list[str]]:
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in table[2:]}


def test_bars_without_rows_are_blank():
    found = lines(bars.table([], 2))
    assert len(found) == len(bars.CPU_BARS) + len(bars.GPU_BARS)
    assert all(measured == met == earlier == "" for measured, _, met, earlier in found.values())


def test_bars_by_median_and_worst():
    key = "the same, dropout 0.05 (moments)"
    good = [row(case=str(i), ratio=r) for i, r in enumerate((1.0, 1.05, 1.19))]
    assert lines(bars.table(good, 2))[key] == ["1.05, worst 1.19 of 3", "<= 1.10 median, none over 1.20", "yes", ""]
    assert lines(bars.table([*good, row(case="3", ratio=1.3)], 2))[key][2] == "no"
    assert lines(bars.table([*good, row(case="2", ratio=1.4)], 2))[key][0] == "1.05, worst 1.40 of 3"
    assert lines(bars.table(good, 1))[key][0] == ""  # other threads
    older = [row(case=str(i), ratio=r) for i, r in enumerate((1.2, 1.25, 1.3))]
    assert lines(bars.table([*older, *good], 2))[key][3] == "1.25"
    assert lines(bars.table([*older, *older, *older, *older, *good], 2))[key][3] == "1.25, 1.25, 1.25"


def test_every_cpu_has_its_figures_and_the_last_is_judged():
    key = "the same, dropout 0.05 (moments)"
    rows = [row(device="cpu: old", ratio=1.3), row(device="cpu: x", ratio=1.2), row(device="cpu: x", ratio=1.0)]
    text = bars.table(rows, 2)
    assert lines(text)[key] == ["1.00", "<= 1.10 median, none over 1.20", "yes", "1.20", "1.30"]
    assert "on cpu: old" in text and "\n\ncpu: x, 2 threads" in text and "\n\ncpu: old, 2 threads" in text


def test_reach_is_shown_where_all_of_it_was_measured():
    plain = (names.PLAIN, names.STRAIGHT_PLAIN, names.ALONE_PLAIN)
    moments = (names.MOMENTS, names.STRAIGHT, names.ALONE)
    kinds = [(v, "training") for v in plain] + [(v, mode) for v in moments for mode in ("training", "inference")]
    rows = [
        row(
            benchmark="reach", variant=v, mode=mode, ratio=1 + i / 10, engine="compiled" if "compiled" in v else "eager"
        )
        for i, (v, mode) in enumerate(kinds)
    ]
    found = lines(bars.reach(rows, 2))
    assert found["KNConv2d"] == ["1.00", "1.30", "1.40"] and found["compiled by itself"] == ["1.20", "1.70", "1.80"]
    assert bars.reach(rows[1:], 2) == bars.reach([], 2) == ""


def test_bars_of_networks_growth_and_compiling():
    networks = {"benchmark": "networks", "case": "knresnet18 batch 32", "N": 32}
    rows = [
        row(**networks, variant="KNResNet-18", ratio=1.2, saved_mib=30.0, median_ms=12.0),
        row(**networks, variant="its BatchNorm twin", ratio=1.0, saved_mib=40.0),
        row(**networks, variant="ResNet-18 BatchNorm", ratio=0.5, saved_mib=20.0, median_ms=6.0),
        row(**networks | {"case": "knresnet18 batch 2", "N": 2}, variant="KNResNet-18", ratio=3.0),
        row(benchmark="compile", case="knresnet18 batch 32", N=32, variant="compiled", engine="compiled", ratio=0.8,
            graph_breaks=0),
        *(row(benchmark="growth", case="statistics", mode=mode, variant=f"k={k}", k=k, ratio=1 + (k - 2) / 50)
          for k in range(1, 8) for mode in ("training", "inference")),
        row(benchmark="forms", variant=names.PUBLISHED, k=3, ratio=4.9),
        row(device="cuda: y", threads=16, dtype="bfloat16", engine="compiled", ratio=0.9),
    ]  # fmt: skip
    found = lines(bars.table(rows, 2))
    assert found["KNResNet-18 training step / its BatchNorm twin"][::2] == ["1.20", "no"]
    assert found["KNResNet-18 saved activations / its twin"][::2] == ["0.75", "yes"]
    assert found["KNResNet-18 training step / ResNet-18 (half the MACs)"][::2] == ["2.00", ""]
    assert found["KNResNet-18 compiled / eager training step"][::2] == ["0 breaks, 0.80", "yes"]
    assert found["statistics of k = 3 to 7 / k = 2, at most"][::2] == ["training 1.10, inference 1.10", "yes"]
    assert found["unfolded units as published / ours, training, k = 3"][::2] == ["4.9, least 4.9", "no"]
    assert found["GPU, bf16, channels_last, compiled / Conv2d+BatchNorm2d"][::2] == ["0.90", "yes"]


# ---- the commands


def test_run_bars_and_plot(tmp_path, capsys):
    out, page = tmp_path / "b.csv", tmp_path / "page.md"
    threads = torch.get_num_threads()
    try:
        quick = ["--quick", "--threads", "1", "--out", str(out), "--layouts", "channels_last", "--seconds", "0"]
        assert main(["run", "layers", "forms", *quick]) == 0
        first = out.read_text()
        assert main(["run", "growth", *quick]) == 0
    finally:
        torch.set_num_threads(threads)
    assert out.read_text().startswith(first) and {r.benchmark for r in read(out)} == {"layers", "forms", "growth"}
    page.write_text(f"above\n{bars.BEGIN}\noutdated\n{bars.END}\nbelow\n")
    assert main(["bars", "--csv", str(out), "--threads", "1", "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "outdated" not in text
    assert text.split(bars.BEGIN)[1].split(bars.END)[0].strip() in capsys.readouterr().out
    assert main(["plot", "--csv", str(out), "--threads", "1", "--folder", str(tmp_path)]) == 0
    for name in ("layers", "growth"):
        svg = (tmp_path / f"benchmark_{name}.svg").read_text()
        assert svg.lstrip().startswith("<?xml") and len(svg) < 150_000
    assert not (tmp_path / "benchmark_networks.svg").exists()
    assert main(["bars", "--csv", str(out), "--threads", "1", "--into", str(page)]) == 0
    assert page.read_text().count("](benchmark_") == 2 and page.read_text().endswith("below\n")


def test_networks_picture():
    shape = {"benchmark": "networks", "case": "knresnet18 batch 32", "baseline": "its BatchNorm twin"}
    rows = [row(**shape, variant=v, saved_mib=s) for v, s in (("KNResNet-18", 30.0), ("its BatchNorm twin", 40.0))]
    assert "<svg" in plot.networks_picture(bars.Rows(rows, cuda=False, threads=2))
    assert plot.networks_picture(bars.Rows([], cuda=False, threads=2)) is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["run", "layer"], "did you mean 'layers'"),
        (["runs"], "did you mean 'run'"),
        (["bars", "--csv", "missing.csv"], "no such file"),
        (["plot", "--csv", "missing.csv"], "no such file"),
        (["plot", "layer"], "did you mean 'layers'"),
        (["plot", "--on", "cpu: amd"], "unknown device 'cpu: amd'; did you mean 'cpu: "),
        (["run", "--threads", "0"], "at least 1"),
        (["run", "growth", "--cases", "kernels *"], "matches no case"),
    ],
)
def test_mistakes(args, message, capsys):
    assert main(args) == 2
    assert message in capsys.readouterr().err


def test_help(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {command}" in shown for command in ("run", "plot", "bars"))


# ---- where a step goes


def test_parts_of_a_step_add_up_and_leave_nothing_behind():
    before = {(m, name): getattr(m, name) for pairs in profile.KN_PARTS.values() for m, name in pairs}
    x = torch.randn(2, 8, 16, 16)
    pair = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
    variants = {"ours": KNConv2d(8, 8, 3, padding=1), "theirs": pair}
    found = profile.measure({name: profile._layer_step(layer, x) for name, layer in variants.items()}, 0.2)
    assert set(found["ours"]) == {"step", "rest", *profile.KN_PARTS}
    assert set(found["theirs"]) == {"step", "rest", *profile.TORCH_PARTS}
    assert all(found["ours"][part] > 0 for part in ("step", *profile.KN_PARTS))
    assert all(found["theirs"][part] > 0 for part in ("step", *profile.TORCH_PARTS))
    assert sum(found["ours"][part] for part in profile.KN_PARTS) < found["ours"]["step"]
    assert all(getattr(m, name) is function for (m, name), function in before.items())


def test_a_part_that_calls_another_does_not_count_it(monkeypatch):
    """`statistics` takes the channel sums, which are a pass and no map."""
    slow, now = profile.cpu.channel_sums, [0.0]

    def sums(*args):
        now[0] += 5.0
        return slow(*args)

    monkeypatch.setattr(profile.cpu, "channel_sums", sums)
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now[0])
    layer = KNConv2d(8, 8, 3, dropout=0.0)
    with profile._clock() as spent:
        layer(torch.randn(1, 8, 8, 8))
    assert spent["passes"] == 5.0 and spent["maps"] == 0.0


def test_what_a_bar_leaves(tmp_path):
    """1.05 x 10 ms less convolution (8 ms) and rest (0.5 ms) leave 2 ms."""
    path = tmp_path / "profile.csv"
    about = {"date": "2026-01-01", "commit": "0123456789", "device": "cpu: x", "torch": "2.11.0", "threads": 2}
    about["case"] = "N1 C8 4x4 k3"
    norm = {"variant": names.BATCH, "step_ms": 10, "convolution_ms": 8, "batchnorm_ms": 1.5, "rest_ms": 0.5}
    ours = {"variant": names.PLAIN, "step_ms": 11, "convolution_ms": 8, "passes_ms": 1, "filters_ms": 0.5}
    profile._append(path, about | norm | {"device": "cpu: old", "case": "N2 C8 4x4 k3"})
    for part in (norm, {**ours, "step_ms": 20, "maps_ms": 9}, {**ours, "maps_ms": 1.25, "rest_ms": 0.25}):
        profile._append(path, about | part)
    text = profile.table(path)
    assert "| N1 C8 4x4 k3 | KNConv2d p=0 | 1.05 | 2.00 | 1.50 | 1.25 | 1.10 |" in text
    assert "cpu: x, 2 threads" in text and "commit 012345678" in text and "| 20 |" not in text and "N2 C8" not in text
