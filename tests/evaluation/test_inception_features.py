"""Inception's features: golden values through the whole path, and parts that are the same however they are made."""

import threading

import jax
import numpy as np
import pytest
import reference
from feature_stub import Noise, StubNetwork
from processes import in_threads

from checkpoints_tools import mapping
from checkpoints_tools.inception import inception_table
from repae_jax import files
from repae_jax.distributed import multihost
from repae_jax.evaluation import inception_features
from repae_jax.evaluation.image_sets import dataset_images
from repae_jax.evaluation.inception_features import FeatureParts, InceptionNetwork, load_network
from repae_jax.models.inception import InceptionV3


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(inception_features, "PART_SIZE", 16)
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def golden():
    return reference.load("inception")


@pytest.fixture(scope="module")
def params(golden):
    gain = golden.meta.get("gain", 1)
    drawn = {name: np.float32(gain) * x if x.ndim >= 2 else x for name, x in golden.weights.items()}
    target = jax.eval_shape(InceptionV3().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    return mapping.to_flax(inception_table(), drawn, target, source="drawn")


@pytest.fixture(scope="module")
def features(golden, params):
    return InceptionNetwork(params, 8)(golden.arrays["images_64"])


@pytest.mark.integration
@pytest.mark.parametrize(("name", "key"), [("pool", "pool_3"), ("spatial", "spatial"), ("logits", "logits_without_bias")])
def test_golden(golden, features, name, key, record_property):
    """Three images on eight devices: the batch is filled up."""
    values = getattr(features, name)
    assert values.dtype == np.float32
    expected = golden.arrays[key].reshape(values.shape)
    reference.check(values, expected, reference.NETWORK_RTOL, name, record_property)


@pytest.mark.slow
def test_devices_and_batches_change_nothing(golden, params, features):
    others = InceptionNetwork(params, 2, jax.devices()[:1])(golden.arrays["images_64"])
    for name in ("pool", "spatial", "logits"):
        reference.check(getattr(others, name), getattr(features, name), 1e-5, name)


@pytest.mark.integration
def test_wrong_images(params):
    network = InceptionNetwork(params, 8)
    with pytest.raises(ValueError, match=r"images are float32 \[2, 8, 8, 3\]; needed: uint8"):
        network(np.full((2, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"uint8 \[2, 8, 8\]"):
        network(np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(ValueError, match="batch_size=9 is not a multiple of the 8 devices"):
        InceptionNetwork(params, 9)


def test_random_weights_are_announced(monkeypatch):
    messages = []
    monkeypatch.setattr(inception_features.logging, "warning", messages.append)
    monkeypatch.setattr(inception_features.jax, "jit", lambda function: function)
    monkeypatch.setattr(InceptionV3, "init", lambda *_: {"params": {"w": np.zeros(3, np.float32)}})
    assert len(load_network("random", 8).checksum) == 16
    assert "RANDOM weights" in messages[0]
    with pytest.raises(FileNotFoundError, match="absent.pth does not exist"):
        load_network("absent.pth")


# ---- parts ----------------------------------------------------------------------------------------------------------

COUNT = 70


def make_parts(folder, network=None, images=None, **options):
    parts = FeatureParts(folder, images or dataset_images(Noise(COUNT), {"data": "noise"}), network or StubNetwork(), **options)
    parts.make("test")
    return parts


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_parts_are_the_features_in_order(tmp_path):
    kept = np.arange(COUNT) % 3 == 0
    parts = make_parts(tmp_path, kept=kept)
    assert len(list(tmp_path.glob("part-*.npz"))) == 5
    source = Noise(COUNT)
    for name in ("pool", "spatial", "logits"):
        values = np.concatenate([getattr(part, name) for part in parts.read()])
        np.testing.assert_array_equal(values, getattr(StubNetwork(COUNT)(source.pixels), name))
    np.testing.assert_array_equal(np.concatenate(list(parts.read_images())), source.pixels[kept])


def test_interrupted_work_continues(tmp_path):
    make_parts(tmp_path / "whole")

    class Interrupted(StubNetwork):
        def __call__(self, images):
            if self.images == 40:
                raise KeyboardInterrupt
            return super().__call__(images)

    with pytest.raises(KeyboardInterrupt):
        make_parts(tmp_path / "cut", Interrupted())
    assert len(list((tmp_path / "cut").glob("part-*.npz"))) == 2
    (tmp_path / "cut" / ".part-00003.npz.1.tmp").write_bytes(b"of a killed process")
    network = StubNetwork()
    make_parts(tmp_path / "cut", network)
    assert network.images == COUNT - 32, "finished parts are not made again"
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_processes_take_turns(tmp_path, monkeypatch):
    make_parts(tmp_path / "one")
    networks, thread = [StubNetwork() for _ in range(3)], threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: thread.process)
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def work(process):
        thread.process = process
        make_parts(tmp_path / "three", networks[process])

    in_threads(work)
    assert [network.images for network in networks] == [32, 22, 16]
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": StubNetwork(4)}, r"'batch_size': \(8, 4\)"),
        ({"images": dataset_images(Noise(COUNT + 1), {"data": "noise"})}, r"'count': \(70, 71\)"),
        ({"images": dataset_images(Noise(COUNT), {"data": "other"})}, "'data': 'noise'.*'data': 'other'"),
        ({"kept": np.ones(COUNT, bool)}, "'kept'"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, change, message):
    make_parts(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"unfinished work with other settings.*{message}.*choose another --out"):
        make_parts(tmp_path, **change)
    assert contents(tmp_path) == before


def test_a_process_that_comes_too_late(tmp_path, monkeypatch):
    """Process 0 has finished and removed everything: there is nothing to wait for."""
    images = dataset_images(Noise(COUNT), {"data": "noise"})
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert FeatureParts(tmp_path / "gone", images, StubNetwork(), is_done=lambda: True).make("test") is False


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(inception_features.files, "npz_writer", lambda _: fail)
    with pytest.raises(OSError, match="part-00000.npz could not be written .*No space left.*make space"):
        make_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
    assert files.read_json(tmp_path / "settings.json")["count"] == COUNT
