"""Saving, restoring, refusing and surviving damaged checkpoints."""

import errno
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from flax import struct

from repae_jax import faults
from repae_jax.distributed import multihost
from repae_jax.training import checkpoint, checkpoint_files
from repae_jax.training.workdir import prepare_workdir

CONFIG = {"job": "repae", "steps": 10, "sit": {"depth": 2, "shape": (4, 4)}, "data": {"batch": 8, "workers": 2}}


@struct.dataclass
class Net:
    params: Any
    opt_state: Any


@struct.dataclass
class TrainState:
    step: Any
    vae: Any
    disc: Any
    sit: Any
    ema: Any
    counters: Any


def on_devices(count):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]), ("data",))

    def place(leaf):
        split = leaf.ndim > 0 and leaf.shape[0] % count == 0
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(["data"] if split else [])))

    return place


def make_state(step=3, devices=8, width=512):
    tx = optax.adamw(1e-3)

    def net(seed):
        # 512 floats per row: above the size that the storage inlines, so that values lie in files of their own.
        params = {
            "kernel": jax.random.normal(jax.random.key(seed), (8, width)),
            "scale": jnp.arange(8, dtype=jnp.bfloat16),
        }
        return Net(params=params, opt_state=tx.init(params))

    state = TrainState(
        step=jnp.int32(step),
        vae=net(step),
        disc=None,
        sit=net(step + 100),
        ema={"kernel": jax.random.normal(jax.random.key(step + 7), (8, width))},
        counters={"images": jnp.uint32(4_000_000_000), "seen": jnp.array([True, False])},
    )
    place = on_devices(devices)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf)), state)


def abstract_of(state, devices=8):
    place = on_devices(devices)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state)


