"""The examples of docs/convert.md: every block of Python is run in order, and prints what stands below it."""

from __future__ import annotations

import doctest
import re
import shlex
from pathlib import Path

from knport.cli import main

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
BLOCK = re.compile(r"^```(python|text|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_the_examples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    found = blocks()
    for (language, code), following in zip(found, [*found[1:], ("", "")], strict=True):
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
            printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines()) + "\n"
            expected = following[1] if following[0] == "text" else "\n"
            same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
            assert same, f"{code}\nprints\n\n{printed}\nand not\n\n{expected}"
    assert {language for language, _ in found} == {"python", "text", "sh"}


def test_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [line for language, code in blocks() if language == "sh" for line in code.splitlines()]
    assert lines
    for line in lines:
        program, *args = shlex.split(line)
        assert program == "knport" and main(args) == 0, line
        assert capsys.readouterr().out
