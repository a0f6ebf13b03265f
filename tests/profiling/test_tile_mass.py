"""Skipping tiles of the cotangent: what is counted as skippable, against brute force and the definition."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fsam_core import UserError
from fsam_profiling import tile_mass
from fsam_trainers.console import Console

QUARTERS = st.integers(0, 64).map(lambda k: k / 256)  # sums of these are exact, so that a bound can be met exactly
SMALL = arrays(np.float64, st.tuples(st.integers(1, 5), st.integers(1, 7)), elements=QUARTERS)
DELTA = st.integers(0, 128).map(lambda k: k / 256)


def most_by_trying(mass_RxT: np.ndarray, delta: float) -> int:
    """The largest number of tiles that can go with every row's sum <= delta, by trying every set."""
    T = mass_RxT.shape[1]
    sets = (chosen for k in range(T, -1, -1) for chosen in itertools.combinations(range(T), k))
    return next(len(chosen) for chosen in sets if (mass_RxT[:, list(chosen)].sum(axis=1) <= delta).all())


def logits(seed: int = 0, rows: int = 37, vocab: int = 300, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    z_NxV = scale * random.standard_normal((rows, vocab), np.float32)
    return z_NxV, random.integers(0, vocab, rows)


@given(SMALL, DELTA)
def test_greedy_keeps_the_bound_on_every_row_and_lies_between_nothing_to_add_and_the_most_there_is(mass, delta):
    skipped = tile_mass.skip_greedily(mass, delta)
    spent = mass[:, skipped].sum(axis=1)
    assert (spent <= delta).all()
    for t in np.flatnonzero(~skipped):
        assert (spent + mass[:, t] > delta).any(), "a tile that still fits was left"
    assert skipped.sum() <= most_by_trying(mass, delta) <= tile_mass.most_skippable(mass, delta)


@given(SMALL, DELTA)
def test_a_row_alone_is_solved_exactly_and_never_skips_less_than_its_block(mass, delta):
    alone = tile_mass.skippable_alone(mass, delta)
    assert alone.tolist() == [most_by_trying(row[None], delta) for row in mass]
    assert tile_mass.most_skippable(mass, delta) <= alone.min()
    for row, most in zip(mass, alone, strict=True):
        assert tile_mass.skip_greedily(row[None], delta).sum() == most  # for one row greedy is the best there is


def test_greedy_can_be_beaten_which_is_why_the_least_possible_stands_beside_it():
    # The first tile has the smallest maximum but both rows pay for it; the other two cost one row each.
    mass = np.array([[0.5, 0.75, 0.0], [0.5, 0.0, 0.75]])
    assert tile_mass.skip_greedily(mass, 1.0).tolist() == [True, False, False]
    assert most_by_trying(mass, 1.0) == 2
    assert tile_mass.most_skippable(mass, 1.0) == 2


def test_a_threshold_on_each_tile_breaks_the_bound_that_greedy_keeps():
    """The negative control: 64 tiles each below delta, as in a vocabulary's tail, together far above it."""
    mass, delta = np.full((4, 64), 0.9e-3), 1e-3
    by_threshold = (mass <= delta).all(axis=0)
    assert mass[:, by_threshold].sum(axis=1).min() > 50 * delta
    assert tile_mass.skip_greedily(mass, delta).sum() == 1


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_cotangent_without_its_target_and_the_loss_agree_with_float64(scale):
    z_NxV, labels = logits(scale=scale)
    z = z_NxV.astype(np.float64)
    log_p = z - z.max(1, keepdims=True) - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    expected = np.exp(log_p)
    expected[rows, labels] = 0
    p_NxV, loss_N = tile_mass.off_target(z_NxV, labels)
    np.testing.assert_allclose(p_NxV, expected, rtol=2e-4 if scale > 100 else 1e-5, atol=1e-30)
    np.testing.assert_allclose(loss_N, -log_p[rows, labels], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 64, 128, 300, 512])
def test_tile_masses_are_sums_over_neighbouring_columns_with_a_ragged_last_one(columns):
    p_NxV, _ = tile_mass.off_target(*logits())
    expected = [p_NxV[:, i : i + columns].sum(axis=1) for i in range(0, 300, columns)]
    np.testing.assert_allclose(tile_mass.tile_masses(p_NxV, columns), np.stack(expected, 1), rtol=1e-5)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_dropping_the_skipped_tiles_changes_no_row_of_the_cotangent_by_more_than_delta(delta):
    z_NxV, labels = logits(scale=8.0, vocab=1000)
    p_NxV, _ = tile_mass.off_target(z_NxV, labels)
    mass = tile_mass.tile_masses(p_NxV, 64)
    tiles_left = 0
    for start in range(0, len(p_NxV), 16):
        skipped = tile_mass.skip_greedily(mass[start : start + 16], delta)
        tiles_left += (~skipped).sum()
        kept_V = np.repeat(~skipped, 64)[: p_NxV.shape[1]]
        block = p_NxV[start : start + 16].astype(np.float64)
        assert np.abs(block - block * kept_V).sum(axis=1).max() <= delta * (1 + 1e-6)
    share, least = tile_mass.share_left(mass, 16, delta)
    assert share == pytest.approx(tiles_left / (3 * 16))  # 37 rows: three blocks, of 16 tiles each
    assert least <= share


