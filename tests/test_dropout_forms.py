"""The comparison of the forms of dropout: a row per run, none made twice."""

from __future__ import annotations

from experiments import dropout_forms

RESULT = {"top1": 31.25, "seconds": 60.2}


def test_what_has_finished_is_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(dropout_forms, "train", lambda run, quiet: trained.append(run) or RESULT)
    out = tmp_path / "results.csv"
    for seeds in ((0,), (0, 1)):
        dropout_forms.dropout_forms(seeds=seeds, out=out)
    forms = {run.dropout_form for run in trained}
    assert {"moments", "shared", "unit"} <= forms and len(trained) == 2 * len(forms)
    rows = dropout_forms.read(out)
    assert [row["seed"] for row in rows] == ["0"] * len(forms) + ["1"] * len(forms)
    assert {row["top1"] for row in rows} == {"31.25"}
    assert b"\r" not in out.read_bytes()
    assert "31.2" in capsys.readouterr().out
