"""The offline TPU reader: its figures where arithmetic gives them, one sentence where it cannot read."""

from __future__ import annotations

import json

import pytest
from compilers import needs_libtpu

from fsam_core.errors import UserError
from fsam_profiling.tpu import cli, compiler, hlo, schedules

CHIPS = ("v5e", "v6e")


def compiled(chip, function, *args, kernels=False, **options):
    given = {"name": function, "args": args, "options": options}
    return compiler.compile_for(chip, "tpu_programs:of", options=given, kernels=kernels)


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_matmul_cycles_and_bytes_follow_from_arithmetic(chip):
    n = 4096
    got = compiled(chip, "matmul", ((n, n), "bfloat16"), ((n, n), "bfloat16"))
    assert got.cycles == pytest.approx(2 * n**3 / got.chip.flops_per_cycle, rel=0.16)
    assert got.xla_bytes == pytest.approx(3 * 2 * n**2, rel=0.02)
    assert got.seconds == pytest.approx(got.cycles / got.chip.hertz)
    assert (got.argument_bytes, got.output_bytes, got.temporary_bytes) == (4 * n**2, 2 * n**2, 0)


@needs_libtpu
def test_copy_and_axpy_run_at_the_published_bandwidth():
    size = 4 * 8192 * 4096
    array = ((8192, 4096), "float32")
    for got, arrays in ((compiled("v5e", "copied", array), 2), (compiled("v5e", "axpy", array, array), 3)):
        assert got.xla_bytes == pytest.approx(arrays * size, rel=0.02)
        assert got.cycles == pytest.approx(arrays * size / got.chip.bytes_per_cycle, rel=0.3)


@needs_libtpu
@pytest.mark.slow
def test_documented_figures_are_reproduced():
    h, w, y = ((8192, 1024), "bfloat16"), ((32768, 1024), "bfloat16"), ((8192,), "int32")
    plain = compiled("v5e", "cross_entropy", h, w, y)
    assert plain.cycles == pytest.approx(23.5e6, rel=0.05)
    assert plain.temporary_bytes == pytest.approx(1.61e9, rel=0.01)
    bare = compiled("v5e", "three_products", h, w, ((8192, 32768), "bfloat16"))
    assert bare.cycles == pytest.approx(12.9e6, rel=0.01)
    assert bare.unknown == ()


@pytest.mark.slow
@needs_libtpu
def test_loop_body_counts_once_an_iteration():
    x, y = ((64, 2048, 2048), "bfloat16"), ((2048, 2048), "bfloat16")
    few, many = (compiled("v5e", "twice_over", x, y, iterations=iterations).cycles for iterations in (24, 48))
    assert many == pytest.approx(2 * few, rel=0.05)
    assert few > 24 * 2 * 2048**3 / 131072


@needs_libtpu
def test_conditional_branch_is_reported_apart():
    x = ((1024, 1024), "bfloat16")
    got = compiled("v5e", "sometimes", x, x)
    assert 2 * 2 * 1024**3 / 131072 < got.excluded_cycles < 2.5 * got.cycles
    assert got.cycles < 2 * 2 * 1024**3 / 131072


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_pallas_copy_is_bound_by_its_bytes(chip):
    (kernel,) = compiled(chip, "copy_kernel", ((8192, 1024), "float32"), kernels=True, rows=512).kernels
    assert kernel.bytes == 2 * 4 * 8192 * 1024
    bandwidth, hertz = {"v5e": (820e9, 1.5e9), "v6e": (1640e9, 1.75e9)}[chip]
    assert kernel.cycles == kernel.bytes_cycles == pytest.approx(kernel.bytes / bandwidth * hertz, rel=0.01)
    stores = {"v5e": 1, "v6e": 2}[chip]  # of 1024 floats a bundle
    assert 16 * 512 / stores <= kernel.schedule.issued <= 1.3 * 16 * 512 / stores
    assert kernel.schedule.vmem_bytes == pytest.approx(2 * 2 * 4 * 512 * 1024, rel=0.02)
    assert (kernel.grid, kernel.times, kernel.schedule.spills) == ((16,), 1, 0)


