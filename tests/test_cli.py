"""The command knport: what it prints, its exit codes, and that a user's mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import timm
import torch

import knport
from knport.cli import COMMANDS, main
from knport.folder import RECIPE

SMALL = ["timm/test_resnet", "--num-classes", "5"]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def run(capsys, *args: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as error:  # tyro's
        code = error.code
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return code, out.out, out.err


def test_help_names_every_command_and_waits_for_nothing():
    start = time.perf_counter()
    code = "import sys; from knport.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)
    assert time.perf_counter() - start < 20  # a tenth of a second, on a machine that has nothing else to do


def test_python_m_knport():
    done = subprocess.run(
        [sys.executable, "-m", "knport", "--version"], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0 and f"usage: knport {command}" in out and "--json" in out


def test_plan(capsys):
    code, out, err = run(capsys, "plan", *SMALL, "--enlarge", "none", "--exclude", "layer1", "re:layer2.*")
    assert (code, err) == (0, "")
    assert "Plan for ResNet" in out and "excluded by 'layer1'" in out and "\x1b" not in out
    code, out, _ = run(capsys, "plan", *SMALL, "--norm", "group", "--json")
    assert code == 0 and json.loads(out)["norm"] == "group"


def test_colours_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[3" in run(capsys, "plan", *SMALL)[1]
    assert "\x1b" not in run(capsys, "plan", *SMALL, "--json")[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[3" not in run(capsys, "plan", *SMALL)[1]


def test_convert_and_what_can_be_done_with_the_folder(capsys, tmp_path):
    folder = tmp_path / "kn"
    code, out, _ = run(capsys, "convert", *SMALL, "--dropout", "0.1", "--out", folder)
    assert code == 0 and "15 absorbed" in out and f"knport.load('{folder}') loads it" in out
    model = knport.load(folder)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5) and model.layer1[0].conv1.dropout == 0.1
    assert "takes over from" in run(capsys, "plan", folder)[1]
    assert [plan["model"] for plan in json.loads(run(capsys, "plan", folder, "--json")[1])] == ["ResNet"]
    found = json.loads(run(capsys, "summary", folder, "--json")[1])
    assert found["before"]["norms"] == {"BatchNorm2d": 15} and found["after"]["norms"] == {"KernelNorm2d": 1}
    code, out, _ = run(capsys, "check", folder, "--image-size", "32")
    assert code == 0 and "every promise holds" in out


def test_convert_with_another_norm_and_a_budget(capsys, tmp_path):
    code, out, _ = run(capsys, "convert", *SMALL, "--norm", "group", "--out", tmp_path, "--json")
    assert code == 0 and json.loads(out)["norms"] == {"replaced": 15}
    code, _, err = run(capsys, "convert", *SMALL, "--norm", "group", "--match-params", "model", "--out", tmp_path)
    assert code == 2 and "keeps the widths" in err


def test_check_of_an_original_ends_with_1(capsys):
    code, out, _ = run(capsys, "check", *SMALL, "--norm", "original", "--image-size", "32", "--json")
    report = json.loads(out)
    assert code == 1 and report["holds"] is False
    code, out, _ = run(capsys, "summary", *SMALL, "--norm", "original")
    assert code == 0 and "number" in out and "before" not in out


def test_list(capsys):
    code, out, _ = run(capsys, "list", "timm/resnet18*")
    assert code == 0 and out.splitlines()[1:] == ["models (2):", "  timm/resnet18", "  timm/resnet18d"]
    names = json.loads(run(capsys, "list", "resnet18", "--json")[1])["models"]
    assert {"torchvision/resnet18", "timm/resnet18", "architectures/knresnet18"} <= set(names)
    assert len(names) == len(set(names)) and "timm/knresnet18" not in names


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["pln"], "unknown command 'pln'; did you mean 'plan'?"),
        (["plan", "timm/test_resnt"], "did you mean 'timm/test_resnet'"),
        (["plan", "resnet50"], "did you mean 'timm/resnet50' or 'torchvision/resnet50'?"),
        (["plan", "tim/resnet50"], "unknown model 'tim/resnet50'"),
        (["plan", *SMALL, "--norm", "grop"], "unknown norm 'grop'; did you mean 'group'"),
        (["plan", *SMALL, "--norm", "original"], "there is no plan"),
        (["plan", *SMALL, "--exclude", "lyer1"], "near names: layer1"),
        (["plan", *SMALL, "--set", "colour"], "expected name=value"),
        (["plan", *SMALL, "--set", "colour=red"], "could not build timm/test_resnet"),
        (["plan", "architectures/knresnet18", "--pretrained"], "architectures offers no weights"),
        (["convert", "timm/test_nfnet", "--out", "{tmp}/new"], "normalization"),
        (["convert", *SMALL, "--norm", "original", "--out", "{tmp}/new"], "nothing to save"),
        (["convert", *SMALL, "--out", "{tmp}/file/new"], "error: "),
        (["summary", "{tmp}"], f"has no {RECIPE}"),
        (["list", "nothing_like_it"], "no network has 'nothing_like_it'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, tmp_path, args, words):
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, *(arg.format(tmp=tmp_path) for arg in args))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "new").exists()


def test_trained_weights_that_cannot_be_had(capsys, monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("no connection")

    monkeypatch.setattr(timm, "create_model", offline)
    code, out, err = run(capsys, "plan", *SMALL, "--pretrained")
    assert (code, out) == (2, "")
    assert err == "error: no trained weights for timm/test_resnet: RuntimeError: no connection\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--enlrge", "2x2"], "--enlarge"),
        (["--enlarge", "2x3"], "unknown KNConfig.enlarge '2x3'"),
        (["--dropout", "1.5"], "KNConfig.dropout=1.5"),
    ],
)
def test_flags_that_do_not_exist_and_values_out_of_range(capsys, args, words):
    code, out, err = run(capsys, "plan", *SMALL, *args)
    assert (code, out) == (2, "") and words in " ".join(err.split())
