"""Muon: momentum whose singular values are all set to about 1, for the matrices of a transformer's blocks.

For a matrix W [in, out] with gradient G, momentum M, learning rate r and weight decay d, one update is

    M <- 0.95 M + G,   O = NewtonSchulz(G + 0.95 M) ~ U V^T of the SVD U S V^T,   W <- W - r (0.2 sqrt(max(in, out)) O + d W).

The update is Keller Jordan's (kellerjordan.github.io/posts/muon). The factor 0.2 sqrt(max(in, out)) is Moonlight's (arXiv
2502.16982, equation 4): the update's root mean square is then AdamW's, whose learning rate and weight decay can be kept. UNITE
(arXiv 2603.22283), which trains a tokenizer and a flow together, uses the same two.

optax.contrib.muon is not used: what it leaves to Adam gets Nesterov's momentum and the same eps, its first updates weigh
gradient and momentum in another way than the sources, and on several devices each of them would iterate on all matrices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from repae_jax.distributed import sharding

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic; values of both sources
ITERATIONS = 5
RMS = 0.2  # root mean square of an update, in learning rates
EPS = 1e-7


def is_matrix(params: Any) -> Any:
    """Returns a tree of bools: True for the stacked matrices of scanned blocks, which Muon updates.

    Those are of attention, the MLPs and adaLN, where UNITE uses Muon, too. Embeddings, biases, norms, the first and the last
    layer are AdamW's in all sources; the projectors and the embedding of t, whose matrices end and begin outside of the blocks,
    are so here.
    """

    def of_leaf(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return names[-1] == "kernel" and leaf.ndim == 3 and not set(sharding.STACKS).isdisjoint(names)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def muon(learning_rate: optax.ScalarOrSchedule, weight_decay: float) -> optax.GradientTransformation:
    """Returns Muon for a tree of stacks of matrices [layers, in, out]; see the module's docstring."""
    return optax.chain(
        optax.trace(MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(direction, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def direction(momentum: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """Returns the orthogonalized matrices of a stack, with a root mean square of about RMS; devices share out the layers."""
    with jax.named_scope("Muon"):
        return RMS * max(momentum.shape[1:]) ** 0.5 * sharding.of_each_layer(orthogonalize, momentum)


def orthogonalize(stack: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """Returns U S' V^T, with S' between 0.68 and 1.2, of each matrix U S V^T of a stack; a zero matrix stays zero.

    Five iterations x <- a x + (b A + c A^2) x with A = x x^T, from x divided by its Frobenius norm. Singular values below 0.002
    of that norm come out smaller.
    """
    is_tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if is_tall else stack  # the products x x^T are of the shorter side
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(1, 2), keepdims=True), EPS)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