def assert_bitwise(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save_steps(workdir, steps, **options):
    with checkpoint.Checkpointer(workdir, **options) as checkpointer:
        for step in steps:
            assert checkpointer.save(step, make_state(step), {"position": step}, CONFIG)
        return checkpointer


def restore(workdir, state=None, config=CONFIG, devices=8):
    state = make_state() if state is None else state
    with checkpoint.Checkpointer(workdir) as checkpointer:
        return checkpointer.restore(abstract_of(state, devices), config)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 1 and 2, never changed by a test."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, [1, 2])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    """A copy of `saved` that a test may damage."""
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def errors(monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "error", lambda text, *args: messages.append(text % args))
    return messages


# -- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_names_that_checkpoints_can_be_saved_under(tmp_path, monkeypatch):
    """All others: what they hold is restored, and nothing is left of what is removed."""
    monkeypatch.chdir(tmp_path)
    state = {"kernel": jnp.ones((8, 512))}
    names = [" sp ace ", "ünï-日本", "e\u0301", "%41%2F", "a#b&c=d;e", "(lr=1e-4)", "{a,b}", "a]", "'\"$`!|<>^~", "a:b,c+d@e"]
    names += ["a\nb\tc", "-dash", "~", ".hidden", "1", "checkpoints", "1.orbax-checkpoint-tmp", "x" * 255, "file:x"]
    names += ["../up", "there/../y", "./dot//twice/"]
    for name in [*names, "/".join(["x" * 200] * 18)]:
        workdir = prepare_workdir(tmp_path.name if name == "~" else name)
        with checkpoint.Checkpointer(workdir, keep_last=1) as checkpointer:
            for step in (1, 2):
                checkpointer.save(step, state, {"position": step}, CONFIG)
            checkpointer.read_back(2, state)
            restored, position, step = checkpointer.restore(jax.eval_shape(lambda: state), CONFIG)
        assert_bitwise(restored, state)
        assert (position, step) == ({"position": 2}, 2), name
        assert [path.name for path in (Path(workdir) / "checkpoints").iterdir()] == ["2"], name


def test_keeps_the_newest_and_every_nth(tmp_path):
    save_steps(tmp_path, range(1, 8), keep_last=2, keep_every=3)
    with checkpoint.Checkpointer(tmp_path, keep_last=2, keep_every=3) as checkpointer:
        assert checkpointer.steps() == [3, 6, 7]
        assert checkpointer.steps()[-1] == 7


@pytest.mark.parametrize("options", [{"keep_last": 0}, {"keep_every": 0}])
def test_refuses_keeping_nothing(tmp_path, options):
    with pytest.raises(ValueError, match="must be positive"):
        checkpoint.Checkpointer(tmp_path, **options)


def test_saving_a_step_again_is_a_no_op(workdir):
    with checkpoint.Checkpointer(workdir) as checkpointer:
        assert not checkpointer.save(2, make_state(9), {"position": 9}, CONFIG)
        assert checkpointer.save(3, make_state(3), {"position": 3}, CONFIG)
        assert not checkpointer.save(3, make_state(9), {"position": 9}, CONFIG)  # while it may still be being written
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2, 3]
    state, data_state, step = restore(workdir)
    assert (data_state, step) == ({"position": 3}, 3)
    assert_bitwise(state, make_state(3))


def test_saving_an_older_step_is_an_error(workdir):
    with checkpoint.Checkpointer(workdir) as checkpointer, pytest.raises(ValueError, match="already holds step 2"):
        checkpointer.save(0, make_state(0), {}, CONFIG)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_full_disk_is_told_in_one_line(tmp_path):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("this container may not mount disks")
    state = {"kernel": jax.random.normal(jax.random.key(0), (64, 1024))}
    try:
        with pytest.raises(OSError, match="could not be saved .*(No space|EXHAUSTED).*the same command continues") as error:  # noqa: SIM117
            with checkpoint.Checkpointer(tmp_path / "run", keep_last=9) as checkpointer:
                for step in (1, 2, 3):
                    checkpointer.save(step, state, {}, CONFIG)
        assert error.value.errno == errno.ENOSPC and checkpoint.saved_steps(tmp_path / "run") == [1]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_state_may_be_donated_right_after_save(tmp_path):
    overwrite = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 0, state), donate_argnums=0)
    state = {"kernel": jnp.full((8, 1024, 1024), 3.0)}  # large enough to be still in flight
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, CONFIG)
        jax.block_until_ready(overwrite(state))  # in place, unless the CPU's runtime happens to hold the buffer elsewhere
        checkpointer.wait()
        restored, _, _ = checkpointer.restore({"kernel": jax.ShapeDtypeStruct((8, 1024, 1024), jnp.float32)}, CONFIG)
    assert np.all(np.asarray(restored["kernel"]) == 3.0)


def test_saving_compiles_the_checksums_alone(tmp_path, caplog):
    """No program is compiled that slices what all devices have, for each shape and device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    state = {"kernel": jax.device_put(np.ones((48, 80), np.float32), jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))}
    jax.clear_caches()
    with jax.log_compiles(), checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, {}, CONFIG)
    compiled = [record.args[0] for record in caplog.records if record.msg.startswith("Compiling")]
    assert compiled == ["jit(_sums_and_finite)"]


def test_the_first_checkpoint_is_read_back(workdir, tmp_path):
    state = make_state(3)
    with checkpoint.Checkpointer(workdir) as checkpointer:
        checkpointer.save(3, state, {"position": 3}, CONFIG)
        checkpointer.read_back(3, state)
        with pytest.raises(checkpoint.CheckpointLost, match="another checksum than when they were saved: .*step"):
            checkpointer.read_back(3, make_state(4))
        with pytest.raises(checkpoint.CheckpointLost, match="list of arrays"):
            checkpointer.read_back(3, state.replace(ema=None))


def test_a_checkpoint_that_a_library_loses_is_noticed(tmp_path):
    """The name of the folder is taken for a pattern, since nobody refuses it here."""
    state = make_state(3)
    with checkpoint.Checkpointer(tmp_path / "[lr=1e-4]") as checkpointer:
        checkpointer.save(3, state, {}, CONFIG)
        with pytest.raises(checkpoint.CheckpointLost, match=r"checkpoints/3' was saved, but cannot be read back \(.*NOT_FOUND"):
            checkpointer.read_back(3, state)


