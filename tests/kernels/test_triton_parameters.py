"""The Triton kernels that walk over the parameters, run by Triton's interpreter, against the oracle and plain PyTorch.

The interpreter takes milliseconds for a program, so chunks are made small: every case has full and ragged ones. It cuts
bfloat16 off where the compilers round to nearest; rounding at random is arithmetic on integers, and exact in both.
"""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operations import back

from fsam_kernels import spec
from fsam_kernels.shapes import WEIGHTS
from fsam_kernels.torch import Adam
from fsam_kernels.torch import lerp_ as plain_lerp_
from fsam_kernels.torch import perturb as plain_perturb
from fsam_kernels.torch import preconditioned_norm as plain_norm
from fsam_kernels.torch.adamw import AdamW as PlainAdamW
from fsam_kernels.torch.adamw import Update
from fsam_kernels.torch.adamw import adamw as plain_adamw
from fsam_kernels.torch.rounding import Rounding

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'fsam[triton]'", allow_module_level=True)

from fsam_kernels.triton import tables
from fsam_kernels.triton.adamw import AdamW, adamw
from fsam_kernels.triton.lerp import lerp_
from fsam_kernels.triton.perturb import perturb
from fsam_kernels.triton.preconditioned_norm import preconditioned_norm
from fsam_profiling.gpu import parameter_launches

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BLOCK = 16
SHAPES = [(5, 16), (37,), (), (0,), (1,), (3, 7), (16,)]
B2, EPS = 0.95, 1e-8
HALF_UNITS = 2**-24


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", BLOCK)


def tensors(seed: int, shapes=SHAPES, scale: float = 1.0) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=make) * scale for shape in shapes]


def problem(shapes=SHAPES):
    """(θ, g, v, Adam's settings), of which every other takes the previous moment."""
    adam = [Adam(B2, EPS, 1 - B2 ** (3 + i % 2), i % 2 == 0) for i in range(len(shapes))]
    return tensors(0, shapes), tensors(1, shapes, 1e-2), [x.square() * 1e-4 + 1e-6 for x in tensors(2, shapes)], adam


def want_norm(g, v, adam, clip=1.0, **options):
    rows = zip(g, v, adam, strict=True)
    each = [spec.preconditioned_norm([back(x)], [back(m)], clip=clip, **a._asdict()) for x, m, a in rows]
    return np.array(each).T


def want_perturb(theta, g, v, adam, scales, clip=1.0):
    rows = zip(theta, g, v, adam, np.broadcast_to(scales, len(g)), strict=True)
    return [spec.perturb([back(t)], [back(x)], [back(m)], s, clip=clip, **a._asdict())[0] for t, x, m, a, s in rows]


def assert_close(got, oracle, units: float = 10) -> None:
    for x, o in zip(got, oracle, strict=True):
        assert x.shape == o.shape
        assert (np.abs(back(x) - o) <= units * HALF_UNITS * (np.abs(o) + 1)).all()


@pytest.mark.parametrize("clip", [1.0, 0.3, torch.tensor(0.3)])
def test_norm_matches_the_oracle(clip):
    _, g, v, adam = problem()
    each = want_norm(g, v, adam, float(clip))
    got = preconditioned_norm(g, v, clip=clip, adam=adam, gradient=True)
    np.testing.assert_allclose(got[:2], each.sum(1), rtol=40 * HALF_UNITS)
    squares = spec.preconditioned_norm([back(x) for x in g], None, clip=float(clip))[0]
    np.testing.assert_allclose(got.g_sumsq, squares, rtol=40 * HALF_UNITS)
    np.testing.assert_allclose(preconditioned_norm(g, clip=clip), [squares] * 2, rtol=40 * HALF_UNITS)


def test_sums_of_each_tensor_with_a_mask():
    _, g, v, adam = problem()
    mask = [True, False, True, True, False, True, True]
    each = want_norm(g, v, adam) * mask
    got = preconditioned_norm(g, v, adam=adam, mask=mask, per_tensor=True)
    np.testing.assert_allclose(got, each, rtol=40 * HALF_UNITS)
    np.testing.assert_allclose(preconditioned_norm(g, v, adam=adam, mask=mask), each.sum(1), rtol=40 * HALF_UNITS)
    assert preconditioned_norm(g, v, adam=adam, mask=[False] * 7) == (0, 0)


