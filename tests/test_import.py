"""`import knport`: every public name is there, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys

import pytest

import knport

FRESH = "import sys, knport; heavy = {{'torch', 'timm', 'torchvision'}} & set(sys.modules); {}"


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", FRESH.format(code)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_knport_imports_no_torch():
    assert in_a_fresh_process("print(heavy)") == "set()"


def test_sub_packages_are_there_without_being_imported():
    assert in_a_fresh_process("print(knport.surgery.plan.__name__, knport.functional.__name__)") == (
        "plan knport.functional"
    )


@pytest.mark.parametrize("name", knport.__all__)
def test_every_public_name(name):
    value = getattr(knport, name)
    assert value is getattr(knport, name)
    assert getattr(value, "__name__", name).removeprefix("knport.") == name


def test_what_editors_are_told_is_what_there_is():
    tree = ast.parse(inspect.getsource(knport))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "knport" in (node.module or "")]
    told = {alias.name: node.module for node in imports for alias in node.names}
    assert set(told) == set(knport.__all__) == set(dir(knport))
    assert all(knport._HOMES[name] == home for name, home in told.items())


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'kn_convert'"):
        _ = knport.kn_convert
    assert not hasattr(knport, "__wrapped__")