def test_rows_sorted_by_need_share_their_tiles_and_stay_above_the_rows_alone():
    random = np.random.default_rng(0)
    mass = np.where(np.arange(64)[:, None] % 2, 1e-2, 1e-9) * random.uniform(0.5, 1, (64, 12))  # every other row light
    assert tile_mass.share_left(mass, 16, 1e-3) == (1, 1)
    order = tile_mass.by_need(mass, 1e-3)
    assert sorted(order) == list(range(64))
    assert tile_mass.share_left(mass[order], 16, 1e-3) == (0.5, 0.5)
    assert 1 - tile_mass.skippable_alone(mass, 1e-3).mean() / 12 == 0.5


def test_a_sorted_vocabulary_has_the_frequent_tokens_first_and_ties_by_id():
    assert tile_mass.by_frequency(np.array([3, 3, 1, 5, 1, 3]), 7).tolist() == [3, 1, 5, 0, 2, 4, 6]


def test_a_concentrated_head_is_seen_as_skippable_and_a_flat_one_is_not():
    h = np.eye(256, 8, dtype=np.float32) + np.float32(0.1)
    w = np.zeros((1024, 8), np.float32)
    labels = np.arange(256) % 1024
    orders = {"ids": np.arange(1024), "backwards": np.arange(1024)[::-1]}
    flat = tile_mass.measure(h, w, labels, orders)
    assert flat["loss"] == pytest.approx(np.log(1024))
    assert flat["orders"]["ids"]["left"]["128x128"] == [(1, 1)] * 3
    w[:90] = 200  # all mass on the first 128 columns, the last ones in the other order
    peaked = tile_mass.measure(h, w, labels % 90, orders)
    for order in orders:
        assert peaked["orders"][order]["left"]["128x128"] == [(1 / 8, 1 / 8)] * 3
        assert peaked["orders"][order]["left_sorted"] == peaked["orders"][order]["left"]
        assert peaked["orders"][order]["alone"]["1024"] == [1, 1, 1]
    assert peaked["columns_left"] == pytest.approx([89 / 1024] * 3, abs=1e-4)


def small(text, **changes) -> tile_mass.Options:
    return tile_mass.Options(vocab_size=300, steps=2, batch=1, data=str(text), rows=128, **changes)


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("FSAM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"line {i} of a small text, {i * i} words long" for i in range(400)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_command_trains_measures_and_takes_up_the_weights_it_kept(framework, text, tmp_path):
    options = small(text, framework=framework, weights=tmp_path / "weights")
    first = tile_mass.run(options, Console(quiet=True))
    assert [(x["step"], x["split"]) for x in first["measured"]] == [
        (0, "training"),
        (0, "held out"),
        (2, "training"),
        (2, "held out"),
    ]
    assert first["measured"][0]["loss"] == pytest.approx(np.log(300), abs=0.2)
    assert first["measured"][2]["loss"] < first["measured"][0]["loss"]
    (tmp_path / "weights" / "0.npz").touch()
    assert tile_mass.run(options, Console(quiet=True)) == first
    with pytest.raises(UserError, match="--weights"):
        tile_mass.run(small(text, framework=framework, weights=tmp_path / "weights", seed=1), Console(quiet=True))


def test_figures_are_written_read_back_printed_and_drawn(text, tmp_path, monkeypatch, capsys):
    out, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    tile_mass._main(small(text, framework="torch", out=out), Console(quiet=True))
    printed = capsys.readouterr().out
    assert len(json.loads(out.read_text())["measured"]) == 4
    tile_mass._main(tile_mass.Options(read=(out,), plot=picture), Console(quiet=True))
    assert capsys.readouterr().out == printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [0, 100])
def test_rows_that_are_no_whole_sequences_are_refused(rows):
    with pytest.raises(UserError, match=f"--rows must be a multiple of the sequence length 128, got {rows}"):
        tile_mass.run(tile_mass.Options(rows=rows), Console(quiet=True))


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(UserError, match="--read"):
        tile_mass._main(tile_mass.Options(read=(path,)), Console(quiet=True))
