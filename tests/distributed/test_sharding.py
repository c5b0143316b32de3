"""The mesh, and where arrays lie on it."""

import functools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs import common
from repae_jax.distributed import sharding
from repae_jax.models.sit import SiT

BIG = 2**17


def spec(path, shape, fsdp=8):
    keys = tuple(jax.tree_util.DictKey(name) for name in path.split("/"))
    return sharding.param_spec(keys, shape, fsdp)


def test_the_mesh_has_all_devices():
    for fsdp in (1, 2, 4, 8):
        mesh = sharding.make_mesh(fsdp)
        assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp} and mesh.size == 8
    assert sharding.make_mesh(1, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("fsdp", [0, -1, 3, 16])
def test_fsdp_that_does_not_divide_the_devices(fsdp):
    with pytest.raises(ValueError, match=rf"mesh.fsdp={fsdp} does not divide the 8 devices; allowed: \[1, 2, 4, 8\]"):
        sharding.make_mesh(fsdp)


def stand_ins(*sizes, platform="tpu"):
    """Stand-ins for the devices of slices of these sizes, out of order."""
    slices = [number for number, size in enumerate(sizes) for _ in range(size)]
    devices = [SimpleNamespace(id=i, slice_index=n, platform=platform, device_kind="stand-in") for i, n in enumerate(slices)]
    return devices[1::2] + devices[::2]


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_no_copy_of_the_parameters_is_shared_across_slices(fsdp):
    grid = sharding.slice_grid(fsdp, stand_ins(4, 4, 4, platform="gpu"), 3)  # TPUs need coordinates
    assert grid.shape == (12 // fsdp, fsdp) and len({device.id for device in grid.flat}) == 12
    assert [device.slice_index for device in grid.flat] == 4 * [0] + 4 * [1] + 4 * [2]


@pytest.mark.parametrize(
    ("fsdp", "sizes", "slices", "message"),
    [
        (1, (4, 4), 3, r"mesh.slices=3, but the 8 devices are in 2 slices of \[4, 4\]; allowed: 2"),
        (1, (4, 4), 1, r"mesh.slices=1, but the 8 devices are in 2 slices of \[4, 4\]; allowed: 2"),
        (1, (4, 2), 2, r"mesh.slices=2, but the 6 devices are in 2 slices of \[2, 4\]"),
        (8, (4, 4), 2, r"mesh.fsdp=8 does not divide the 4 devices of a slice; allowed: \[1, 2, 4\]"),
    ],
)
def test_slices_that_are_not_there(fsdp, sizes, slices, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(fsdp, stand_ins(*sizes), slices)


def test_slices_asked_of_devices_that_have_none():
    with pytest.raises(ValueError, match=r"mesh.slices=2, but the 8 devices are in 1 slices"):
        sharding.make_mesh(1, slices=2)


def test_the_first_axis_that_divides_is_sharded():
    assert spec("dense/kernel", (512, 1024)) == P("fsdp", None)
    assert spec("dense/kernel", (1024, 512)) == P("fsdp", None)
    assert spec("dense/kernel", (1023, 512)) == P(None, "fsdp")
    assert spec("conv/kernel", (3, 3, 512, 512)) == P(None, None, "fsdp", None)
    assert spec("dense/kernel", (1023, 511)) == P()


def test_small_arrays_and_fsdp_1_are_replicated():
    assert spec("dense/kernel", (8, 2**13 - 1)) == P()
    assert spec("dense/kernel", (8, 2**13)) == P("fsdp", None)
    assert spec("dense/kernel", (1024, 1024), fsdp=1) == P()
    assert spec("step", ()) == P()


@pytest.mark.parametrize("stack", sharding.STACKS)
def test_a_scanned_layer_axis_is_never_sharded(stack):
    assert spec(f"{stack}/kernel", (8000, 16, 9)) == P(None, "fsdp", None)
    assert spec(f"{stack}/kernel", (8 * BIG, 3)) == P()  # only the layers would divide


@pytest.mark.parametrize("fsdp", [2, 4, 8])
def test_published_networks_are_sharded_almost_whole(fsdp):
    """SiT-XL/2 with optimizer-like wrapping: a device holds 1 / fsdp, and no layer axis is cut."""
    module = SiT(num_classes=1000, latent_channels=4, feature_dims=(768,), **common.sit_fields("XL/2"))
    init = functools.partial(module.init, jax.random.key(0))
    params = jax.eval_shape(init, np.zeros((1, 32, 32, 4)), np.zeros(1), np.zeros(1, np.int32))
    shardings = sharding.tree_sharding(sharding.make_mesh(fsdp), {"opt_state": ({"mu": params},), "params": params})
    held = total = 0
    for path, place in jax.tree_util.tree_flatten_with_path(shardings)[0]:
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        if "blocks" in names and place.spec:
            assert place.spec[0] is None, names
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(shardings["params"])):
        total += leaf.size
        held += math.prod(place.shard_shape(leaf.shape))
    assert held < 1.01 * total / fsdp


def test_optimizer_state_lies_where_its_parameters_lie():
    params = {"early_blocks": {"kernel": np.zeros((8, 256, 512))}, "head": {"kernel": np.zeros((512, 256))}}
    mesh = sharding.make_mesh(8)
    wrapped = sharding.tree_sharding(mesh, [{"mu": params, "nu": params, "count": np.zeros(())}])[0]
    assert wrapped["mu"] == wrapped["nu"] == sharding.tree_sharding(mesh, params)
    assert wrapped["count"].spec == P()


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_the_batch_is_split_over_all_devices(fsdp):
    batch = {"image": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3), "label": np.arange(16, dtype=np.int32)}
    placed = sharding.put_batch(sharding.make_mesh(fsdp), batch)
    for name, array in placed.items():
        assert array.dtype == batch[name].dtype
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [2] * 8
        np.testing.assert_array_equal(array, batch[name])
    np.testing.assert_array_equal(placed["label"].addressable_shards[3].data, [6, 7])


@pytest.mark.parametrize("fsdp", [1, 2])
def test_each_device_computes_its_own_rows(fsdp):
    mesh, shapes, x = sharding.make_mesh(fsdp), [], np.arange(16 * 3, dtype=np.float32).reshape(16, 3)

    def double(rows):
        shapes.append(rows.shape)
        return 2 * rows

    def of_each(x):
        return sharding.of_each_device(double, x)

    np.testing.assert_array_equal(of_each(x), 2 * x)
    apart = jax.jit(sharding.with_mesh_context(mesh, of_each))(sharding.put_batch(mesh, x))
    np.testing.assert_array_equal(apart, 2 * x)
    assert shapes == [(16, 3), (2, 3)]
    assert apart.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)