def test_more_partial_sums_than_one_program_reads_at_once(monkeypatch):
    module = parameter_launches.KERNELS["sum_partials"]
    monkeypatch.setattr(module, "SUM_BLOCK", 4)
    _, g, v, adam = problem()
    got = preconditioned_norm(g, v, adam=adam)
    np.testing.assert_allclose(got, want_norm(g, v, adam).sum(1), rtol=40 * HALF_UNITS)


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_perturbed_weights_match_the_oracle(clip):
    theta, g, v, adam = problem()
    scales = torch.arange(1.0, 8.0) / 10
    before = [x.clone() for x in theta]
    assert_close(perturb(theta, g, v, scales[2], clip=clip, adam=adam), want_perturb(theta, g, v, adam, 0.3, clip))
    each = perturb(theta, g, v, scales, clip=clip, adam=adam)
    assert_close(each, want_perturb(theta, g, v, adam, scales.numpy(), clip))
    assert all(torch.equal(x, y) for x, y in zip(theta, before, strict=True))


def test_perturb_takes_a_mask_and_output_tensors():
    theta, g, v, adam = problem()
    mask = [True, False, True, True, False, True, True]
    new = perturb(theta, g, v, torch.tensor(0.1), adam=adam, mask=mask)
    assert new[1] is theta[1]
    out = [torch.full_like(x, 7) for x in theta]
    assert perturb(theta, g, v, torch.tensor(0.1), adam=adam, mask=mask, out=out)[0] is out[0]
    assert all(torch.equal(x, y) for x, y in zip(out, new, strict=True))


def test_nearest_bfloat16_is_within_one_unit_of_the_last_place():
    theta, g, v, adam = problem()
    got = perturb(theta, g, v, torch.tensor(0.1), adam=adam, dtype=torch.bfloat16)
    for x, o in zip(got, want_perturb(theta, g, v, adam, 0.1), strict=True):
        assert x.dtype == torch.bfloat16
        assert (np.abs(back(x) - o) <= 2**-7 * np.abs(o)).all()


def test_random_rounding_has_the_bits_of_the_oracle():
    theta, g = tensors(0), [torch.zeros(s) for s in SHAPES]
    theta[0][0, :3] = torch.tensor([np.nan, np.inf, -np.inf])
    options = {"dtype": torch.bfloat16, "rounding": Rounding(True, seed=2**40 + 1, step=12345)}
    mine, plain = (f(theta, g, None, torch.tensor(0.0), **options) for f in (perturb, plain_perturb))
    for i, (x, y, t) in enumerate(zip(mine, plain, theta, strict=True)):
        exact = spec.rounded_at_random(t.numpy(), seed=2**40 + 1, step=12345, tensor=i)
        assert np.array_equal(back(x), exact, equal_nan=True)
        assert np.array_equal(back(y), exact, equal_nan=True)


