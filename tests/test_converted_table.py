"""The table of converted networks: means over seeds, and who is behind."""

from __future__ import annotations

import pytest

from experiments.converted_table import BEGIN, END, converted_table
from knport.errors import KNPortError

ROWS = """model,norm,batch_size,seed,status,top1
a,original,2,0,finished,90
a,original,2,1,finished,92
a,kernel,2,0,finished,88
a,kernel,2,1,failed,
b,original,2,0,finished,50
b,kernel,2,0,finished,49.5
"""


def test_means_and_who_is_behind(tmp_path):
    results, page = tmp_path / "results.csv", tmp_path / "page.md"
    results.write_text(ROWS)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    converted_table(results, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith(f"{END}\nafter\n") and "old" not in text
    assert "1 of 2 converted networks" in text and "behind: a by 3.0" in text
    assert "| a | 91.0 ± 1.4 (n=2) | 88.0 (n=1) |" in text


def test_mistakes_are_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("no markers")
    with pytest.raises(KNPortError, match="no finished runs"):
        converted_table(tmp_path / "none.csv", page)
    (tmp_path / "results.csv").write_text(ROWS)
    with pytest.raises(KNPortError, match="expected the line"):
        converted_table(tmp_path / "results.csv", page)
