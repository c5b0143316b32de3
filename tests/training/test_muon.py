"""Muon: against NumPy, torch.optim.Muon and optax, on one device and on eight, and from a checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import torch
from optim_sections import section

from configs import common
from repae_jax.distributed import sharding
from repae_jax.models.sit import SiT
from repae_jax.models.vtp import VisualTokenizer
from repae_jax.training import muon
from repae_jax.training.checkpoint import Checkpointer
from repae_jax.training.optimizer import make_optimizer
from repae_jax.training.state import create_net

MUON = section(method="muon", learning_rate=0.1, weight_decay=0.3)
TINY_VIT = {"hidden_size": 8, "depth": 1, "heads": 2}
SHAPES = {"query": (3, 16, 16), "fc1": (3, 16, 40), "fc2": (3, 40, 16)}  # layers, in, out


def tree(seed, shapes=SHAPES):
    """Parameters as a SiT has them: a stack of blocks with matrices and biases, and a first layer."""
    rng = np.random.default_rng(seed)
    draw = rng.standard_normal
    blocks = {name: {"kernel": draw(shape), "bias": draw(shape[:2])} for name, shape in shapes.items()}
    whole = {"early_blocks": blocks, "x_embedder": {"kernel": rng.standard_normal((8, 16))}}
    return jax.tree.map(np.float32, whole)


@functools.cache
def taken(method="muon"):
    """Parameters after each of three steps with fixed gradients."""
    tx = make_optimizer(dataclasses.replace(MUON, method=method))
    update, params, state, after = jax.jit(tx.update), tree(0), tx.init(tree(0)), []
    for step in (1, 2, 3):
        updates, state = update(tree(step), state, params)
        params = optax.apply_updates(params, updates)
        after.append(params)
    return after


# ---- parity ---------------------------------------------------------------------------------------------------------


def newton_schulz(matrix):
    """The iteration in float64, matrix by matrix, as Keller Jordan writes it."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / np.sqrt(np.sum(np.square(x)))
    for _ in range(5):
        a = np.matmul(x, x.T)
        x = 3.4445 * x + np.matmul(-4.7750 * a + 2.0315 * np.matmul(a, a), x)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def test_three_steps_by_hand():
    """NumPy in float64, each layer's matrix on its own; measured 2.4e-7, of weights around 1."""
    after = taken()
    for name, shape in SHAPES.items():
        for layer in range(shape[0]):
            w, m = np.float64(tree(0)["early_blocks"][name]["kernel"][layer]), 0.0
            for step, params in enumerate(after, 1):
                g = np.float64(tree(step)["early_blocks"][name]["kernel"][layer])
                m = 0.95 * m + g
                w = w - 0.1 * (0.2 * np.sqrt(max(shape[1:])) * newton_schulz(g + 0.95 * m) + 0.3 * w)
                np.testing.assert_allclose(params["early_blocks"][name]["kernel"][layer], w, atol=5e-6)


@pytest.mark.integration
@pytest.mark.parametrize(("precision", "atol"), [("float32", 5e-6), ("bfloat16", 4e-3)])
def test_three_steps_in_torch(precision, atol, monkeypatch):
    """torch.optim.Muon iterates in bfloat16, so updates, of entries around 0.02, differ by 2.3e-3; in float32 by 7e-7."""
    if precision == "float32":
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    for name in SHAPES:
        w = [torch.nn.Parameter(torch.tensor(layer)) for layer in tree(0)["early_blocks"][name]["kernel"]]
        theirs = torch.optim.Muon(w, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")
        for step, params in enumerate(taken(), 1):
            for layer, grad in zip(w, tree(step)["early_blocks"][name]["kernel"]):
                layer.grad = torch.tensor(grad)
            theirs.step()
            expected = np.stack([layer.detach().numpy() for layer in w])
            np.testing.assert_allclose(params["early_blocks"][name]["kernel"], expected, atol=atol, rtol=0)


def test_the_direction_is_optax_es():
    """The first update, in which momentum and gradient are one: measured 9e-7."""
    stacks = {name: layer["kernel"] for name, layer in tree(1)["early_blocks"].items()}
    numbers = jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(1, 2), stacks)
    tx = optax.contrib.muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=numbers)
    theirs, _ = tx.update(stacks, tx.init(stacks), stacks)
    for name, stack in stacks.items():
        np.testing.assert_allclose(muon.direction(stack), -theirs[name], atol=1e-5)


