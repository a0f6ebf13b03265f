"""Collectives are counted in the compiled program, those in loops once an iteration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from compilers import needs_libtpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fsam_profiling import regions
from fsam_profiling.tpu import collectives, scale


def program(function, *shapes_and_specs) -> list[collectives.Collective]:
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))  # conftest.py asks for four devices
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec)) for shape, spec in shapes_and_specs
    ]
    with jax.set_mesh(mesh):
        return collectives.read(jax.jit(function).lower(*args).compile().as_text())


ROWS, WHOLE = PartitionSpec("x"), PartitionSpec()


def test_kinds_shapes_bytes_and_loops():
    def function(a, b):
        whole = jax.lax.with_sharding_constraint(b, WHOLE)  # gathered, once

        def body(total, _):
            return total + jnp.tanh(a * total).sum(), None  # reduced, each time

        return jax.lax.scan(body, 0.0, length=5)[0], whole

    found = program(function, ((8, 3), ROWS), ((16, 2), ROWS))
    reduced = [x for x in found if x.kind == "all-reduce"]
    gathered = [x for x in found if x.kind == "all-gather"]
    assert [(x.times, x.bytes, x.is_small) for x in reduced] == [(5, 4, True)]
    assert [(x.times, x.bytes, x.is_small) for x in gathered] == [(1, 16 * 2 * 4, False)]
    assert collectives.totals(found) == {
        "all-reduce": {"operations": 5, "bytes": 20},
        "all-gather": {"operations": 1, "bytes": 128},
    }


def test_conditional_branch_is_excluded():
    def function(a, b):
        with jax.named_scope(regions.CONDITIONAL):
            # Its length is not in the program; each iteration reduces.
            return jax.lax.while_loop(lambda x: (x > 1).any(), lambda x: x / (1 + jnp.abs(x).sum()), a) + b.sum()

    found = program(function, ((8, 3), ROWS), ((16, 2), ROWS))
    assert [(x.kind, x.times, x.bytes) for x in found] == [("all-reduce", 1, 4)]


def test_single_device_program_has_no_collectives():
    assert collectives.totals(program(lambda a: a.sum(), ((8, 3), WHOLE))) == {}


@pytest.mark.parametrize("start", ["-start", ""])
def test_asynchronous_gather_counts_its_result_only(start):
    pair = "(bf16[4,8]{1,0:T(8,128)}, bf16[16,8]{1,0})" if start else "bf16[16,8]{1,0}"
    text = f"ENTRY %main.1 (p: bf16[4,8]) -> bf16[16,8] {{\n  %a = {pair} all-gather{start}(%p), dimensions={{0}}\n}}\n"
    assert collectives.totals(collectives.read(text)) == {"all-gather": {"operations": 1, "bytes": 256}}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_each_of_four_chips_holds_a_quarter_of_the_state(backend):
    same = {"name": "tiny", "batch": 64, "dtype": "bfloat16", "micro_batches": 2, "backend": backend, "fsdp": 4}
    rows = {
        name: scale.compiled("v5e", same | {"method": method, "changes": changes})
        for name, (method, changes) in scale.ROWS.items()
        if name in ("adamw", "exact")
    }
    weights = 1_327_232
    for row in rows.values():
        assert row["argument_bytes"] == pytest.approx(12 * weights / 4, rel=0.05)
        assert row["aliased_bytes"] > 0.9 * row["argument_bytes"]
        assert row["collectives"]["all-gather"]["operations"] > 0
    assert scale.peak_bytes(rows["exact"]) > scale.peak_bytes(rows["adamw"])