@pytest.mark.parametrize("clip", [1.0, torch.tensor(0.3)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_update_matches_the_oracle(decay, clip):
    theta, g, m, v = tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]
    each = [Update(1e-2 * (1 + i), 0.9, B2, EPS, decay, 3 + i) for i in range(len(SHAPES))]
    rows = zip(theta, g, m, v, each, strict=True)
    want = [spec.adamw(*map(back, (t, x, a, b)), clip=float(clip), **u._asdict()) for t, x, a, b, u in rows]
    copies = [torch.zeros_like(x) for x in theta]
    adamw(theta, g, m, v, each, clip=clip, copy=copies)
    for got, k in ((theta, 0), (m, 1), (v, 2), (copies, 0)):
        assert_close(got, [np.asarray(x[k]) for x in want])
    assert all(torch.equal(x, y) for x, y in zip(g, tensors(1), strict=True))


def test_bfloat16_moments_and_copies_have_random_streams():
    lists = [tensors(0), tensors(1), [x.bfloat16() for x in tensors(2)], [x.square().bfloat16() for x in tensors(3)]]
    mine, plain = ([[x.clone() for x in xs] for xs in lists] for _ in range(2))
    each = [Update(0.0, 0.5, 0.5, EPS, 0.0, 3)] * len(SHAPES)  # halves are exact, so that both round the same numbers
    mine.append([torch.zeros_like(x, dtype=torch.bfloat16) for x in lists[0]])
    plain.append([torch.zeros_like(x, dtype=torch.bfloat16) for x in lists[0]])
    for f, xs in ((adamw, mine), (plain_adamw, plain)):
        f(*xs[:4], each, copy=xs[4], rounding=Rounding(True, 1, 2))
    for xs, ys in zip(mine, plain, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_optimizer_steps_match_torch_and_its_checkpoint_resumes():
    pairs = [([torch.nn.Parameter(x) for x in tensors(0, [(20,), ()])]) for _ in range(3)]
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizers = [f(p, **options) for f, p in zip((AdamW, PlainAdamW, torch.optim.AdamW), pairs, strict=True)]
    for t in range(30):
        if t == 15:
            optimizers[0].load_state_dict(copy.deepcopy(optimizers[2].state_dict()))
        for weights, optimizer in zip(pairs, optimizers, strict=True):
            for p, x in zip(weights, tensors(100 + t, [(20,), ()]), strict=True):
                p.grad = x
            optimizer.step()
    for weights in pairs[:2]:
        for p, q in zip(weights, pairs[2], strict=True):
            assert (p - q).abs().max() <= 60 * HALF_UNITS * q.abs().max()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_update_or_skip_by_a_number_on_the_device(found):
    each = [Update(1e-2, 0.9, B2, EPS, 0.1, 3)] * len(SHAPES)
    mine, plain = ([tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]] for _ in range(2))
    copies = [[torch.zeros_like(x) for x in tensors(0)] for _ in range(2)]
    if found:
        mine[1][0][0, 0] = plain[1][0][0, 0] = np.nan
    for f, xs, written in ((adamw, mine, copies[0]), (plain_adamw, plain, copies[1])):
        f(*xs, each, copy=written, clip=0.5, found_inf=torch.tensor(found))
    for xs, ys in zip((mine[0], *mine[2:], copies[0]), (plain[0], *plain[2:], copies[1]), strict=True):
        assert_close(xs, [back(y) for y in ys])
    assert all(torch.equal(x, y) == bool(found) or not x.numel() for x, y in zip(mine[0], tensors(0), strict=True))
    assert all(torch.equal(x, y) for x, y in zip(mine[0], copies[0], strict=True))


def test_step_counts_on_the_device(monkeypatch):
    """The bias corrections of any count, by the kernel that reads it."""
    module = parameter_launches.KERNELS["adamw_chunk"]

    def counts(plan, settings):
        found = [torch.tensor(float(settings[entry.place].step)) for entry in plan.entries]
        plan.table[:, tables.SCALE] = [t.data_ptr() for t in found]
        return found

    each = [Update(1e-2, 0.9, 0.999, EPS, 0.1, t) for t in (1, 2, 3, 10, 1000, 12345, 2**20)]
    lists = [tensors(0), tensors(1), tensors(2), [x.square() for x in tensors(3)]]
    want = [[x.clone() for x in xs] for xs in lists]
    adamw(*want, each)
    monkeypatch.setattr(module, "_counts", counts)
    adamw(*lists, each)
    for xs, ys in zip(lists, want, strict=True):
        assert_close(xs, [back(y) for y in ys])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_lerp_has_the_values_of_pytorch(share):
    mine, plain = ([tensors(0), tensors(1)] for _ in range(2))
    mine[1][1], plain[1][1] = mine[1][1].bfloat16(), plain[1][1].bfloat16().float()
    lerp_(*mine, torch.tensor(share))
    plain_lerp_(*plain, torch.tensor(share))
    assert_close(mine[0], [back(x) for x in plain[0]], units=4)
    assert share or all(torch.equal(x, y) for x, y in zip(mine[0], tensors(0), strict=True))


def unaligned(xs):
    return [torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape) for x in xs]


