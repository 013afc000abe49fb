"""The closed-form solver against brute force: constraints, identities and the equalities of the spec."""

import pytest
import torch

from excise.solve import Covariance, Identity, NullSpace, compress, solve_edit


@pytest.fixture
def world():
    torch.manual_seed(0)
    mixing = torch.randn(20, 20, dtype=torch.float64)
    ordinary = torch.randn(400, 20, dtype=torch.float64) @ mixing
    return {
        "keys": torch.randn(3, 20, dtype=torch.float64) @ mixing,
        "protect": torch.randn(4, 20, dtype=torch.float64) @ mixing,
        "residuals": torch.randn(3, 7, dtype=torch.float64),
        "second": ordinary.mT @ ordinary / 400,
    }


def change(solution, block="w"):
    return solution.left[block] @ solution.right


def test_hard_form_writes_exactly_and_protects_exactly(world):
    solution = solve_edit(
        {"w": world["keys"]},
        world["residuals"],
        {"w": Covariance(world["second"])},
        protect={"w": world["protect"]},
        mode="hard",
    )
    delta = change(solution)
    torch.testing.assert_close(world["keys"] @ delta, world["residuals"], rtol=1e-9, atol=1e-10)
    assert (world["protect"] @ delta).abs().max() < 1e-10
    torch.testing.assert_close(solution.share, torch.ones(3, dtype=torch.float64))
    assert solution.leak.max() < 1e-10


def test_small_system_equals_the_large_one(world):
    """dW = R K^T (K K^T / ridge + M)^-1 style: the d_in-sized ridge solution from the definition."""
    k, r, ridge = world["keys"], world["residuals"], 1e-2
    metric = Covariance(world["second"], ridge=1e-3)
    solution = solve_edit({"w": k}, r, {"w": metric}, mode="ridge", ridge=ridge)
    m = world["second"] + 1e-3 * world["second"].diagonal().mean() * torch.eye(20, dtype=torch.float64)
    level = (k @ torch.linalg.inv(m) @ k.mT).diagonal().mean() * ridge
    direct = torch.linalg.solve(k.mT @ k / level + m, k.mT @ r / level)
    torch.testing.assert_close(change(solution), direct, rtol=1e-7, atol=1e-9)


def test_hard_form_is_the_cheapest_of_all_exact_changes(world):
    k, r = world["keys"], world["residuals"]
    metric = Covariance(world["second"], ridge=1e-9)
    best = change(solve_edit({"w": k}, r, {"w": metric}, mode="hard"))
    cost = lambda d: torch.einsum("io,ij,jo->", d, world["second"], d)  # noqa: E731
    null = torch.eye(20, dtype=torch.float64) - torch.linalg.pinv(k) @ k
    for _ in range(20):
        other = best + 0.1 * null @ torch.randn(20, 7, dtype=torch.float64)
        torch.testing.assert_close(k @ other, r, rtol=1e-8, atol=1e-9)
        assert cost(other) > cost(best)


def test_realised_share_of_one_key_is_the_formula(world):
    k, r = world["keys"][:1], world["residuals"][:1]
    solution = solve_edit({"w": k}, r, {"w": Identity()}, mode="ridge", ridge=0.25)
    assert solution.share.item() == pytest.approx(1 / 1.25)
    torch.testing.assert_close(k @ change(solution), r / 1.25)


def test_nothing_asked_is_nothing_done(world):
    solution = solve_edit({"w": world["keys"]}, torch.zeros(3, 7, dtype=torch.float64), {"w": Identity()})
    assert torch.equal(change(solution), torch.zeros(20, 7, dtype=torch.float64))


def test_rank_is_that_of_the_residuals(world):
    shared = world["residuals"][:1].expand(3, 7)
    assert solve_edit({"w": world["keys"]}, shared, {"w": Identity()}).rank == 1
    assert solve_edit({"w": world["keys"]}, world["residuals"], {"w": Identity()}).rank == 3
    assert solve_edit({"w": world["keys"]}, world["residuals"], {"w": Identity()}, rank=2).rank == 2


