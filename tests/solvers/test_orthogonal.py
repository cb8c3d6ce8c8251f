"""Orthogonal matrices: orthogonal they are, and the ones stay where they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laconic.solvers.quantization import orthogonal

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, sums of at most a few hundred products


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 130), seed=st.integers(0, 99))
def test_every_size_gives_orthogonal_matrices_that_can_keep_the_ones(size, seed):
    eye, ones = torch.eye(size).double(), torch.ones(size).double()
    matrix = orthogonal.hadamard(size, generator(seed))
    torch.testing.assert_close(matrix @ matrix.T, eye, **EXACT)
    kept = orthogonal.keeping_ones(matrix)
    torch.testing.assert_close(kept @ kept.T, eye, **EXACT)
    for turned in (kept, kept.T):
        torch.testing.assert_close(turned @ ones, ones, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [2, 12, 20, 24, 64, 96, 192, 384])
def test_hadamard_matrices_have_one_magnitude(size):
    matrix = orthogonal.hadamard(size, generator()) * size**0.5
    torch.testing.assert_close(matrix.abs(), torch.ones_like(matrix), **EXACT)


@pytest.mark.parametrize("keep_ones", [False, True])
def test_steps_stay_on_the_group_and_go_downhill(keep_ones):
    draw = generator(1)
    matrix = orthogonal.keeping_ones(orthogonal.hadamard(12, draw))
    wanted = orthogonal.keeping_ones(orthogonal.hadamard(12, draw))
    ones = torch.ones(12).double()
    before = (matrix - wanted).square().sum()
    for _ in range(200):
        matrix = orthogonal.step(matrix, 2 * (matrix - wanted), 0.05, keep_ones=keep_ones)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(12).double(), **EXACT)
    if keep_ones:
        torch.testing.assert_close(matrix @ ones, ones, rtol=0, atol=1e-10)
    assert (matrix - wanted).square().sum() < before


def test_no_step_is_wider_than_its_angle():
    draw = generator(2)
    matrix = orthogonal.hadamard(8, draw)
    slope = torch.randn(8, 8, generator=draw, dtype=torch.float64)
    moved = orthogonal.step(matrix, slope, 0.3, keep_ones=False) @ matrix.T
    angles = torch.linalg.eigvals(moved).angle().abs()
    torch.testing.assert_close(angles.max(), torch.tensor(0.3).double(), rtol=1e-6, atol=0)


def test_without_a_slope_nothing_moves():
    matrix = orthogonal.hadamard(4, generator())
    assert orthogonal.step(matrix, torch.zeros_like(matrix), 0.3, keep_ones=False) is matrix
