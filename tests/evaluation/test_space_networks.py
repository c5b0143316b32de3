"""Networks of the feature spaces: which are asked for, and features that do not depend on the batch."""

import jax
import numpy as np
import pytest
import reference
from feature_networks import small_space

from repae_jax.evaluation import space_networks
from repae_jax.evaluation.space_networks import SpaceNetwork, chosen_spaces, load_space_networks
from repae_jax.models.feature_spaces import FDR6, SPACES, image_features


def test_words_choose_spaces():
    published = {name: SPACES[name].weights for name in FDR6}
    assert chosen_spaces([]) == {}
    assert chosen_spaces(["dinov2"]) == {"dinov2": "facebook/dinov2-large"}
    assert chosen_spaces(["fdr6"]) == published
    assert chosen_spaces(["fdr6", "mae=a=b.pth"]) == {**published, "mae": "a=b.pth"}
    assert chosen_spaces(["mae=mine", "fdr6"]) == {**published, "mae": "mine"}, "the order does not matter"


@pytest.mark.integration
def test_features_of_images_one_by_one(monkeypatch, record_property):
    """Of five images on eight devices, in batches that are filled up; the weights are drawn."""
    small = small_space("siglip2", 32)
    monkeypatch.setitem(space_networks.SPACES, "siglip2", small)
    messages = []
    monkeypatch.setattr(space_networks.logging, "warning", lambda text, *given: messages.append(text % given))
    network = load_space_networks({"siglip2": "random"}, 8)["siglip2"]
    assert messages == ["siglip2 has RANDOM weights: for tests and benchmarks only; its scores mean nothing"]
    assert (network.size, network.batch_size, len(network.checksum)) == (24, 8, 16)
    images = np.random.default_rng(0).integers(0, 256, (13, 40, 40, 3), np.uint8)
    features = network(images)
    assert features.shape == (13, 24) and features.dtype == np.float32
    pixels = np.zeros((1, 32, 32, 3), np.float32)
    params = jax.tree.map(np.asarray, jax.jit(small.module.init)(jax.random.key(0), pixels)["params"])
    expected = np.asarray(jax.jit(lambda x: image_features(small, params, x))(images))
    reference.check(features, expected, 1e-5, "in batches", record_property)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(ValueError, match=r"features are not finite \(SigLIP 2 .*the weights are damaged"):
        SpaceNetwork(small, broken, 8)(images)
