import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from checkpoints_tools import vit, weights
from launch import pictures as picture_sets
from launch import small_networks
from launch.small_networks import Recipe
from repae_jax.models import encoders

TINY = {"patch_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 2}


def few(recipes, steps):
    return dataclasses.replace(recipes["digits"], steps=steps)


TWO_STEPS, FORTY_STEPS = few(small_networks.ENCODER_RECIPES, 2), few(small_networks.CLASSIFIER_RECIPES, 40)


@pytest.fixture(scope="module")
def digits():
    return picture_sets.digits(16)


@pytest.fixture(scope="module")
def pixels(digits):
    return digits.test.images[:20]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The folder of an encoder, and what was saved there: module and parameters."""
    folder, saved = tmp_path_factory.mktemp("models") / "new" / "encoder", []

    def save_encoder(folder, module, params, **options):
        saved.extend((module, params))
        vit.save_encoder(folder, module, params, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_networks, "save_encoder", save_encoder)
        record = small_networks.train_encoder(folder, digits, recipe=TWO_STEPS)
    assert 0 <= record["accuracy"] == record["target_accuracy"] <= 1 and record["steps"] == 2
    assert record["probe_accuracy"] == record["probe_target_accuracy"] > 0.3  # of nearly random features; chance is 0.1
    assert json.loads((folder / "training.json").read_text()) == record
    return folder, *saved


@pytest.fixture(scope="module")
def classifier_path(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "new" / "classifier.safetensors"
    assert small_networks.train_classifier(path, digits, recipe=FORTY_STEPS)["accuracy"] > 0.5
    return path


@pytest.fixture(scope="module")
def halves():
    """Noisy pictures: red or blue, which is the label, in the upper half (targets 0 and 1) or the lower (2 and 3)."""
    rng = np.random.default_rng(0)

    def split(count):
        targets = np.arange(count, dtype=np.int32) % 4
        pixels = rng.integers(0, 32, (count, 32, 32, 3), np.uint8)
        for image, target in zip(pixels, targets):
            image[16 * (target // 2) :][:16, :, 2 * (target % 2)] += 200
        return picture_sets.Split(pixels, targets % 2, targets)

    of_target = np.array([0, 1, 0, 1], np.int32)
    classes, targets = ("red", "blue"), ("upper red", "upper blue", "lower red", "lower blue")
    return picture_sets.Pictures("emoji", split(64), split(24), classes, targets, of_target, edges="nearest", mirrored=True)


@pytest.mark.integration
def test_loaded_encoder_gives_the_trained_tokens(trained, pixels):
    folder, module, params = trained
    encoder, loaded = vit.load_encoder(folder, resolution=16, image_size=16)
    assert encoder.module == module and encoder.grid == 4
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = encoders.encode(encoder, loaded, jnp.asarray(pixels))
    assert tokens.shape == (20, 16, 64)
    _, expected = module.apply({"params": params}, encoders.preprocess(encoder, jnp.asarray(pixels)))
    np.testing.assert_array_equal(tokens, expected)


@pytest.mark.integration
def test_loaded_classifier(classifier_path, pixels):
    classify = small_networks.load_classifier(classifier_path)
    features, logits = classify(pixels)
    assert features.shape == (20, 64) and logits.shape == (20, 10) and features.dtype == logits.dtype == np.float32
    params = weights.read_state_dict(classifier_path)
    np.testing.assert_allclose(logits, features @ params["head.kernel"] + params["head.bias"], rtol=1e-4, atol=1e-4)
    many = classify(np.repeat(pixels, 30, axis=0))  # three batches, the last one padded
    np.testing.assert_allclose(many[1], np.repeat(logits, 30, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.integration
def test_stored_accuracy_is_that_of_the_loaded_classifier(classifier_path, digits):
    _, logits = small_networks.load_classifier(classifier_path)(digits.test.images)
    record = small_networks.train_classifier(classifier_path, digits, recipe=FORTY_STEPS)
    assert record["accuracy"] == np.mean(logits.argmax(axis=-1) == digits.test.labels)


@pytest.mark.integration
def test_finished_work_is_skipped(trained, classifier_path, digits, capsys, monkeypatch):
    monkeypatch.setattr(small_networks, "_train", None)
    assert small_networks.train_encoder(trained[0], digits, recipe=TWO_STEPS)["steps"] == 2
    small_networks.train_classifier(classifier_path, digits, recipe=FORTY_STEPS)
    assert capsys.readouterr().out.count("training skipped") == 2


@pytest.mark.integration
def test_other_settings_are_no_silent_reuse(trained, classifier_path, digits):
    with pytest.raises(ValueError, match="config.json exists, trained with .*'steps': 2.*; asked for .*'steps': 3"):
        small_networks.train_encoder(trained[0], digits, recipe=dataclasses.replace(TWO_STEPS, steps=3))
    with pytest.raises(ValueError, match="config.json exists, trained with .*'patch_size': 4.*; asked for .*'patch_size': 8"):
        small_networks.train_encoder(trained[0], digits, recipe=TWO_STEPS, architecture=TINY)
    with pytest.raises(ValueError, match="choose another path, or remove"):
        small_networks.train_classifier(classifier_path, digits, recipe=FORTY_STEPS, seed=5)


@pytest.mark.integration
def test_interrupted_encoder_is_trained_again(trained, digits, tmp_path, monkeypatch):
    folder, _, params = trained
    for name in ("training.json", "model.safetensors"):  # config.json comes last
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(small_networks, "_train", lambda *_: ({"encoder": params}, {"accuracy": 0.5}))
    assert small_networks.train_encoder(tmp_path, digits, recipe=TWO_STEPS)["accuracy"] == 0.5
    vit.load_encoder(tmp_path, resolution=16, image_size=16)


@pytest.mark.integration
def test_classifier_of_targets_gives_logits_of_labels(halves, tmp_path):
    path = tmp_path / "classifier.safetensors"
    record = small_networks.train_classifier(path, halves, recipe=Recipe(30, 16, 2e-3, label_smoothing=0.1))
    features, logits = small_networks.load_classifier(path)(halves.test.images)
    assert features.shape == (24, 64) and logits.shape == (24, 2)
    params = weights.read_state_dict(path)
    fine = features @ params["head.kernel"] + params["head.bias"]  # [N, 4]
    expected = np.stack([scipy.special.logsumexp(fine[:, [k, k + 2]], axis=-1) for k in range(2)], axis=-1)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert record["accuracy"] == np.mean(logits.argmax(axis=-1) == halves.test.labels)
    assert record["target_accuracy"] == np.mean(fine.argmax(axis=-1) == halves.test.targets) > 0.5


@pytest.mark.integration
@pytest.mark.parametrize("patch_size", [8, 16])
def test_encoders_of_other_sizes(halves, tmp_path, patch_size):
    recipe = Recipe(1, 4, 1e-3, label_smoothing=0.1)
    record = small_networks.train_encoder(tmp_path, halves, architecture={**TINY, "patch_size": patch_size}, recipe=recipe)
    assert record["architecture"]["patch_size"] == patch_size and record["pictures"] == "emoji"
    assert record["probe_accuracy"] > 0.9  # color is in any features
    encoder, params = vit.load_encoder(tmp_path, resolution=32, image_size=32)
    tokens = encoders.encode(encoder, params, jnp.asarray(halves.test.images))
    assert tokens.shape == (24, (32 // patch_size) ** 2, 64)


def test_logits_of_labels_are_log_sums_of_probabilities():
    logits = np.log(np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.05, 0.5, 0.2]], np.float32))
    summed = small_networks.label_logits(jnp.asarray(logits), np.array([1, 0, 1, 1]))
    np.testing.assert_allclose(np.exp(summed), [[0.2, 0.8], [0.05, 0.95]], rtol=1e-5)
    np.testing.assert_array_equal(small_networks.label_logits(jnp.asarray(logits), np.arange(4)), logits)  # nothing to sum


def test_probe_reads_what_features_hold(halves):
    def color(pixels):
        return pixels.astype(jnp.float32).mean(axis=(1, 2))

    def both(pixels):
        return jnp.concatenate([color(pixels[:, :16]), color(pixels[:, 16:])], axis=-1)

    assert small_networks.probe(both, halves) == {"probe_accuracy": 1.0, "probe_target_accuracy": 1.0}
    of_color = small_networks.probe(color, halves)
    assert of_color["probe_accuracy"] == 1 and of_color["probe_target_accuracy"] <= 0.75  # the halves are a guess
    nothing = small_networks.probe(lambda pixels: jnp.zeros((len(pixels), 3)), halves)
    assert nothing == {"probe_accuracy": 0.5, "probe_target_accuracy": 0.25}


@pytest.mark.parametrize("edges", ["constant", "nearest"])
def test_augment(pixels, edges):
    changed = small_networks.augment(jax.random.key(0), jnp.asarray(pixels), edges, False)
    assert changed.shape == pixels.shape and changed.dtype == jnp.uint8
    np.testing.assert_array_equal(changed[..., 0], changed[..., 2])
    assert 1 < np.abs(np.asarray(changed, float) - pixels).mean() < 60


def test_white_stays_white_where_edges_are_extended():
    white = jnp.full((8, 16, 16, 3), 255, jnp.uint8)
    assert (small_networks.augment(jax.random.key(0), white, "nearest", True) == 255).all()
    assert (small_networks.augment(jax.random.key(0), white, "constant", True) < 255).any()


def test_augment_by_nothing_changes_nothing_but_mirrors(pixels, monkeypatch):
    for name in ("_MAX_SHIFT", "_MAX_ANGLE", "_MAX_SCALING"):
        monkeypatch.setattr(small_networks, name, 0)
    np.testing.assert_array_equal(small_networks.augment(jax.random.key(0), jnp.asarray(pixels), "constant", False), pixels)
    turned = np.asarray(small_networks.augment(jax.random.key(0), jnp.asarray(pixels), "constant", True))
    mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(turned, pixels)]
    assert 4 <= sum(mirrored) <= 16
    for is_mirrored, new, old in zip(mirrored, turned, pixels):
        assert is_mirrored or np.array_equal(new, old)


def test_smoothed_cross_entropy():
    logits, targets = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([1])
    log_probabilities = np.log(scipy.special.softmax(np.asarray(logits[0])))
    for smoothing in (0.0, 0.1):
        wanted = (1 - smoothing) * np.eye(3)[1] + smoothing / 3
        found = small_networks._cross_entropy(logits, targets, smoothing)
        np.testing.assert_allclose(found, [-(wanted * log_probabilities).sum()], rtol=1e-5)


@pytest.mark.integration
def test_errors(classifier_path, tmp_path, digits, pixels):
    with pytest.raises(ValueError, match=r"uint8 \[20, 16, 8, 3\]; allowed: uint8 \[N, 16, 16, 3\]"):
        small_networks.load_classifier(classifier_path)(pixels[:, :, :8])
    with pytest.raises(ValueError, match="image_size is 18; allowed: a multiple of 4"):
        small_networks.train_classifier(tmp_path / "a.safetensors", picture_sets.digits(18))
    with pytest.raises(ValueError, match="steps is 0"):
        small_networks.train_encoder(tmp_path / "encoder", digits, recipe=dataclasses.replace(TWO_STEPS, steps=0))
    for names in ({"features": np.zeros(3)}, {"features.kernel": np.zeros((1024, 64), np.float32)}):
        weights.write_safetensors(tmp_path / "b.safetensors", names, overwrite=True)
        with pytest.raises(ValueError, match="is no classifier of this script: .*head.bias"):
            small_networks.load_classifier(tmp_path / "b.safetensors")


def test_command_line(monkeypatch, capsys):
    calls = []
    for name in ("train_encoder", "train_classifier"):

        def note(path, pictures, *, recipe, seed):
            calls.append((str(path), pictures, recipe.steps, seed))

        monkeypatch.setattr(small_networks, name, note)
    monkeypatch.setattr(picture_sets, "digits", lambda size: dataclasses.make_dataclass("P", ["name", "size"])("digits", size))
    monkeypatch.setattr(picture_sets, "emoji", lambda path: dataclasses.make_dataclass("P", ["name", "path"])("emoji", path))
    small_networks.main(["--encoder", "a", "--classifier", "b", "--encoder-steps", "3", "--seed", "7"])
    small_networks.main(["--encoder", "c", "--emoji", "folder"])
    assert [(path, steps, seed) for path, _, steps, seed in calls] == [("a", 3, 7), ("b", 600, 8), ("c", 2000, 0)]
    assert [pictures.name for _, pictures, *_ in calls] == ["digits", "digits", "emoji"]
    assert calls[0][1].size == 16 and calls[2][1].path == "folder"
    for words, said in (([], "nothing to do"), (["--encoder", "a", "--emoji", "b", "--image-size", "16"], "not allowed with")):
        with pytest.raises(SystemExit):
            small_networks.main(words)
        assert said in capsys.readouterr().err