def test_order_of_columns_does_not_matter(world):
    order = torch.tensor([2, 0, 1])
    a = solve_edit({"w": world["keys"]}, world["residuals"], {"w": Covariance(world["second"])})
    b = solve_edit({"w": world["keys"][order]}, world["residuals"][order], {"w": Covariance(world["second"])})
    torch.testing.assert_close(change(a), change(b), rtol=1e-8, atol=1e-10)


def test_blocks_that_sum_are_one_matrix(world):
    """Two blocks with their own metrics equal one matrix under the block-diagonal metric."""
    k, r = world["keys"], world["residuals"]
    second = torch.block_diag(world["second"][:12, :12], world["second"][12:, 12:])
    parts = solve_edit(
        {"a": k[:, :12], "b": k[:, 12:]},
        r,
        {"a": Covariance(second[:12, :12], 0.0), "b": Covariance(second[12:, 12:], 0.0)},
    )
    whole = solve_edit({"w": k}, r, {"w": Covariance(second, 0.0)})
    torch.testing.assert_close(torch.cat([change(parts, "a"), change(parts, "b")]), change(whole), rtol=1e-7, atol=1e-9)


def test_one_by_one_equals_jointly(world):
    """Earlier keys as zero-residual columns and the new residual taken against the current weight: recursive least squares."""
    k, r = world["keys"], world["residuals"]
    metric = {"w": Covariance(world["second"])}
    joint = change(solve_edit({"w": k}, r, metric, mode="hard"))
    total = torch.zeros_like(joint)
    for i in range(3):
        left = r[i : i + 1] - k[i : i + 1] @ total
        before = {"w": k[:i]} if i else None
        total = total + change(solve_edit({"w": k[i : i + 1]}, left, metric, protect=before, mode="hard"))
    torch.testing.assert_close(total, joint, rtol=1e-7, atol=1e-9)


def test_null_space_projector(world):
    null = NullSpace(world["second"], energy=1e-2)
    basis = null.basis()
    p = null.solve(torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(p @ p, p)
    torch.testing.assert_close(p, p.mT)
    assert torch.trace(p).item() == pytest.approx(20 - basis.shape[1])
    delta = change(solve_edit({"w": world["keys"]}, world["residuals"], {"w": null}))
    assert (basis.mT @ delta).abs().max() < 1e-10


def test_twin_keys_are_refused_in_the_hard_form(world):
    twins = torch.cat([world["keys"][:1], world["keys"][:1] * (1 + 1e-13)])
    with pytest.raises(ValueError, match="nearly the same"):
        solve_edit({"w": twins}, world["residuals"][:2], {"w": Identity()}, mode="hard")


def test_nan_keys_are_refused(world):
    with pytest.raises(ValueError, match="NaN"):
        solve_edit({"w": world["keys"] * float("nan")}, world["residuals"], {"w": Identity()})


def test_scaling_the_activations_scales_nothing_else(world):
    """The relative ridge makes the realised share blind to the units of the activations."""
    a = solve_edit({"w": world["keys"]}, world["residuals"], {"w": Covariance(world["second"])})
    b = solve_edit({"w": 100 * world["keys"]}, world["residuals"], {"w": Covariance(1e4 * world["second"])})
    torch.testing.assert_close(a.share, b.share)


def test_compress_keeps_the_span():
    torch.manual_seed(1)
    rows = torch.randn(2, 9, dtype=torch.float64).repeat(5, 1) + 1e-6 * torch.randn(10, 9, dtype=torch.float64)
    thin = compress(rows)
    assert len(thin) == 2
    outside = rows - rows @ torch.linalg.pinv(thin) @ thin
    assert outside.norm() < 1e-4 * rows.norm()