@needs_libtpu
def test_ragged_last_block_moves_only_its_elements():
    (kernel,) = compiled("v5e", "copy_kernel", ((1000, 1024), "float32"), kernels=True, rows=512).kernels
    assert kernel.bytes == 2 * 4 * 1000 * 1024


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_pallas_product_is_bound_by_its_matrix_units(chip):
    n = 2048
    got = compiled(chip, "matmul_kernel", *[((n, n), "bfloat16")] * 2, kernels=True, rows=512, columns=512)
    (kernel,) = got.kernels
    assert kernel.schedule.mxu_cycles == 2 * n**3 / got.chip.flops_per_cycle
    assert kernel.schedule.mxu_cycles <= kernel.schedule.cycles <= 1.25 * kernel.schedule.mxu_cycles
    assert kernel.bytes == 2 * n * n * (1 + 4 + 1)  # the second operand is read again for each of 4 blocks of rows
    assert kernel.schedule.use["MXU"] == pytest.approx(kernel.schedule.mxu_cycles / kernel.schedule.cycles)


@pytest.mark.slow
@needs_libtpu
def test_branches_and_loops_count_as_often_as_they_run():
    def cycles(**options):
        array = ((1024, 2048), "float32")
        (kernel,) = compiled("v5e", "row_sums_kernel", array, kernels=True, rows=128, columns=256, **options).kernels
        return kernel.schedule.cycles, kernel.schedule.assumed

    (short, none), (long, _) = (cycles(iterations=iterations, first_only=True) for iterations in (100, 200))
    every, _ = cycles(iterations=100, first_only=False)
    of_data, one = cycles(iterations=100, first_only=True, by_value=True)
    iteration = (long - short) / (8 * 100)  # 8 blocks of rows
    assert iteration == round(iteration) > 0
    assert every > short + 50 * 100 * iteration  # in 64 steps instead of 8
    assert of_data >= every
    assert (none, one) == (0, 1)


@needs_libtpu
def test_iteration_counts_may_differ_in_the_last_grid_step():
    # Whole blocks of a result that stays on the chip go there at once, those of a ragged one by a loop over registers.
    def issued(rows):
        array = ((rows, 1024), "float32")
        (kernel,) = compiled("v5e", "copied_on_the_chip", array, kernels=True, rows=128).kernels
        return kernel.schedule.issued

    whole, ragged, shorter = (issued(rows) for rows in (1024, 960, 928))
    assert 960 <= ragged - whole <= 1.5 * 960
    assert 0.9 * 32 <= ragged - shorter <= 1.5 * 32


@needs_libtpu
def test_spills_are_found():
    (kernel,) = compiled("v5e", "spilling_kernel", ((1280, 128), "float32"), kernels=True).kernels
    assert kernel.schedule.spills > 50
    assert kernel.schedule.fills > 50


@needs_libtpu
def test_kernel_that_does_not_fit_quotes_the_compiler():
    with pytest.raises(UserError, match=r"the compiler for v5e refused tpu_programs:of: .*(vmem|VmemOom)"):
        compiled("v5e", "copy_kernel", ((8704, 1024), "float32"), kernels=True, rows=8704)


@needs_libtpu
def test_kernels_cannot_be_left_out_of_the_sum():
    with pytest.raises(UserError, match="kernels=True"):
        compiled("v5e", "copy_kernel", ((1024, 1024), "float32"), rows=512)


def test_unknown_chip_is_refused():
    with pytest.raises(UserError, match=r"--chip: 'v3' is not known; use v4, v5e"):
        compiled("v3", "matmul")


@pytest.mark.parametrize("version", ["0.0.43", None])
def test_other_compiler_version_is_refused(version, monkeypatch):
    monkeypatch.setattr(compiler, "_libtpu", lambda: version)
    with pytest.raises(UserError, match=r"pip install libtpu==0\.0\.42\.1"):
        compiled("v5e", "matmul")


BUNDLES = "     0   :  { %s0_s1 = smov 0 }\n   0x1   :  { %1 = vst [vmem:[%s0_s1]] %v1_v1 }\n"
TABLE = "== CAPACTIY:\nMXU, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL\n4 4 3 3 1 1\n== UTILIZATION:\n"
ROWS = "0 0 0 0 0 0\n0 0 0 0 1 0\n"


@pytest.mark.parametrize(
    ("bundles", "table", "why"),
    [
        (BUNDLES, None, "0 files"),
        ("nothing of the kind\n", TABLE + ROWS, "no bundle"),
        (BUNDLES.replace("0x1", "0x7"), TABLE + ROWS, "bundle 0x7"),
        (BUNDLES + "   0x2   ?? { }\n", TABLE + ROWS, "not understood"),
        (BUNDLES, TABLE + ROWS + "0 0 0 0 1 0\n", "2 bundles are scheduled, and 3"),
        (BUNDLES, TABLE.replace("VSTORE:SPILL", "VSTORE:OTHER") + ROWS, "other columns"),
        (BUNDLES, ROWS, "another head"),
        (
            BUNDLES + "   0x2   :  { %3 = sbr.rel (!%p9) target = $region5 }\n",
            TABLE + ROWS + "0 0 0 0 0 0\n",
            "region 5",
        ),
    ],
)
def test_unknown_dump_format_is_refused(tmp_path, bundles, table, why):
    (tmp_path / "123-rows.1-03-final_bundles.txt").write_text(bundles)
    (tmp_path / "123-rows.1-00-pre-finalize-registers-and-allocations.txt").write_text("")
    if table is not None:
        (tmp_path / "123-rows.1-01-final_hlo-static-per-bundle-utilization.txt").write_text(table)
    with pytest.raises(UserError, match=rf"^tpu: the compiler's dumps of kernel rows\.1 cannot be read: .*{why}"):
        schedules.read(tmp_path, "rows.1", (), mxus=4, row_cycles=1)