def test_what_is_not_finite_is_not_saved(workdir):
    """All that is kept is finite. Every array of the state counts, even while losses and gradients are finite."""
    good, places = make_state(3), ["vae.params.kernel", "sit.opt_state.0.nu.scale", "ema.kernel"]
    named = checkpoint_files.named_leaves(good)
    bad = jax.tree.unflatten(jax.tree.structure(good), [leaf * np.inf if name in places else leaf for name, leaf in named])
    with checkpoint.Checkpointer(workdir, keep_last=1) as checkpointer:
        with pytest.raises(checkpoint.StateNotFinite, match=rf"step 3 3 of the state's {len(named)} arrays") as error:
            checkpointer.save(3, bad, {}, CONFIG)
        assert all(place in str(error.value) for place in [*places, "the newest checkpoint, of step 2, is finite"])
        assert checkpointer.steps() == [1, 2]
    message = "none was saved. An update of finite"
    with checkpoint.Checkpointer(workdir / "new") as new, pytest.raises(checkpoint.StateNotFinite, match=message):
        new.save(3, bad, {}, CONFIG)


# -- restoring --------------------------------------------------------------------------------------------------------


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path) is None


@pytest.mark.parametrize("before, after", [(8, 8), (8, 1), (1, 8), (2, 4)])
def test_restores_bitwise_onto_other_devices(tmp_path, before, after):
    state = make_state(5, devices=before)
    with checkpoint.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, {"position": 5, "nested": {"seed": [1, 2]}}, CONFIG)
    restored, data_state, step = restore(tmp_path, devices=after)
    assert (data_state, step) == ({"position": 5, "nested": {"seed": [1, 2]}}, 5)
    assert_bitwise(restored, state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract_of(state, after)), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


def test_fields_that_may_change_on_resume(workdir):
    config = CONFIG | {"steps": 99, "sit": {"depth": 2, "shape": [4, 4]}, "data": {"batch": 8, "workers": 0}}
    assert restore(workdir, config=config | {"hooks": {"fid": 5}, "mesh": {"data": 8}}) is not None


def test_another_run_is_refused_naming_every_field(workdir):
    config = {"job": "ldm", "steps": 10, "sit": {"depth": 4}, "data": CONFIG["data"], "stepsize": 1}
    with pytest.raises(ValueError, match="another workdir, or restore the values") as error:
        restore(workdir, config=config)
    for line in [
        "job: stored 'repae', given 'ldm'",
        "sit.depth: stored 2, given 4",
        "sit.shape: stored [4, 4], given '<absent>'",
        "stepsize: stored '<absent>', given 1",
    ]:
        assert line in str(error.value)
    assert "workers" not in str(error.value)


def test_another_tree_is_an_error_and_not_damage(workdir, errors):
    state = make_state()
    narrow = make_state(width=16)
    wrong = state.replace(vae=narrow.vae, ema=None, counters=state.counters | {"new": jnp.int32(0)})
    wrong = wrong.replace(step=jnp.float32(0))
    with pytest.raises(ValueError, match="not those of this state") as error:
        restore(workdir, wrong)
    for line in [
        "counters.new: not in the checkpoint",
        "ema.kernel: in the checkpoint, not in the state",
        "step: stored int32[], expected float32[]",
        "vae.params.kernel: stored float32[8, 512], expected float32[8, 16]",
        "vae.opt_state.0.mu.kernel: stored float32[8, 512], expected float32[8, 16]",
    ]:
        assert line in str(error.value)
    assert not errors and not (workdir / "checkpoints_damaged").exists()


# -- damage -----------------------------------------------------------------------------------------------------------


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"{nonsense")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


DAMAGES = [halve, empty, garble, flip, Path.unlink]


def files_of(workdir, step=2):
    directory = workdir / "checkpoints" / str(step)
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_no_damaged_file_ever_changes_what_is_restored(saved, tmp_path, damage, errors):
    """Every single file: the checkpoint is either refused, or the file is one that restoring does not need."""
    intact = {1: make_state(1), 2: make_state(2)}
    used_anyway = []
    for number, name in enumerate(files_of(saved)):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        damage(workdir / "checkpoints" / "2" / name)
        errors.clear()
        state, data_state, step = restore(workdir)
        assert_bitwise(state, intact[step])
        assert data_state == {"position": step}
        if step == 2:
            used_anyway.append(name)
            continue
        assert len(errors) == 1 and str(workdir / "checkpoints" / "2") in errors[0]
        assert (workdir / "checkpoints_damaged" / "2-0").is_dir()
    sizes = {name: (saved / "checkpoints" / "2" / name).stat().st_size for name in files_of(saved)}
    for name in used_anyway:  # markers, the shardings at saving time, and what was written early and replaced later
        assert name.name in ("_CHECKPOINT_METADATA", "commit_success.txt", "_sharding") or (
            "ocdbt.process_0" in name.parts and sizes[name] < max(sizes.values())
        )


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_array_values_are_detected(workdir, damage, errors):
    directory = workdir / "checkpoints" / "2" / "state"
    damage(max(directory.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0))
    assert restore(workdir)[2] == 1
    assert len(errors) == 1


