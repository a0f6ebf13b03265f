"""The regression guard: what it calls worse, what it says, and that slowdowns that are planted are caught."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest

from fsam_core.errors import UserError
from fsam_profiling import guard, guard_items, rows
from fsam_profiling.guard_items import Item, Program
from fsam_profiling.timing.step import METHOD, SAVINGS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def process(*command: str) -> subprocess.CompletedProcess[str]:
    """Without Triton's interpreter, which `tests/conftest.py` switches on."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)


@needs_triton
@needs_libtpu
def test_the_quick_figures_are_those_of_the_baseline():
    done = process("-m", "fsam_trainers.cli", "profile", "check", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no figure is worse by more than 3%" in done.stdout


@pytest.mark.parametrize(
    ("figure", "before", "after", "worse"),
    [
        ("cycles", 1000, 1030, False),
        ("cycles", 1000, 1031, True),
        ("cycles", 1000, 500, False),
        ("temporary_bytes", 0, 0, False),
        ("temporary_bytes", 0, 1, True),
        ("spills", 0, 2, True),
        ("registers", 64, 66, True),
        ("load_bytes", 16, 4, True),
        ("load_bytes", 4, 16, False),
        ("store_bytes", 0, 4, False),
        ("bytes_over_least", 1.0, 1.029, False),
        ("bytes_over_least", 1.01, 1.05, True),
    ],
)
def test_a_figure_is_worse_where_it_costs_three_per_cent_more(figure, before, after, worse):
    changes = guard.compare({"it": {figure: before}}, {"it": {figure: after}})
    assert [change.worse for change in changes] == ([worse] if before != after else [])


def test_the_worst_change_comes_first_and_says_by_how_much():
    before = {"a": {"cycles": 1000, "bytes": 10.0}, "b": {"spills": 0}}
    after = {"a": {"cycles": 1100, "bytes": 9.0}, "b": {"spills": 3}}
    assert list(map(str, guard.compare(before, after))) == [
        "b: spills 0 -> 3 (none before)",
        "a: cycles 1,000 -> 1,100 (+10.0 % worse)",
        "a: bytes 10 -> 9 (10.0 % better)",
    ]


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys):
    """Run the guard over items with the given figures: (exit code, what it printed, the baseline's path)."""
    path = tmp_path / "baseline.json"

    def run(figures: dict[str, dict[str, float]], **options: Any) -> tuple[int, str]:
        items = [
            Item(name, ("numpy",), partial(lambda name: {name: figures[name]}, name), quick=name.startswith("quick"))
            for name in figures
        ]
        monkeypatch.setattr(guard_items, "items", lambda: items)
        code = guard.run(guard.Check(baseline=path, **options))
        return code, capsys.readouterr().out

    return run, path


def test_the_guard_fails_naming_what_is_worse_new_or_gone_and_the_update_takes_it_over(checked):
    run, path = checked
    code, out = run({"quick a": {"cycles": 100}, "b": {"spills": 0}}, update=True)
    assert (code, "new: quick a" in out) == (0, True)
    assert run({"quick a": {"cycles": 102}, "b": {"spills": 0}}) == (
        0,
        "2 items: no figure is worse by more than 3%\n",
    )
    code, out = run({"quick a": {"cycles": 110}, "c": {"spills": 0}})
    assert code == 1
    assert "worse: quick a: cycles 100 -> 110 (+10.0 % worse)" in out
    assert "not in the baseline: c" in out
    assert "no longer measured: b" in out
    code, out = run({"quick a": {"cycles": 90}, "b": {"spills": 1}}, quick=True)
    assert code == 0
    assert "better: quick a: cycles 100 -> 90 (10.0 % better)" in out
    code, out = run({"quick a": {"cycles": 110}, "b": {"spills": 1}}, quick=True, update=True)
    assert code == 0
    assert "+10.0 % worse" in out
    assert json.loads(path.read_text())["figures"] == {"b": {"spills": 0}, "quick a": {"cycles": 110}}
    assert run({"quick a": {"cycles": 110}, "b": {"spills": 0}}, update=True) == (0, "the baseline is as it was\n")


def test_what_cannot_be_compared_is_said_in_one_sentence(checked):
    run, path = checked
    with pytest.raises(UserError, match=r"--baseline: .*baseline\.json cannot be read .*make one with `make baseline`"):
        run({"a": {"cycles": 1}})
    path.write_text("{}")
    with pytest.raises(UserError, match=r"is no baseline; make one"):
        run({"a": {"cycles": 1}})
    guard.write(path, {"numpy": "1.0"}, {"a": {"cycles": 1}})
    with pytest.raises(UserError, match=r"of numpy 1\.0, and .* is installed: pip install numpy==1\.0, or make a new"):
        run({"a": {"cycles": 1}})
    with pytest.raises(UserError, match=r"--only: no item's name begins with 'nothing'"):
        run({"a": {"cycles": 1}}, only="nothing")