def test_updates_are_as_large_as_adamws():
    """Moonlight's factor: a root mean square of 0.2 learning rates, whatever the shape, and singular values around one size."""
    for shape in SHAPES.values():
        stack = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(jnp.square(muon.direction(stack)))), 0.2, rtol=0.15)
        values = np.linalg.svd(muon.orthogonalize(stack), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.25
    assert not np.any(muon.orthogonalize(jnp.zeros((2, 4, 4))))


# ---- what is updated by what ----------------------------------------------------------------------------------------


def test_all_but_the_matrices_of_the_blocks_are_adamws():
    ours, adamw = taken(), taken("adamw")
    for a, b in zip(ours, adamw):
        np.testing.assert_array_equal(a["x_embedder"]["kernel"], b["x_embedder"]["kernel"])
        np.testing.assert_array_equal(a["early_blocks"]["fc1"]["bias"], b["early_blocks"]["fc1"]["bias"])
        assert np.abs(a["early_blocks"]["fc1"]["kernel"] - b["early_blocks"]["fc1"]["kernel"]).max() > 1e-3


def test_the_matrices_of_a_published_sit():
    """98 % of SiT-XL/2 with one projector; the rest are embeddings, biases, the first and last layers and the projector."""
    module = SiT(num_classes=1000, latent_channels=4, feature_dims=(768,), **common.sit_fields("XL/2"))
    init = functools.partial(module.init, jax.random.key(0))
    params = jax.eval_shape(init, np.zeros((1, 32, 32, 4)), np.zeros(1), np.zeros(1, np.int32))["params"]
    chosen = small.leaves(muon.is_matrix(params))
    names = {name.partition(".")[2] for name, matrix in chosen.items() if matrix}
    attention = {f"attn.{name}.kernel" for name in ("query", "key", "value", "out")}
    assert names == attention | {"mlp.fc1.kernel", "mlp.fc2.kernel", "adaLN_modulation.kernel"}
    sizes = jax.tree.map(lambda leaf: leaf.size, params)
    share = sum(int(size) for name, size in small.leaves(sizes).items() if chosen[name]) / sum(jax.tree.leaves(sizes))
    assert 0.975 < share < 0.985


def test_the_matrices_of_a_tokenizer():
    """Those of VTP's blocks; a convolutional VAE has none, and is refused in tests/job/test_bad_input.py."""
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in TINY_VIT.items()}
    module = VisualTokenizer(latent_channels=4, patch_size=2, **halves)
    inputs = np.zeros((1, 4, 4, 3)), np.zeros((1, 2, 2, 4))
    params = jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)["params"]
    names = {name for name, matrix in small.leaves(muon.is_matrix(params)).items() if matrix}
    of_block = [*(f"attn.{name}" for name in ("query", "key", "value", "out")), "mlp.gate", "mlp.fc1", "mlp.fc2"]
    assert names == {f"{stack}.{name}.kernel" for stack in ("encoder.vit.blocks", "decoder.blocks") for name in of_block}


def test_a_fixed_stack_stays():
    params = {**tree(0), "late_blocks": tree(5)["early_blocks"]}
    tx = make_optimizer(dataclasses.replace(MUON, fixed=("late_blocks",)))
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["late_blocks"]))
    alone = make_optimizer(MUON)
    expected, _ = jax.jit(alone.update)(tree(0), alone.init(tree(0)), tree(0))
    assert small.differing(updates["early_blocks"], expected["early_blocks"]) == []


# ---- where it runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_eight_devices_compute_what_one_does(fsdp, monkeypatch):
    """Three layers on eight devices; float32 sums in another order, measured 7.6e-8 of the largest entry."""
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    tx, mesh = make_optimizer(MUON), sharding.make_mesh(fsdp)
    net = create_net(tree(0), tx)
    placed = sharding.put(net, sharding.tree_sharding(mesh, net))
    outs = jax.tree.map(lambda leaf: leaf.sharding, placed)

    def step(net, grads):
        updates, opt_state = tx.update(grads, net.opt_state, net.params)
        return net.replace(params=optax.apply_updates(net.params, updates), opt_state=opt_state)

    update = jax.jit(sharding.with_mesh_context(mesh, step), out_shardings=outs)
    for seed in (1, 2):
        placed = update(placed, sharding.put(tree(seed), sharding.tree_sharding(mesh, tree(seed))))
    assert small.largest_error(placed.params, taken()[1]) < 2e-6
    momentum = small.leaves(placed.opt_state)
    kernel = next(name for name in momentum if name.endswith("trace.early_blocks.fc1.kernel"))
    held = jax.tree.leaves(jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.size / leaf.size, placed.opt_state))
    assert (min(held) == 1 / fsdp) and momentum[kernel].any()


def test_each_device_orthogonalizes_its_own_layers(monkeypatch):
    """Three layers on eight devices: one each, or none, and no product of matrices of several devices."""
    shapes = []
    monkeypatch.setattr(muon, "orthogonalize", lambda stack: shapes.append(stack.shape) or stack)
    mesh, stack = sharding.make_mesh(2), tree(1)["early_blocks"]["fc1"]["kernel"]
    run = jax.jit(sharding.with_mesh_context(mesh, muon.direction))
    np.testing.assert_allclose(run(sharding.put(stack, sharding.replicated(mesh))), 0.2 * np.sqrt(40) * stack, rtol=1e-6)
    assert shapes == [(1, 16, 40)]


def test_momentum_comes_back_from_a_checkpoint(tmp_path):
    """The update after restoring is the one without, bit for bit."""
    tx = make_optimizer(MUON)
    net = create_net(tree(0), tx)
    update = jax.jit(tx.update)
    _, state = update(tree(1), net.opt_state, net.params)
    net = jax.tree.map(jnp.asarray, net.replace(opt_state=state))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, net, {}, {})
        checkpointer.wait()
        restored, _, _ = checkpointer.restore(jax.eval_shape(lambda: net), {})
    assert small.differing(restored.opt_state, net.opt_state) == []
    first, second = (update(tree(2), one.opt_state, one.params)[0] for one in (net, restored))
    assert small.differing(first, second) == []