def test_known_dump_format_is_read(tmp_path):
    (tmp_path / "123-rows.1-03-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "123-rows.1-01-final_hlo-static-per-bundle-utilization.txt").write_text(TABLE + ROWS)
    (tmp_path / "123-rows.1-00-pre-finalize-registers-and-allocations.txt").write_text("")
    got = schedules.read(tmp_path, "rows.1", (), mxus=4, row_cycles=1)
    assert (got.bundles, got.cycles, got.use["VSTORE"]) == (2, 2, 0.5)


MODULE = """HloModule m, is_scheduled=true
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %y = f32[8]{0} add(%x, %x), backend_config={WHAT}
}
"""


def test_module_without_estimates_is_refused():
    text = MODULE.replace("WHAT", '"estimated_cycles":"12"')
    assert hlo.read(text).cycles == 12
    with pytest.raises(UserError, match="no instruction of the compiled module carries estimated_cycles"):
        hlo.read(MODULE.replace("WHAT", ""))
    with pytest.raises(UserError, match="not a scheduled one"):
        hlo.read(text.replace("is_scheduled=true", ""))


@pytest.mark.slow
@needs_libtpu
def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "tpu.json"
    assert cli.run(cli.TpuOptions(chip="v5e", head="tiny", backend="xla", json=path)) == 0
    written = json.loads(path.read_text())
    assert (written["kind"], written["about"]["head"]) == ("tpu head", "tiny")
    programs = {row["program"]: row for row in written["rows"]}
    assert set(programs) == {"three matrix products", "log-softmax, autodiff", "fsam xla"}
    bare = programs["three matrix products"]
    out = " ".join(capsys.readouterr().out.split())
    assert f"{bare['cycles'] / 1e6:.2f}" in out
    assert "Estimates, not timings" in out
    with pytest.raises(UserError, match=r"--head: 'huge' is not known; use tiny"):
        cli.run(cli.TpuOptions(head="huge"))


@pytest.mark.slow
@needs_libtpu
def test_regions_of_a_compiled_step_sum_to_its_cycles(tmp_path, capsys):
    path = tmp_path / "step.json"
    same = {"preset": "tiny", "batch": 2, "seq_len": 16, "vocab_size": 256, "backend": "xla"}
    assert cli.run(cli.TpuOptions(what="step", json=path, **same)) == 0
    adamw, functional = json.loads(path.read_text())["rows"]
    assert adamw["ratio"] == 1 < functional["ratio"]
    assert functional["product_flops"] > 1.8 * adamw["product_flops"]
    for row in (adamw, functional):
        assert sum(row["regions"].values()) == row["cycles"]
        assert row["regions"].get("other", 0) < 0.2 * row["cycles"]
        assert row["floor_cycles"] == max(row["floor_products_cycles"], row["floor_bytes_cycles"]) < row["cycles"]
        assert row["peak_bytes"] >= row["argument_bytes"]
    # XLA makes the perturbation part of what reads it, so it need not show.
    assert {"norm", "second forward", "second backward", "update"} <= set(functional["regions"])
    assert "Estimates, not timings" in " ".join(capsys.readouterr().out.split())


@needs_libtpu
def test_second_compilation_only_for_kernels(monkeypatch):
    ran, dumped = compiler.ask, []

    def counted(chip, child, request, what, dumps):
        dumped.append(dumps is not None)
        return ran(chip, child, request, what, dumps)

    monkeypatch.setattr(compiler, "ask", counted)
    assert compiled("v5e", "axpy", *[((256, 256), "float32")] * 2, kernels="if any").kernels == ()
    assert dumped == [False]
    (kernel,) = compiled("v5e", "copy_kernel", ((1024, 1024), "float32"), kernels="if any", rows=512).kernels
    assert (kernel.bytes, dumped) == (2 * 4 * 1024**2, [False, False, True])
