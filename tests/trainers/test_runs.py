"""`fsam runs`: every run below a folder, whatever state it is in."""

import json

from small_runs import arguments, fsam


def test_the_table_has_every_run_with_its_steps_and_losses(text, tmp_path, capsys):
    for name, more in {
        "one": ("--steps", 4, "--seed", 3),
        "deep/two": ("--steps", 9, "--method", "sam", "--checkpoint-every", 3),
    }.items():
        options = arguments(
            text, tmp_path / name, "--framework", "torch", "--method", "adamw", "--probe-steps", 0, *more
        )
        assert fsam(*options) == 0
    (tmp_path / "notes").mkdir()
    broken = tmp_path / "three" / "checkpoints" / "step_00000001"
    broken.mkdir(parents=True)
    (broken / "run.json").write_text("{")
    capsys.readouterr()
    assert fsam("runs", tmp_path, "--json", tmp_path / "rows.json") == 0
    rows = {row["run"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows.keys() == {"one", "deep/two", "three"}
    one, two = rows["one"], rows["deep/two"]
    assert (one["method"], one["framework"], one["seed"], one["step"], one["steps"]) == ("adamw", "torch", 3, 4, 4)
    assert (two["method"], two["step"], two["steps"]) == ("sam", 9, 9)
    lines = [json.loads(x) for x in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()]
    assert one["val_loss"] == lines[-1]["val_loss"]
    losses = [x["loss"] for x in lines if "loss" in x]
    assert abs(one["train_loss"] - sum(losses) / 4) < 1e-9
    assert rows["three"]["step"] is None
    out = capsys.readouterr().out
    assert "4 of 4" in out
    assert f"{one['val_loss']:.4f}" in out
    assert "no readable checkpoint" in out


def test_a_run_that_stopped_early_shows_how_far_it_is(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert fsam(*arguments(text, run, "--framework", "torch", "--method", "adamw", "--steps", 8, "--keep", 9)) == 0
    from shutil import rmtree

    for folder in sorted((run / "checkpoints").glob("step_*"))[5:]:
        rmtree(folder)
    capsys.readouterr()
    assert fsam("runs", tmp_path) == 0
    assert "5 of 8" in capsys.readouterr().out
    (run / "checkpoints" / "step_00000005" / "run.json").write_text('{"settings": ')
    assert fsam("runs", tmp_path) == 0
    assert "4 of 8" in capsys.readouterr().out  # from where the run would resume


def test_a_run_that_was_written_over_has_a_row_and_the_others_too(text, tmp_path, capsys):
    for name in ("one", "two", "three"):
        more = ("--framework", "torch", "--method", "adamw", "--steps", 1)
        assert fsam(*arguments(text, tmp_path / name, *more)) == 0
    file = tmp_path / "one" / "checkpoints" / "step_00000001" / "run.json"
    found = json.loads(file.read_text())
    found["progress"]["val_loss"] = "low"
    file.write_text(json.dumps(found))
    (tmp_path / "two" / "metrics.jsonl").unlink()
    (tmp_path / "two" / "metrics.jsonl").mkdir()
    capsys.readouterr()
    assert fsam("runs", tmp_path, "--json", tmp_path / "rows.json") == 0
    rows = {row["run"]: (row["step"], row["train_loss"]) for row in json.loads((tmp_path / "rows.json").read_text())}
    assert rows["one"][0] is None
    assert rows["two"] == (1, None)
    assert rows["three"][0] == 1
    assert rows["three"][1] > 0


def test_a_folder_without_runs_says_so(tmp_path, capsys):
    assert fsam("runs", tmp_path) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out.replace("\n", "")
    assert fsam("runs", tmp_path / "nowhere") == 2
    assert "is no folder; give one that holds runs" in capsys.readouterr().err
