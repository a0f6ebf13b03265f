"""docs/integrations.md: each snippet runs as printed, is short, and gives the gradient of hand-written autograd."""

from __future__ import annotations

import pytest

from fsam_core.torch import UserError
from integrations import CLIENTS, PAGE, TABLE, measure, snippets


@pytest.mark.parametrize("client", CLIENTS)
def test_snippet_runs_as_printed_with_the_right_gradient(client):
    lines, error = measure(client)
    assert lines <= 10
    assert error < 1e-5


def test_every_snippet_is_in_the_table():
    table = TABLE.search(PAGE.read_text())[0]
    rows = [row.split("|")[1:4] for row in table.splitlines() if row.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == list(CLIENTS) == list(snippets())
    assert all(row[1].strip() == "runs" for row in rows)
    assert [int(row[2]) for row in rows] == [sum(map(bool, code.split("\n"))) for code in snippets().values()]


def test_gradient_of_another_method_is_not_within_the_error():
    code = snippets()["any loop"].replace("FunctionalSAM", "SAM")
    assert CLIENTS["any loop"](code) > 1e-3


def test_snippet_of_a_wrong_head_is_found():
    with pytest.raises(UserError):
        CLIENTS["any loop"](snippets()["any loop"].replace("shift=True", "shift=False"))
