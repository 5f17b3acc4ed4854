"""Power iteration: two vectors find the spectral norm, the printed loop the spectral radius."""

import math

import pytest
import torch
from torch.testing import assert_close

from normkit.core.errors import OptionError
from normkit.weights.power_iteration import power_iteration, power_iteration_square

NOT_NORMAL = torch.tensor([[1.0, 5.0], [0.0, 0.5]], dtype=torch.float64)


def test_the_printed_loop_finds_the_radius_and_two_vectors_the_norm() -> None:
    radius, x = power_iteration_square(NOT_NORMAL, 1e-12)
    u, v = power_iteration(NOT_NORMAL, iterations=50)
    assert_close(radius, torch.tensor(1.0).double())
    assert_close(NOT_NORMAL @ x, x, rtol=0, atol=1e-9)
    assert_close(u @ NOT_NORMAL @ v, torch.linalg.matrix_norm(NOT_NORMAL, 2))
    assert round((u @ NOT_NORMAL @ v).item(), 4) == 5.1225


def test_of_a_symmetric_matrix_both_agree_and_a_sign_that_alternates_is_convergence() -> None:
    q = torch.linalg.qr(torch.randn(4, 4).double())[0]
    w = q @ torch.diag(torch.tensor([-3.0, 2.0, 1.0, 0.5]).double()) @ q.T
    assert_close(power_iteration_square(w, 1e-10)[0], torch.tensor(3.0).double())
    u, v = power_iteration(w, iterations=60)
    assert_close(u @ w @ v, torch.tensor(3.0).double())


def test_what_is_kept_saves_iterations() -> None:
    w = torch.diag(torch.tensor([3.0, 2.9, 1.0])).double()
    _, x = power_iteration_square(w, 1e-8)
    changed = w + 1e-6 * torch.eye(3)
    assert_close(power_iteration_square(changed, 1e-6, x, limit=1)[0], torch.tensor(3.0 + 1e-6).double())
    with pytest.raises(OptionError, match="still moves"):
        power_iteration_square(changed, 1e-6, torch.ones(3), limit=1)


def test_zero_and_complex_eigenvalues() -> None:
    assert power_iteration_square(torch.zeros(2, 2))[0] == 0
    assert all(vector.isfinite().all() for vector in power_iteration(torch.zeros(2, 3)))
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    with pytest.raises(OptionError, match="no dominant real eigenvalue"):
        power_iteration_square(turn, limit=100)
    u, v = power_iteration(turn)
    assert math.isclose(u @ turn @ v, 1.0, rel_tol=1e-6)