def test_rows_that_the_devices_do_not_divide_are_computed_together():
    """Pictures during training may be 25 on eight devices."""
    mesh, x = sharding.make_mesh(1), np.arange(25 * 3.0, dtype=np.float32).reshape(25, 3)
    together = jax.jit(sharding.with_mesh_context(mesh, lambda x: sharding.of_each_device(lambda rows: 2 * rows, x)))
    np.testing.assert_array_equal(together(x), 2 * x)


@pytest.mark.parametrize(("layers", "share"), [(3, 1), (8, 1), (20, 3)])
def test_each_device_computes_whole_layers(layers, share):
    mesh, shapes, x = sharding.make_mesh(2), [], np.arange(layers * 6, dtype=np.float32).reshape(layers, 2, 3)

    def double(stack):
        shapes.append(stack.shape)
        return 2 * stack

    np.testing.assert_array_equal(sharding.of_each_layer(double, x), 2 * x)
    apart = jax.jit(sharding.with_mesh_context(mesh, lambda x: sharding.of_each_layer(double, x)))
    np.testing.assert_array_equal(apart(sharding.put(x, sharding.replicated(mesh))), 2 * x)
    assert shapes == [(layers, 2, 3), (share, 2, 3)]


def test_batches_that_do_not_divide():
    mesh = sharding.make_mesh(2)
    sharding.check_batch(32, 2, mesh)
    with pytest.raises(ValueError, match="data.batch_size=20 .* 8 devices x 1 micro-batches: use a multiple of 8"):
        sharding.check_batch(20, 1, mesh)
    with pytest.raises(ValueError, match="batch_size=8 is not divisible by 8 devices x 2 micro-batches: use a multiple of 16"):
        sharding.check_batch(8, 2, mesh)