def test_no_changed_digit_is_taken_as_true(workdir):
    """One digit is changed in each JSON part, and in Orbax's list of the arrays, where some do not matter."""
    readers = {"config": checkpoint.read_config, "data": checkpoint.read_data_state}
    for item, read in readers.items():
        file = workdir / "checkpoints" / "2" / item / "metadata"
        intact = file.read_text()
        for place in [digit.start() for digit in re.finditer(r"\d", intact)]:
            file.write_text(intact[:place] + str((int(intact[place]) + 1) % 10) + intact[place + 1 :])
            with pytest.raises(ValueError, match=f"is damaged .*{item} has another checksum than when it was saved"):
                read(workdir)
        file.write_text(intact)
        read(workdir)
    file, expected = workdir / "checkpoints" / "2" / "state" / "_METADATA", checkpoint.stored_shapes(workdir)
    intact, refused = file.read_text(), 0
    for place in [digit.start() for digit in re.finditer(r"\d", intact)]:
        file.write_text(intact[:place] + str((int(intact[place]) + 1) % 10) + intact[place + 1 :])
        try:
            assert checkpoint.stored_shapes(workdir) == expected
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert refused


def test_checkpoints_without_checksums_of_their_json_parts(workdir, errors):
    """They are not damaged."""
    file = workdir / "checkpoints" / "2" / "checksums" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text())["arrays"]))
    for read in (checkpoint.read_config, restore):
        with pytest.raises(ValueError, match="checkpoints/2' was saved by an older version of this code, without checksums"):
            read(workdir)
    assert not errors and not (workdir / "checkpoints_damaged").exists()


@pytest.mark.parametrize("item", ["state", "data", "config", "checksums", "."])
def test_missing_directory_is_damage(workdir, item, errors):
    shutil.rmtree(workdir / "checkpoints" / "2" / item)
    if item == ".":
        (workdir / "checkpoints" / "2").mkdir(exist_ok=True)
    assert restore(workdir)[2] == 1
    assert "is damaged" in errors[0]


@pytest.mark.parametrize("item", ["data", "checksums"])
def test_a_disk_that_fails_is_no_damage(workdir, item, errors, warnings, monkeypatch):
    """Reading it fails as from a broken disk: nothing is moved, and no step is repeated."""
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    file = workdir / "checkpoints" / "2" / item / "metadata"
    file.unlink()
    file.symlink_to("/proc/self/mem")  # EIO at its beginning
    with pytest.raises(OSError, match="checkpoints/2' cannot be read, tried 3 times .*put back a copy") as error:
        restore(workdir)
    assert error.value.errno == errno.EIO and len(warnings) == 2
    assert not errors and not (workdir / "checkpoints_damaged").exists()