def test_unaligned_views_and_other_layouts_give_the_same_bits():
    theta, g, v, adam = problem([(5, 16), (37, 1), (8, 8)])
    scale = torch.tensor(0.1)
    want = preconditioned_norm(g, v, adam=adam), perturb(theta, g, v, scale, adam=adam)
    off = [unaligned(xs) for xs in (theta, g, v)]
    assert any(x.data_ptr() % 16 for x in off[0])
    out = unaligned([torch.zeros_like(x) for x in theta])
    perturb(*off, scale, adam=adam, out=out)
    assert all(torch.equal(x, y) for x, y in zip(out, want[1], strict=True))
    assert preconditioned_norm(*off[1:], adam=adam) == want[0]
    turned = [[x.T for x in xs] for xs in (theta, g, v)]
    back_again = perturb(*turned, scale, adam=adam)
    assert all(torch.equal(x.T, y) for x, y in zip(back_again, want[1], strict=True))


def test_nothing_is_written_beside_the_tensors():
    theta, g, v, adam = problem([(37,), (5,), (16,)])
    whole = torch.full((100,), 7.0)
    out = [whole[3:40], whole[41:46], whole[64:80]]
    perturb(theta, g, v, torch.tensor(0.1), adam=adam, out=out)
    for x in out:
        x.fill_(7.0)
    assert (whole == 7).all()


def test_dtypes_may_differ_from_tensor_to_tensor():
    theta, g, v, adam = problem()
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    g = [x.to(kinds[i % 3]) for i, x in enumerate(g)]
    v = [x.to(kinds[i % 2]) for i, x in enumerate(v)]
    each = want_norm(g, v, adam)
    np.testing.assert_allclose(preconditioned_norm(g, v, adam=adam), each.sum(1), rtol=40 * HALF_UNITS)
    np.testing.assert_allclose(preconditioned_norm(g, v, adam=adam, per_tensor=True), each, rtol=40 * HALF_UNITS)
    assert_close(perturb(theta, g, v, torch.tensor(0.1), adam=adam), want_perturb(theta, g, v, adam, 0.1))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1e18])
@pytest.mark.parametrize("current", [True, False])
def test_zero_denormal_and_huge_gradients(value, current):
    g, v = [torch.full((20,), value)], [torch.zeros(20) if value < 1 else torch.full((20,), 1e36)]
    adam = [Adam(B2, EPS, 0.5, current)]
    np.testing.assert_allclose(
        preconditioned_norm(g, v, adam=adam), want_norm(g, v, adam).sum(1), rtol=40 * HALF_UNITS, atol=1e-37
    )


@pytest.mark.parametrize("at", [3, 33])  # in a full chunk, and in a ragged one
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_gradient_shows(bad, at):
    theta, g, v, adam = problem()
    g[1][at] = bad
    assert not torch.isfinite(torch.stack(preconditioned_norm(g, v, adam=adam))).any()
    moved = perturb(theta, g, v, torch.tensor(0.1), adam=adam)
    assert [int((~torch.isfinite(x)).sum()) for x in moved] == [0, 1, 0, 0, 0, 0, 0]
    adamw(theta, g, tensors(2), [x.square() for x in tensors(3)], [Update(1e-2, 0.9, B2, EPS, 0.1, 3)] * 7)
    assert [int((~torch.isfinite(x)).sum()) for x in theta] == [0, 1, 0, 0, 0, 0, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zero_over_zero_past_the_end_counts_for_nothing():
    g, v = [torch.ones(5)], [torch.ones(5)]
    assert torch.isfinite(torch.stack(preconditioned_norm(g, v, adam=[Adam(B2, 0.0, 1.0)]))).all()


def test_many_small_tensors():
    theta, g, v, adam = problem([(i % 4,) for i in range(150)])
    np.testing.assert_allclose(preconditioned_norm(g, v, adam=adam), want_norm(g, v, adam).sum(1), rtol=40 * HALF_UNITS)
    assert_close(perturb(theta, g, v, torch.tensor(0.1), adam=adam), want_perturb(theta, g, v, adam, 0.1))


@settings(max_examples=8, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=5),
    scale=st.floats(0, 2),
    clip=st.floats(0.01, 1),
)
def test_any_list_of_shapes(shapes, scale, clip):
    theta, g, v, adam = problem(shapes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "BLOCK", BLOCK)
        got = preconditioned_norm(g, v, clip=clip, adam=adam)
        moved = perturb(theta, g, v, torch.tensor(scale), clip=clip, adam=adam)
    np.testing.assert_allclose(got, plain_norm(g, v, clip=clip, adam=adam), rtol=40 * HALF_UNITS)
    assert_close(moved, [back(x) for x in plain_perturb(theta, g, v, torch.tensor(scale), clip=clip, adam=adam)])


