"""The data set against the summary statistics of Fisher (1936), table 2: means of the three species."""

from __future__ import annotations

import pytest
import torch

from stablekl.data import load_iris

FISHER_MEANS = {
    "setosa": (5.006, 3.428, 1.462, 0.246),
    "versicolor": (5.936, 2.770, 4.260, 1.326),
    "virginica": (6.588, 2.974, 5.552, 2.026),
}


def test_shape_and_columns():
    x, columns = load_iris()
    assert x.shape == (150, 4)
    assert x.dtype == torch.float64
    assert columns == ("sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)")


@pytest.mark.parametrize("index", range(3))
def test_species_means_are_those_of_the_paper(index):
    x, _ = load_iris()
    means = torch.tensor(list(FISHER_MEANS.values())[index], dtype=torch.float64)
    torch.testing.assert_close(x[50 * index : 50 * index + 50].mean(0), means, rtol=0, atol=1e-12)


def test_not_the_uci_copy():
    x, _ = load_iris()  # which has 0.1 and 3.1, 1.5 here
    assert x[34].tolist() == [4.9, 3.1, 1.5, 0.2]
    assert x[37].tolist() == [4.9, 3.6, 1.4, 0.1]


def test_each_call_returns_its_own_copy():
    x, _ = load_iris()
    x.zero_()
    assert load_iris()[0].min() > 0