def test_arrays_that_the_system_cannot_read_are_no_damage(workdir, errors, warnings, monkeypatch):
    """Too many open files; the second attempt ends well."""
    monkeypatch.setattr(faults, "_PAUSES", (0, 0))
    limits, read = resource.getrlimit(resource.RLIMIT_NOFILE), checkpoint_files._restore

    def restore_at_the_limit(*arguments):
        if not warnings:
            resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            return read(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    monkeypatch.setattr(checkpoint_files, "_restore", restore_at_the_limit)
    assert restore(workdir)[2] == 2
    assert len(warnings) == 1 and "trying again" in warnings[0] and not errors


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not read")
@pytest.mark.parametrize("item", ["checkpoints/2/state", "checkpoints/2/config", "."])
def test_what_may_not_be_read_is_no_damage(workdir, item, errors, monkeypatch):
    monkeypatch.setattr(multihost, "SEEN_SECONDS", 0)
    with checkpoint.Checkpointer(workdir) as checkpointer:
        modes = {folder: folder.stat().st_mode for folder in (workdir, *workdir.parents)}
        try:
            for folder in modes:
                folder.chmod(0o755)
            (workdir / item).chmod(0o700)
            os.seteuid(65534)
            with pytest.raises(PermissionError, match=str(workdir)):
                checkpointer.restore(abstract_of(make_state()), CONFIG)
        finally:
            os.seteuid(0)
            for folder, mode in modes.items():
                folder.chmod(mode)
    assert not errors and not (workdir / "checkpoints_damaged").exists()


def test_damaged_step_is_saved_again_and_may_be_damaged_again(workdir, errors):
    for count in range(2):
        empty(workdir / "checkpoints" / "2" / "config" / "metadata")
        with checkpoint.Checkpointer(workdir) as checkpointer:
            assert checkpointer.restore(abstract_of(make_state()), CONFIG)[2] == 1
            assert checkpointer.steps() == [1]
            assert checkpointer.save(2, make_state(2), {"position": 2}, CONFIG)
        assert f"2-{count}" in errors[-1] and "JSONDecodeError" in errors[-1]
    assert sorted(path.name for path in (workdir / "checkpoints_damaged").iterdir()) == ["2-0", "2-1"]
    assert_bitwise(restore(workdir)[0], make_state(2))


@pytest.mark.parametrize("name", ["2 (copy)", "2-hf", "0000003", "best", "step_2", "3.bak"])
def test_copies_with_other_names_are_no_checkpoints(workdir, name, errors):
    """They are neither read nor removed."""
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / name)
    assert checkpoint.saved_steps(workdir) == [1, 2] and checkpoint.read_data_state(workdir) == {"position": 2}
    with checkpoint.Checkpointer(workdir, keep_last=1) as checkpointer:
        assert checkpointer.restore(abstract_of(make_state()), CONFIG)[2] == 2
        assert checkpointer.save(3, make_state(3), {"position": 3}, CONFIG)
    left = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert left == {"3", name} and not errors


def test_a_checkpoint_with_the_name_of_another_step_is_not_taken_for_it(workdir, errors):
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "7")
    with pytest.raises(ValueError, match="checkpoints/7' is damaged .*it is of another step than its name says"):
        checkpoint.read_config(workdir)
    assert restore(workdir)[2] == 2
    assert len(errors) == 1 and (workdir / "checkpoints_damaged" / "7-0").is_dir()


def test_never_starts_from_scratch_over_unreadable_checkpoints(workdir):
    for step in "12":
        empty(workdir / "checkpoints" / step / "data" / "metadata")
    with pytest.raises(ValueError, match="none of the checkpoints") as error:
        restore(workdir)
    assert "checkpoints/1: JSONDecodeError" in str(error.value) and "checkpoints/2: JSON" in str(error.value)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]  # nothing was moved


def test_leftovers_of_an_interrupted_save_are_ignored(workdir):
    source = workdir / "checkpoints" / "2"
    for name in ["3.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-123"]:
        shutil.copytree(source / "state", workdir / "checkpoints" / name / "state.orbax-checkpoint-tmp")
    with checkpoint.Checkpointer(workdir) as checkpointer:
        assert checkpointer.restore(abstract_of(make_state()), CONFIG)[2] == 2
        for step in (3, 4):
            assert checkpointer.save(step, make_state(step), {"position": step}, CONFIG)
    assert_bitwise(restore(workdir)[0], make_state(4))


def test_only_leftovers_means_nothing_was_completed(tmp_path):
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert restore(tmp_path) is None


TWO_PROCESSES = textwrap.dedent("""
    import pathlib
    import sys
    import jax
    import numpy as np
    from repae_jax.training import checkpoint
    from repae_jax.training.workdir import prepare_workdir

    rank, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize("localhost:" + port, 2, rank)
    sharding = jax.sharding.NamedSharding(jax.make_mesh((2,), ("data",)), jax.sharding.PartitionSpec("data"))
    abstract = {"kernel": jax.ShapeDtypeStruct((8, 512), np.float32, sharding=sharding)}

    def values(step):
        return np.random.default_rng(step).normal(size=(8, 512)).astype(np.float32)

    def state(step):
        return {"kernel": jax.make_array_from_callback((8, 512), sharding, lambda index: values(step)[index])}

    with checkpoint.Checkpointer(prepare_workdir(workdir)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, state(step), {"position": step}, {})
        checkpointer.wait()
        if rank == 1:
            written = pathlib.Path(workdir, "checkpoints", "2", "state", "ocdbt.process_1", "d").iterdir()
            largest = max(written, key=lambda path: path.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:100])
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        restored, data_state, step = checkpointer.restore(abstract, {})
        assert (data_state, step) == ({"position": 1}, 1)
        for shard in restored["kernel"].addressable_shards:
            np.testing.assert_array_equal(shard.data, values(1)[shard.index])
        assert checkpointer.save(2, state(2), {"position": 2}, {})
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
""")


