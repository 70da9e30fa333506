"""Front and hypervolume against values by hand, cells of a grid, inclusion-exclusion and Monte Carlo."""

import math
from itertools import chain, combinations, product

import pytest
import torch

from cpo_kernels.evaluation.pareto import hypervolume, pareto_front


def test_front_by_hand():
    points = [[1, 5], [3, 3], [2, 3], [5, 1], [3, 3], [5, 0]]  # (2, 3) and (5, 0) tie on one objective and lose
    assert pareto_front(points).tolist() == [True, True, False, True, True, False]
    assert pareto_front([[2.0], [2.0], [1.0]]).tolist() == [True, True, False]
    assert pareto_front(torch.empty(0, 3)).tolist() == []


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("levels", [3, 50])  # with many ties, and with few
def test_front_is_what_no_point_dominates(num_objectives, levels):
    points = torch.randint(levels, (40, num_objectives), generator=torch.Generator().manual_seed(levels)).tolist()

    def dominates(a, b):
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert pareto_front(points).tolist() == expected and 0 < sum(expected) < 40


def test_hypervolume_by_hand():
    assert hypervolume([[1, 5], [3, 3], [2, 3]], [0, 0]) == 11  # 1 x 5 + 2 x 3
    assert hypervolume([[1, 5], [3, 3]], [1, 1]) == 4  # (1, 5) does not exceed the reference
    assert hypervolume([[2, 2, 2, 2], [1, 1, 1, 3]], [0, 0, 0, 0]) == 17
    assert hypervolume([[-1.0], [2.5], [2.5]], [0.5]) == 2
    assert hypervolume([[0, 9]], [1, 1]) == 0 == hypervolume(torch.empty(0, 2), [0, 0])


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 4])
@pytest.mark.parametrize("num_points", [1, 2, 17])
def test_hypervolume_counts_the_cells_of_a_grid(num_objectives, num_points):
    """Whole coordinates: the volume is the number of unit cells below at least one point. Ties and dominated points."""
    generator = torch.Generator().manual_seed(num_points)
    points = torch.randint(-1, 6, (num_points, num_objectives), generator=generator)
    corners = torch.tensor(list(product(range(6), repeat=num_objectives)))  # [6^K, K], lower corners
    expected = (points[None] > corners[:, None]).all(-1).any(1).sum().item()
    assert hypervolume(points, [0] * num_objectives) == expected
    assert hypervolume(points.double() + 0.5, [0.5] * num_objectives) == expected


@pytest.mark.parametrize("num_objectives", [1, 2, 3, 5])
@pytest.mark.parametrize("num_points", [1, 4, 9])
def test_hypervolume_is_inclusion_exclusion(num_objectives, num_points):
    """An independent exact method for arbitrary coordinates: the volume of a union is the alternating sum over all
    subsets of points of the volume of their intersection, the box below their minimum. Some points lie outside.
    (moocore 0.3.2 agrees to 1e-15 on 60 sets of 40 points with 2 to 5 objectives; run by hand, since it needs cffi.)"""
    generator = torch.Generator().manual_seed(10 * num_points + num_objectives)
    points = torch.randn(num_points, num_objectives, generator=generator, dtype=torch.float64).tolist()
    points.append(points[0])  # a duplicate adds nothing
    reference = [-1.0 - 0.25 * k for k in range(num_objectives)]
    subsets = chain.from_iterable(combinations(points, size) for size in range(1, len(points) + 1))
    expected = math.fsum(
        -((-1) ** len(subset))
        * math.prod(max(0.0, min(column) - r) for column, r in zip(zip(*subset, strict=True), reference, strict=True))
        for subset in subsets
    )
    assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
def test_hypervolume_is_the_share_of_random_points_below(num_objectives):
    generator = torch.Generator().manual_seed(num_objectives)
    points = torch.rand(30, num_objectives, generator=generator, dtype=torch.float64)
    samples = torch.rand(200_000, num_objectives, generator=generator, dtype=torch.float64)
    share = (points[:, None] > samples).all(-1).any(0).double().mean().item()
    exact = hypervolume(points, [0.0] * num_objectives)
    assert exact == pytest.approx(share, abs=4 * (exact * (1 - exact) / len(samples)) ** 0.5)  # four standard errors
    assert exact == pytest.approx(hypervolume(points[pareto_front(points)], [0.0] * num_objectives), rel=1e-12)
    assert exact == pytest.approx(hypervolume(points.flip(1), [0.0] * num_objectives), rel=1e-12)


@pytest.mark.parametrize(
    ("points", "reference", "message"),
    [
        ([[1.0, float("nan")]], [0, 0], r"finite numbers \[n, K\]"),
        ([1.0, 2.0], [0, 0], r"got \[2\]"),
        ([[1.0, 2.0]], [0], "2 finite numbers"),
        ([[1.0]], [float("inf")], "reference must be 1 finite"),
    ],
)
def test_bad_points_are_refused(points, reference, message):
    with pytest.raises(ValueError, match=message):
        hypervolume(points, reference)