def test_wrong_eps_is_noticed():
    """The negative control."""
    _, g, v, adam = problem()
    got = preconditioned_norm(g, v, adam=[a._replace(eps=1e-4) for a in adam])
    assert abs(float(got[0]) / want_norm(g, v, adam).sum(1)[0] - 1) > 1e-3


def test_bad_dtypes_and_counts_are_refused():
    theta, g, v, adam = problem()
    with pytest.raises(ValueError, match=r"float32, bfloat16 and float16, got torch.float64"):
        preconditioned_norm([x.double() for x in g])
    with pytest.raises(ValueError, match="at least one gradient"):
        preconditioned_norm([])
    with pytest.raises(ValueError, match="scale: one for each of the 7 tensors or one for all, got 2"):
        perturb(theta, g, v, torch.ones(2), adam=adam)
    with pytest.raises(ValueError, match="at random is to bfloat16 alone"):
        perturb(theta, g, v, torch.tensor(0.1), adam=adam, dtype=torch.float16, rounding=Rounding(True))
    with pytest.raises(ValueError, match="settings: one for each of the 7 tensors"):
        adamw(theta, g, v, v, [])


# --- what is launched -------------------------------------------------------------------------------------------------


def operation(name: str) -> parameter_launches.Operation:
    return next(each for each in parameter_launches.OPERATIONS if each.name == name)


@pytest.mark.parametrize("each", parameter_launches.OPERATIONS, ids=lambda each: each.name)
def test_148_tensors_take_two_launches_at_most(each, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", 2048)
    many, few = (parameter_launches.launches(each, shapes) for shapes in (WEIGHTS["gpt2"], [(3,), (16384,)]))
    assert len(WEIGHTS["gpt2"]) == 148
    assert len(many) <= 2
    assert [x.specialisation for x in many] == [x.specialisation for x in few]
    assert many[0].grid == sum(-(-int(np.prod(shape)) // 2048) for shape in WEIGHTS["gpt2"])


def test_launch_tables_hold_addresses_and_chunks():
    launch = parameter_launches.launches(operation("perturb to bfloat16"), [(40,), (), (16,)])[0]
    assert launch.grid == 3 + 1 + 1
    assert launch.tables["chunks_ptr"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [2, 0]]
    table = launch.tables["table_ptr"]
    assert table[:, tables.LENGTH].tolist() == [40, 1, 16]
    assert (table[:, :4] // parameter_launches.REGION - table[0, 0] // parameter_launches.REGION == np.arange(4)).all()


def test_a_table_stays_while_its_content_does():
    x, v = torch.zeros(40), torch.zeros(40)
    adam = [Adam(0.5, 0.25, 0.5)]

    def sent(*arrays, **options):
        (plan,) = tables.plans(arrays, adam)
        return tables.table(plan, tables.direction_settings(plan), Rounding(), (), **options)

    first = sent([x], [v])
    assert sent([x], [v]) is first
    assert sent([x], [v], changes=True) is not first
    assert sent([x.clone()], [v]) is not first
    assert len(tables._sent) <= tables.MOST_SENT


def test_a_table_holds_addresses_settings_and_keys():
    x, v = torch.zeros(40), torch.zeros(40)
    (plan,) = tables.plans(([x], [v], None), [Adam(0.5, 0.25, 0.5)])
    table = tables.table(plan, tables.direction_settings(plan), Rounding(True, 1, 2), ("theta", "copy"))
    row = table[0]
    assert row[:3].tolist() == [x.data_ptr(), v.data_ptr(), 0]
    assert row[tables.LENGTH] == 40
    assert row.view(torch.float32)[16:19].tolist() == [1.0, 1.0, 0.25]
    assert len({int(row[7]), int(row[12]), 0}) == 3