@pytest.mark.integration
def test_all_processes_fall_back_together(tmp_path):
    """Only the second process reads the damaged file; the first must not go on with the newest checkpoint, or hang."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = str(listener.getsockname()[1])
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    root = Path(checkpoint.__file__).parents[1]
    logs = [tmp_path / f"process-{rank}.log" for rank in (0, 1)]  # files: a full pipe would block the other process
    processes = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-c", TWO_PROCESSES, str(rank), port, str(tmp_path)]
            with log.open("w") as stderr:
                processes.append(subprocess.Popen(command, env=environment, cwd=root, stderr=stderr))
        for process in processes:
            process.wait(timeout=60)
    finally:
        for process in processes:
            process.kill()
    messages = [log.read_text() for log in logs]
    for process, message in zip(processes, messages, strict=True):
        assert process.returncode == 0, message
        assert "is damaged" in message
    assert "unreadable in another process" in messages[0]
    assert (tmp_path / "checkpoints_damaged" / "2-0").is_dir()


# -- parts ------------------------------------------------------------------------------------------------------------


def test_read_config(saved):
    stored = checkpoint.read_config(saved)
    assert stored == CONFIG | {"sit": {"depth": 2, "shape": [4, 4]}}
    assert checkpoint.read_config(saved, step=1) == stored


def abstract_subset(state):
    subset = {"ema": state.ema, "vae": {"params": state.vae.params}}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), subset)


@pytest.mark.parametrize("step", [None, 1])
def test_restore_subset(saved, step):
    expected = make_state(step or 2)
    subset, restored_step = checkpoint.restore_subset(saved, abstract_subset(expected), step)
    assert restored_step == (step or 2)
    assert_bitwise(subset, {"ema": expected.ema, "vae": {"params": expected.vae.params}})
    assert all(leaf.sharding.device_set == {jax.devices()[0]} for leaf in jax.tree.leaves(subset))


def test_restore_subset_onto_a_sharding(saved):
    subset, _ = checkpoint.restore_subset(saved, {"ema": abstract_of(make_state()).ema})
    assert len(subset["ema"]["kernel"].sharding.device_set) == 8


def test_restore_subset_names_what_is_missing(saved):
    abstract = abstract_subset(make_state()) | {"disc": {"params": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    with pytest.raises(ValueError, match=r"disc.params.bias: not in the checkpoint"):
        checkpoint.restore_subset(saved, abstract)


@pytest.mark.parametrize("read", [checkpoint.read_config, lambda *args: checkpoint.restore_subset(args[0], {}, args[1])])
def test_parts_of_absent_checkpoints(saved, tmp_path, read):
    with pytest.raises(ValueError, match=f"no checkpoints in '{tmp_path}/checkpoints'"):
        read(tmp_path, None)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7 .* steps present: \[1, 2\]"):
        read(saved, 7)
    assert not (tmp_path / "checkpoints").exists()


def test_parts_of_damaged_checkpoints(workdir):
    abstract = abstract_subset(make_state())
    empty(workdir / "checkpoints" / "2" / "config" / "metadata")
    with pytest.raises(ValueError, match="is damaged .JSONDecodeError"):
        checkpoint.read_config(workdir)
    empty(workdir / "checkpoints" / "2" / "checksums" / "metadata")
    with pytest.raises(ValueError, match="is damaged .JSONDecodeError"):
        checkpoint.restore_subset(workdir, abstract)
    empty(workdir / "checkpoints" / "2" / "state" / "_METADATA")
    with pytest.raises(ValueError, match="is damaged .JSONDecodeError"):
        checkpoint.restore_subset(workdir, abstract)
    assert checkpoint.restore_subset(workdir, abstract, step=1)[1] == 1
