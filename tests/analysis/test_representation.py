import numpy as np
import pytest
import reference

from repae_jax.analysis import representation as rep


@pytest.fixture(scope="module")
def golden():
    arrays = reference.load("cknna").arrays
    return arrays | {name: rep.unit_rows(arrays[name]) for name in ("features_a", "features_b")}


def draw(count=60, width=8, seed=0):
    return rep.unit_rows(np.random.default_rng(seed).normal(size=(count, width)))


def test_golden(golden, record_property):
    a, b = golden["features_a"], golden["features_b"]
    similarities = {
        "cknna_k10": rep.cknna(a, b, 10, "platonic_code"),
        "cknna_k10_self": rep.cknna(a, a, 10, "platonic_code"),
        "cka": rep.cka(a, b),
        "unbiased_cka": rep.cka(a, b, unbiased=True),
        "mutual_knn_k10": rep.mutual_knn(a, b, 10),
    }
    for name, value in similarities.items():
        reference.check(value, golden[name], 1e-5, name, record_property)


def naive(a, b, k, formula):
    """CKNNA with whole matrices, as the formulas are written."""

    def neighbors(kernel):
        kernel = kernel.copy()
        np.fill_diagonal(kernel, -np.inf)
        mask = np.zeros_like(kernel)
        np.put_along_axis(mask, np.argsort(-kernel, axis=1)[:, :k], 1, axis=1)
        return mask

    def align(x, y):
        x, y = x @ x.T, y @ y.T
        mask, n = neighbors(x) * neighbors(y), len(x)
        if formula == "paper":
            x, y = (kernel - kernel.mean(axis=1, keepdims=True) for kernel in (x, y))
            return (mask * x * y).sum()
        x, y = mask * x, mask * y
        product = x @ y
        terms = (x * y.T).sum() + x.sum() * y.sum() / ((n - 1) * (n - 2)) - 2 * product.sum() / (n - 2)
        return terms / (n * (n - 3))

    return align(a, b) / (np.sqrt(align(a, a) * align(b, b)) + (1e-6 if formula == "platonic_code" else 0))


@pytest.mark.parametrize("formula", rep.FORMULAS)
def test_against_whole_matrices(formula):
    a = draw()
    b = rep.unit_rows(a[:, :5] + 0.3 * draw(width=5, seed=1))
    expected = naive(a.astype(np.float64), b.astype(np.float64), 7, formula)
    assert rep.cknna(a, b, 7, formula) == pytest.approx(expected, rel=1e-5)


def test_the_formulas_differ():
    a, b = draw(), rep.unit_rows(draw()[:, :4])
    assert abs(rep.cknna(a, b, 10, "paper") - rep.cknna(a, b, 10, "platonic_code")) > 0.01


@pytest.mark.parametrize("formula", rep.FORMULAS)
def test_of_itself_and_of_noise(formula):
    a, b = draw(400, 16), draw(400, 16, seed=1)
    rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(16, 16)))[0]
    assert rep.cknna(a, a, formula=formula) == pytest.approx(1, abs=1e-3 if formula == "platonic_code" else 1e-12)
    assert rep.cknna(a, a @ rotation, formula=formula) == pytest.approx(1, abs=1e-3)
    assert rep.cknna(a, b, formula=formula) < 0.1
    of_swapped = rep.cknna(b, a, formula=formula)
    assert rep.cknna(a, b, formula=formula) == pytest.approx(of_swapped, rel=1e-2 if formula == "platonic_code" else 1e-9)


def test_the_size_of_the_pieces_changes_nothing():
    a = draw()
    whole, pieces = rep.nearest(a, 5), rep.nearest(a, 5, rows=7)
    np.testing.assert_array_equal(np.sort(whole.indices), np.sort(pieces.indices))
    assert rep.neighbor_alignment(whole, pieces) == pytest.approx(1)
    assert not (whole.indices == np.arange(60)[:, None]).any(), "an image is no neighbor of itself"


def test_cka_of_itself_and_of_noise():
    a = draw(200, 8)
    for unbiased in (False, True):
        assert rep.cka(a, 3 * a + 2, unbiased) == pytest.approx(1, abs=1e-4)
    assert abs(rep.cka(a, draw(200, 8, seed=1), unbiased=True)) < 0.05


def test_collapsed_features():
    constant = np.ones((40, 3))
    assert np.isnan(rep.cknna(draw(40), constant, 10)) and np.isnan(rep.cka(draw(40), constant))


def test_errors():
    with pytest.raises(ValueError, match=r"\[11, 8\], k is 10; allowed: \[N, F\] with N >= k \+ 2"):
        rep.nearest(draw(11))
    broken = draw()
    broken[3, 2] = np.nan
    with pytest.raises(ValueError, match="features of 1 of 60 images are not finite"):
        rep.nearest(broken)
    with pytest.raises(ValueError, match="formula 'both' is unknown; allowed: paper, platonic_code"):
        rep.cknna(draw(), draw(), formula="both")
    with pytest.raises(ValueError, match=r"\[60, 10\] and \[50, 10\]; allowed: the same images"):
        rep.cknna(draw(), draw(50))
    with pytest.raises(ValueError, match=r"\[60, 8\] and \[50, 8\]"):
        rep.cka(draw(), draw(50))
    with pytest.raises(ValueError, match="C >= 3 to have 3 components"):
        rep.principal_components(np.zeros((1, 4, 4, 2)))


def test_principal_components():
    latents = np.random.default_rng(0).gamma(2.0, size=(3, 4, 4, 6)) * [1, 5, 1, 1, 3, 1]
    components = rep.principal_components(latents)
    assert components.shape == (3, 4, 4, 3)
    tokens = components.reshape(-1, 3)
    np.testing.assert_allclose(tokens.mean(axis=0), 0, atol=1e-10)
    covariance = np.cov(tokens.T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-10 * covariance[0, 0])
    assert covariance[0, 0] > covariance[1, 1] > covariance[2, 2]
    expected = np.linalg.eigvalsh(np.cov(latents.reshape(-1, 6).T))[::-1][:3]
    np.testing.assert_allclose(np.diag(covariance), expected)


def test_components_do_not_depend_on_order_or_sign_of_the_channels():
    latents = np.random.default_rng(0).gamma(2.0, size=(3, 4, 4, 6)) * [1, 5, 1, 1, 3, 1]
    components = rep.principal_components(latents)
    np.testing.assert_allclose(rep.principal_components(latents[..., ::-1]), components, atol=1e-9)
    np.testing.assert_allclose(rep.principal_components(latents * [1, -1, -1, 1, 1, -1]), components, atol=1e-9)
    np.testing.assert_allclose(rep.principal_components(latents + 7), components, atol=1e-9)
