"""The adaptive weight against the ratio computed by hand, and against torch's two backward passes; float32, 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from repae_jax.losses.adaptive import adaptive_weight
from repae_jax.losses.adversarial import generator_loss
from repae_jax.losses.reconstruction import l1


def test_ratio_by_hand():
    weight = adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 0.5]), 1e4)
    np.testing.assert_allclose(weight, 5 / (0.5 + 1e-4), rtol=1e-6)
    assert weight.dtype == jnp.float32 and weight.shape == ()


def test_trees_have_one_norm():
    tree = {"kernel": jnp.array([[1.0, 2.0]]), "bias": jnp.array([2.0])}
    np.testing.assert_allclose(adaptive_weight(tree, tree, 1e4, eps=0), 1, rtol=1e-6)
    np.testing.assert_allclose(adaptive_weight(tree, jax.tree.map(lambda x: 2 * x, tree), 1e4), 3 / (6 + 1e-4), rtol=1e-6)


def test_clips_at_both_ends():
    one, zero = jnp.ones(1), jnp.zeros(1)
    assert adaptive_weight(2 * one, zero, 1e4) == 1e4
    np.testing.assert_allclose(adaptive_weight(2 * one, zero, high=1e8), 2e4, rtol=1e-6)  # VF's range
    assert adaptive_weight(zero, one, 1e4) == 0 and adaptive_weight(zero, zero, 1e4) == 0
    assert np.isnan(adaptive_weight(one, np.nan * one, 1e4))


def test_is_a_constant_for_differentiation():
    assert jax.grad(lambda x: adaptive_weight(x * jnp.ones(2), jnp.ones(2), 1e4))(3.0) == 0


def test_errors():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\); allowed: both at the same layer"):
        adaptive_weight(jnp.ones(2), jnp.ones(3), 1e4)
    with pytest.raises(ValueError, match="high -1.0; allowed: 0 and above"):
        adaptive_weight(jnp.ones(2), jnp.ones(2), high=-1.0)


@pytest.fixture(scope="module")
def problem():
    """A tiny decoder's parameters, latents, images, and a stand-in for the discriminator."""
    rng = np.random.default_rng(0)
    shapes = (4, 8), (8, 6), (6, 5), (7, 4), (7, 5), (5, 2)
    first, second, last, *rest = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return {"first": first, "second": second, "last": last}, *rest


def decode(params, latents):
    return jnp.tanh(jnp.tanh(latents @ params["first"]) @ params["second"]) @ params["last"]


def losses(recon, images, critic):
    return l1(images, recon), generator_loss(jnp.tanh(recon) @ critic)


def step(params, latents, images, critic):
    """Weight and gradient of l1 + weight * adversarial, out of one backward pass."""
    recon, pull_back = jax.vjp(lambda params: decode(params, latents), params)
    cotangents = [jax.grad(lambda recon, i=i: losses(recon, images, critic)[i])(recon) for i in (0, 1)]
    weight = adaptive_weight(*(pull_back(cotangent)[0]["last"] for cotangent in cotangents), high=1e4)
    return weight, pull_back(cotangents[0] + weight * cotangents[1])[0]


def test_one_shared_backward_pass_gives_weight_and_gradient(problem):
    params, latents, *rest = problem
    weight, grads = jax.jit(step)(*problem)
    separate = [jax.grad(lambda p, i=i: losses(decode(p, latents), *rest)[i])(params) for i in (0, 1)]
    norms = [np.linalg.norm(grad["last"]) for grad in separate]
    np.testing.assert_allclose(weight, norms[0] / (norms[1] + 1e-4), rtol=1e-5)
    for name, grad in grads.items():
        reference.check(grad, separate[0][name] + weight * separate[1][name], 1e-5, name)


def test_the_weight_costs_two_gradients_of_the_last_layer(problem):
    def products(function):
        return jax.jit(function).lower(*problem).compile().as_text().count(" dot(")

    def fixed_weight(params, latents, images, critic):
        return jax.grad(lambda p: sum(losses(decode(p, latents), images, critic)))(params)

    assert products(step) - products(fixed_weight) == 2


def test_weight_against_two_torch_backward_passes(problem):
    torch = pytest.importorskip("torch")
    params, latents, images, critic = jax.tree.map(torch.tensor, problem)
    last = params["last"].requires_grad_()
    recon = torch.tanh(torch.tanh(latents @ params["first"]) @ params["second"]) @ last
    terms = (images - recon).abs().mean(), -(torch.tanh(recon) @ critic).mean()
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in terms]
    reference.check(jax.jit(step)(*problem)[0], (norms[0] / (norms[1] + 1e-4)).item(), 1e-5, "adaptive weight")
