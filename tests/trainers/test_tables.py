"""Tables of the terminal: nothing is cut at 80 columns."""

from __future__ import annotations

import pytest
from rich.table import Table

from fsam_trainers import tables


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def made(headings, rows, words=()):
    table = Table(title="of 2 things")
    for name in headings:
        table.add_column(name, justify="left" if name in words else "right")
    for row in rows:
        table.add_row(*row)
    return table


METHODS = [f"precond-functional-sam:correction-fraction={q}:learning-rate=0.003" for q in ("1/4", "1/8")]
NUMBERS = [f"heading {i}" for i in range(9)]


def test_numbers_are_whole_and_names_distinguishable(capsys):
    rows = [[name, *(f"{1.5 + i:.4f} (1.55–1.7{i})" for i in range(9))] for name in METHODS]
    tables.show(made(["method", *NUMBERS], rows, words=["method"]))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert all(cell in shown for row in rows for cell in row[1:])
    for name in METHODS:
        assert shown.count("\n" + name.split(":")[1]) == 5  # below its method, in each of the blocks
    assert "…" not in shown


def test_empty_columns_are_left_out_and_sums_stand_apart(capsys):
    table = made(["region", "ms", "nothing"], [["base", "1", ""], ["update", "2", ""]])
    table.add_section()
    table.add_row("together", "3", "")
    tables.show(table)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "of 2 things"
    assert "nothing" not in " ".join(lines)
    assert (lines[-2], lines[-1].split()) == ("", ["together", "3"])


def test_one_row_is_names_and_values(capsys):
    tables.show(made(["method", "a long heading", "x"], [["sam", "1.5", r"\[torch]"]]))
    assert capsys.readouterr().out == "of 2 things\nmethod          sam\na long heading  1.5\nx               [torch]\n"


def test_lines_are_not_cut(capsys):
    path = "/".join(["folder"] * 40)
    tables.show_lines(path, "[not markup]")
    assert capsys.readouterr().out == f"{path}\n[not markup]\n"
