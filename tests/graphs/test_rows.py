import pytest
import torch

from gkd.graphs.nearest import nearest
from gkd.graphs.rows import neighbor_products, sort_rows
from gkd.graphs.similarity import CosineSimilarity, EuclideanSimilarity

DOUBLE = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_product_is_that_of_the_dense_matrix(dtype):
    generator = torch.Generator().manual_seed(0)
    row, column = torch.randint(0, 7, (2, 40), generator=generator)  # parallel entries add up
    value, X = torch.randn(40, generator=generator, dtype=dtype), torch.randn(7, 3, generator=generator, dtype=dtype)
    dense = torch.zeros(7, 7, dtype=dtype).index_put_((row, column), value, accumulate=True)
    torch.testing.assert_close(sort_rows(row, column, value, 7).multiply(X), dense @ X)
    assert sort_rows(torch.tensor([2, 0]), torch.tensor([1, 1]), torch.ones(2), 2).offset.tolist() == [0, 1, 1]  # row 2 is none of two


@pytest.mark.parametrize("similarity", [CosineSimilarity(), EuclideanSimilarity()])
@pytest.mark.parametrize("masked", [False, True])
def test_nearest_are_the_highest_scores(similarity, masked):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, n, 4, generator=generator, dtype=DOUBLE) for n in (5, 6))
    mask = torch.arange(6) < torch.tensor([6, 4, 1])[:, None] if masked else None
    rows = similarity.prepare(x, y)
    scores = similarity.scores(rows.x, rows.y)
    expected = (scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))).topk(2)
    source, found, exists = nearest(similarity, rows, 2, mask)
    if exists is None:
        exists = torch.ones_like(source, dtype=torch.bool)
    assert torch.equal(exists, expected.values > float("-inf"))
    assert torch.equal(source[exists], expected.indices[exists])
    assert torch.equal(found[exists], expected.values[exists])
    torch.testing.assert_close(similarity.neighbor_scores(rows.x, rows.y, source, found)[exists], expected.values[exists])


def test_neighbor_products_have_the_gradient_of_the_products():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 3, generator=generator, dtype=DOUBLE, requires_grad=True) for n in (4, 5))
    source = torch.randint(0, 5, (2, 4, 2), generator=generator)
    graph = torch.arange(2)[:, None, None]

    def products(x, y):
        return (x[:, :, None] * y[graph, source]).sum(-1)

    weight = torch.randn(2, 4, 2, generator=generator, dtype=DOUBLE)
    value = neighbor_products(x, y, source, products(x, y).detach())
    torch.testing.assert_close(value, products(x, y))
    for own, expected in zip(torch.autograd.grad(value, (x, y), weight), torch.autograd.grad(products(x, y), (x, y), weight), strict=True):
        torch.testing.assert_close(own, expected)
    same = neighbor_products(x, x, source % 4, torch.zeros_like(value))  # a set and its neighbours in itself
    expected = torch.autograd.grad((x[:, :, None] * x[graph, source % 4]).sum(-1), x, weight)[0]
    torch.testing.assert_close(torch.autograd.grad(same, x, weight)[0], expected)


def test_neighbor_products_compile_with_their_gradient():
    x = torch.rand(2, 6, 3, requires_grad=True)
    source = torch.randint(0, 6, (2, 6, 2), generator=torch.Generator().manual_seed(0))

    def run(x):
        return (neighbor_products(x, x, source, source.float()) * source).sum()

    torch.compiler.reset()
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)[0]
    torch.testing.assert_close(compiled, torch.autograd.grad(run(x), x)[0])