def test_every_item_has_a_name_of_its_own_and_every_saving_is_among_them():
    names = [item.name for item in guard_items.items()]
    assert len(names) == len(set(names))
    for saving, changes in SAVINGS:
        own = bool(set(changes) - rows.SCHEDULES)
        assert (f"flops jax tiny {METHOD} {saving}" in names) == own
        assert (f"tpu v5e step tiny xla {METHOD} {saving}" in names) == own


def test_a_schedule_is_no_program_of_its_own(monkeypatch):
    before = rows.programs("")
    monkeypatch.setattr(rows, "SAVINGS", (*SAVINGS, ("every 4", {"every": 4}), ("late", {"start": 0.9})))
    assert rows.programs("") == before


# Kernels of the guard's own items, made slower in one way each.
PLANTS = """
import dataclasses, json, sys
from fsam_kernels.triton import parameters, tables
from fsam_profiling import guard, guard_items, rows
ask = lambda: guard_items.gpu_parameters(("sm_90",), ("gpt2",), ("adamw",))
launches = parameters.launches
found = {}
def planted(name, change):
    parameters.launches = lambda *args, **options: change(launches(*args, **options))
    found[name] = [str(x) for x in guard.compare(sound, ask()) if x.worse]
def narrow(all):
    for x in all:
        x.tables["table_ptr"][:, tables.ALIGNED] = 0
    return all
few = lambda all: [x._replace(options={**x.options, "maxnreg": 40}) for x in all] if hasattr(all[0], "_replace") else [
    dataclasses.replace(x, options={**x.options, "maxnreg": 40}) for x in all]
sound = ask()
planted("nothing", lambda all: all)
planted("an extra pass over the parameters", lambda all: [*all, *all])
planted("a spill", few)
planted("4-byte loads", narrow)
json.dump(found, sys.stdout)
"""


@needs_triton
def test_a_planted_slowdown_of_a_kernel_is_caught():
    done = process("-c", PLANTS)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["nothing"] == []
    named = lambda plant: {line.split(": ")[1].split()[0] for line in found[plant]}
    assert {"bytes_over_least", "launches"} <= named("an extra pass over the parameters")
    assert "spills" in named("a spill")
    assert {"load_bytes", "store_bytes"} <= named("4-byte loads")
    assert "gpu sm_90 parameters gpt2 adamw: load_bytes 16 -> 4 (+75.0 % worse)" in found["4-byte loads"]


def against_baseline(program: Program) -> set[str]:
    _, before = guard.read(guard.BASELINE)
    assert program.name in before
    return {change.figure for change in guard.compare(before, program.measure()) if change.worse}


@pytest.mark.slow
@needs_libtpu
def test_a_logit_tensor_that_is_stored_is_caught():
    head = next(x for x in guard_items.programs() if x.name == guard_items.QUICK_HEAD)
    assert against_baseline(head) == set()
    stored = dataclasses.replace(
        head, function="fsam_profiling.tpu.head_programs:log_softmax", options=guard_items.SMALL
    )
    assert {"temporary_bytes", "peak_bytes", "cycles", "bytes"} <= against_baseline(stored)


@pytest.mark.slow
@needs_libtpu
def test_an_extra_pass_over_the_parameters_of_a_step_is_caught():
    step = next(x for x in guard_items.programs() if x.name == "tpu v5e step tiny xla adamw")
    slower = dataclasses.replace(step, function="tpu_programs:step_with_another_pass")
    assert "cycles" in against_baseline(slower)


@pytest.mark.slow
@needs_libtpu
def test_a_spill_of_a_pallas_kernel_is_caught():
    few, many = (
        Program("kernel", "v5e", "tpu_programs:chain_kernel", {"parts": parts}).measure()["kernel"]
        for parts in (4, 160)
    )
    assert few["spills"] == 0
    assert guard.compare({"chain": few}, {"chain": many})[0].figure == "spills"


@pytest.mark.slow
@needs_triton
@needs_libtpu
def test_the_same_figures_come_out_twice(tmp_path):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for path in files:
        done = process("-m", "fsam_trainers.cli", "profile", "check", "--quick", "--json", str(path))
        assert done.returncode == 0, done.stdout + done.stderr
    first, second = (json.loads(path.read_text())["rows"] for path in files)
    assert first == second
    assert len(first) > 10
