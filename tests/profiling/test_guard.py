"""The regression guard: what counts as worse, its messages, and that planted slowdowns are found."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import pytest
import spawn
from compilers import needs_libtpu, needs_triton

from fsam_core.errors import UserError
from fsam_profiling import guard, guard_items, rows
from fsam_profiling.guard_items import Item, TpuProgram
from fsam_profiling.rows import METHOD, SAVINGS

COMPILED = {"TRITON_INTERPRET": None}  # tests/conftest.py switches Triton's interpreter on


@needs_triton
@needs_libtpu
def test_quick_figures_match_the_baseline():
    done = spawn.run("-m", "fsam_trainers.cli", "profile", "check", "--quick", env=COMPILED, check=False)
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
def test_figure_is_worse_beyond_three_per_cent(figure, before, after, worse):
    changes = guard.compare({"it": {figure: before}}, {"it": {figure: after}})
    assert [change.worse for change in changes] == ([worse] if before != after else [])


def test_changes_are_sorted_and_state_their_size():
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
        code = guard.run(guard.CheckOptions(baseline=path, **options))
        return code, capsys.readouterr().out

    return run, path


def test_guard_fails_on_worse_new_or_gone_until_updated(checked):
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
    code, out = run({"quick a": {"registers": 1}, "b": {"spills": 0}}, quick=True)
    assert code == 1
    assert "not in the baseline: quick a: registers" in out
    assert "no longer measured: quick a: cycles" in out
    code, out = run({"quick a": {"cycles": 90}, "b": {"spills": 1}}, quick=True)
    assert code == 0
    assert "better: quick a: cycles 100 -> 90 (10.0 % better)" in out
    code, out = run({"quick a": {"cycles": 110}, "b": {"spills": 1}}, quick=True, update=True)
    assert code == 0
    assert "+10.0 % worse" in out
    assert json.loads(path.read_text())["figures"] == {"b": {"spills": 0}, "quick a": {"cycles": 110}}
    assert run({"quick a": {"cycles": 110}, "b": {"spills": 0}}, update=True) == (0, "the baseline is unchanged\n")


def test_unusable_baseline_is_refused(checked):
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


def test_item_names_are_unique_and_cover_every_saving():
    names = [item.name for item in guard_items.items()]
    assert len(names) == len(set(names))
    for saving, changes in SAVINGS:
        own = bool(set(changes) - rows.SCHEDULES)
        assert (f"flops jax tiny {METHOD} {saving}" in names) == own
        assert (f"tpu v5e step tiny xla {METHOD} {saving}" in names) == own


def test_schedules_are_not_compiled(monkeypatch):
    before = rows.programs("")
    monkeypatch.setattr(rows, "SAVINGS", (*SAVINGS, ("every 4", {"every": 4}), ("late", {"start": 0.9})))
    assert rows.programs("") == before


# Kernels of the guard's own items, made slower in one way each.
PLANTS = """
import dataclasses, json, sys
from fsam_kernels.triton import tables
from fsam_profiling import guard, guard_items
from fsam_profiling.gpu import parameter_launches
ask = lambda: guard_items.gpu_parameters(("sm_90",), ("gpt2",), ("adamw",))
launches = parameter_launches.launches
found = {}
def planted(name, change):
    parameter_launches.launches = lambda *args, **options: change(launches(*args, **options))
    found[name] = [str(x) for x in guard.compare(sound, ask()) if x.worse]
def narrow(all):
    for x in all:
        x.tables["table_ptr"][:, tables.ALIGNED] = 0
    return all
few = lambda all: [dataclasses.replace(x, options={**x.options, "maxnreg": 40}) for x in all]
sound = ask()
planted("nothing", lambda all: all)
planted("an extra pass over the parameters", lambda all: [*all, *all])
planted("a spill", few)
planted("4-byte loads", narrow)
json.dump(found, sys.stdout)
"""


@needs_triton
def test_planted_slowdown_of_a_kernel_is_found():
    found = json.loads(spawn.run("-c", PLANTS, env=COMPILED).stdout)
    assert found["nothing"] == []
    named = lambda plant: {line.split(": ")[1].split()[0] for line in found[plant]}
    assert {"bytes_over_least", "launches"} <= named("an extra pass over the parameters")
    assert "spills" in named("a spill")
    assert {"load_bytes", "store_bytes"} <= named("4-byte loads")
    assert "gpu sm_90 parameters gpt2 adamw: load_bytes 16 -> 4 (+75.0 % worse)" in found["4-byte loads"]


def against_baseline(program: TpuProgram) -> set[str]:
    _, before = guard.read(guard.BASELINE)
    assert program.name in before
    return {change.figure for change in guard.compare(before, program.measure()) if change.worse}


@pytest.mark.slow
@needs_libtpu
def test_stored_logits_are_found():
    head = next(x for x in guard_items.programs() if x.name == guard_items.QUICK_HEAD)
    assert against_baseline(head) == set()
    stored = dataclasses.replace(
        head, function="fsam_profiling.tpu.head_programs:log_softmax", options=guard_items.SMALL
    )
    assert {"temporary_bytes", "peak_bytes", "cycles", "bytes"} <= against_baseline(stored)


@pytest.mark.slow
@needs_libtpu
def test_extra_pass_over_the_parameters_is_found():
    step = next(x for x in guard_items.programs() if x.name == "tpu v5e step tiny xla adamw")
    slower = dataclasses.replace(step, function="tpu_programs:step_with_another_pass")
    assert "cycles" in against_baseline(slower)


@pytest.mark.slow
@needs_libtpu
def test_spill_of_a_pallas_kernel_is_found():
    few, many = (
        TpuProgram("kernel", "v5e", "tpu_programs:chain_kernel", {"parts": parts}).measure()["kernel"]
        for parts in (4, 160)
    )
    assert few["spills"] == 0
    assert guard.compare({"chain": few}, {"chain": many})[0].figure == "spills"


@pytest.mark.slow
@needs_triton
@needs_libtpu
def test_figures_are_deterministic(tmp_path):
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for path in files:
        spawn.run("-m", "fsam_trainers.cli", "profile", "check", "--quick", "--json", path, env=COMPILED)
    first, second = (json.loads(path.read_text())["rows"] for path in files)
    assert first == second
    assert len(first) > 10
