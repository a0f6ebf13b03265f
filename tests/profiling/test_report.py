"""The HTML report: what it gathers, what it leaves out, and that it is self-contained."""

from __future__ import annotations

import json
import re

import pytest

from fsam_core.errors import UserError
from fsam_profiling import cli, report, report_tables, results

STEP = {
    "framework": "torch", "method": "adamw", "saving": "", "peer": False, "options": {}, "params": 100, "tokens": 64,
    "step_ms": 1234.5, "step_ms_p20": 1200.0, "step_ms_p80": 1300.0, "tokens_per_s": 51.8, "flops": 1e9,
    "flops_per_s": 1e9, "utilisation": 0.42, "ratio": 1.0, "ratio_p20": 1.0, "ratio_p80": 1.0, "ratio_resolved": True,
    "to_torch": 1.0, "to_torch_p20": 1.0, "to_torch_p80": 1.0, "to_torch_resolved": True, "peak_bytes": None,
    "regions": None,
}  # fmt: skip
SCHEDULE = {"spills": 7}
TPU = {
    "method": "adamw", "saving": "", "backend": "xla", "options": {}, "ratio": 1.0, "x_floor": 2.5, "cycles": 2_000_000,
    "scheduled_cycles": 1_000_000, "scheduled_ratio": 1.0,
    "scheduled_regions": {"base forward": 400_000, "update": 600_000},
    "seconds": 0.001, "temporary_bytes": 5e6, "peak_bytes": 9e6, "bytes": 4e6, "product_flops": 3e9,
    "kernels": [{"excluded": False, "schedule": SCHEDULE}], "regions": {"base forward": 500_000, "update": 1_500_000},
    "chip": {"name": "v5e", "hertz": 1.5e9, "flops_per_second": 197e12, "bytes_per_second": 820e9},
}  # fmt: skip


def steps():
    whole = STEP | {"method": "precond-functional-sam", "ratio": 1.9, "ratio_p20": 1.8, "ratio_p80": 2.0}
    eighth = whole | {
        "saving": "1/8",
        "options": {"correction_fraction": 0.125},
        "ratio": 1.1,
        "ratio_p20": 0.9,
        "ratio_p80": 1.3,
        "ratio_resolved": False,
        "regions": {"base forward": 300.0, "idle": 10.0},
    }
    return [STEP, whole, eighth]


@pytest.fixture
def files(tmp_path):
    def made(**kinds):
        paths = []
        for kind, rows in kinds.items():
            paths.append(tmp_path / f"{kind}.json")
            results.write(paths[-1], kind.replace("_", " "), rows, {"preset": "tiny <b>"})
        return tuple(paths)

    return made


def test_missing_packages_are_named_before_it_begins(files, monkeypatch):
    def refuse(*modules):
        raise UserError(f"{modules} is not installed")

    monkeypatch.setattr(cli.backends, "require", refuse)
    with pytest.raises(UserError, match=r"'matplotlib', 'jinja2'"):
        cli.main(["report", *map(str, files(step=steps()))])


def test_page_is_complete_and_self_contained(files, tmp_path, capsys):
    moved = TPU | {"method": "precond-functional-sam", "ratio": 1.97}
    check = [{"item": "flops jax", "product_flops": 17716740096}]
    unknown = [{"variant": "ours", "ms": 1.5, "nested": [1]}]
    given = files(check=check, step=steps(), tpu_step=[TPU, moved], someones=unknown)
    out = tmp_path / "page.html"
    assert report.run(report.ReportOptions(given, out=out, json=tmp_path / "page.json")) == 0
    assert str(out) in capsys.readouterr().out
    page = out.read_text()
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles[:3] == [report.TITLES[kind].replace("'", "&#39;") for kind in ("step", "tpu step", "check")]
    assert page.count("<svg") == 3 + 3  # regions, ratios, fractions; regions, fractions, roofline
    assert page.count("<pre>") == 4
    assert "width=device-width" in page
    assert not re.findall(r"(?:src|href)=\"(?!#)[^\"]*\"", page.replace('xlink:href="#', "").replace('href="#', ""))
    assert "<dt>preset</dt><dd>tiny &lt;b&gt;</dd>" in page
    assert "17,716,740,096" in page
    written = json.loads((tmp_path / "page.json").read_text())
    assert [one["kind"] for one in written["rows"]] == ["step", "tpu step", "check", "someones"]


def test_ratio_not_distinguishable_from_1_is_omitted():
    headings, cells = report_tables.table("step", steps())
    column = headings.index("× AdamW (20–80 %)")
    assert [line[column] for line in cells] == ["1.00 (1.00–1.00)", "1.90 (1.80–2.00)", "(0.90–1.30)"]
    assert "peak MiB" not in headings  # not requested
    assert cells[2][headings.index("base forward")] == "300"
    assert cells[0][headings.index("base forward")] == ""


def test_no_framework_comparison_with_one_framework():
    alone = {f"to_torch{end}": None for end in ("", "_p20", "_p80", "_resolved")}
    headings, _ = report_tables.table("step", [row | {"framework": "jax"} | alone for row in steps()])
    assert "× PyTorch (20–80 %)" not in headings


def test_collectives_are_summed_by_kind():
    sent = {"all-reduce": {"bytes": 1.5e9}, "reduce-scatter": {"bytes": 1e9}, "all-gather": {"bytes": 3e8}}
    row = {"row": "exact", "peak_bytes": 2**31, "x_adamw": 1.06, "temporary_bytes": 2**30, "collectives": sent}
    assert report_tables.table("tpu scale", [row])[1] == [["exact", "2", "1.06", "1", "0.3", "2.5"]]


def test_unknown_kind_shows_its_plain_columns():
    rows = [{"variant": "ours", "ms": 1234.56, "of": {"a": 1}}, {"variant": "theirs", "ms": 2.0, "more": 3}]
    headings, cells = report_tables.table("somebody's", rows)
    assert headings == ["variant", "ms", "more"]
    assert cells == [["ours", "1,235", ""], ["theirs", "2", "3"]]


def test_command_dispatches_to_every_subcommand(files, tmp_path, capsys):
    (path,) = files(step=steps())
    out = tmp_path / "page.html"
    assert cli.main(["report", str(path), "--out", str(out), "--title", "A machine"]) == 0
    assert "<h1>A machine</h1>" in out.read_text()
    with pytest.raises(UserError, match="--only: no item's name begins with"):
        cli.main(["check", "--only", "nothing"])
    with pytest.raises(UserError, match="--steps must be at least 1"):
        cli.main(["trace", "--steps", "0"])
    with pytest.raises(UserError, match="--repeats must be at least 10"):
        cli.main(["step", "--repeats", "9"])
    with pytest.raises(UserError, match="--chip: 'v3' is not known"):
        cli.main(["tpu", "--what", "step", "--chip", "v3"])
    with pytest.raises(UserError, match="--preset: 'huge' is not known"):
        cli.main(["trace", "--preset", "huge"])


def test_foreign_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no files given"):
        report.run(report.ReportOptions(()))
    with pytest.raises(UserError, match=r"nowhere\.json: cannot be read: No such file"):
        report.run(report.ReportOptions((tmp_path / "nowhere.json",), out=tmp_path / "page.html"))
    path = tmp_path / "other.json"
    for text, why in (("{", "is no JSON"), ("[]", "is not of fsam profile's layout 1"), ('{"a": 1}', "is not of fsam")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"other\.json: {why}"):
            report.run(report.ReportOptions((path,), out=tmp_path / "page.html"))
