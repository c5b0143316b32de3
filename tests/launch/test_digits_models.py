import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints_tools import vit, weights
from launch.quickstart import digits_models
from repae_jax.data.digits import DigitsSource
from repae_jax.models import encoders

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pixels():
    source = DigitsSource(16, "test")
    return np.stack([source[i]["image"] for i in range(20)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an encoder, and what was saved there: module and parameters."""
    folder, saved = tmp_path_factory.mktemp("models") / "new" / "encoder", []

    def save_encoder(folder, module, params, **options):
        saved.extend((module, params))
        vit.save_encoder(folder, module, params, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits_models, "save_encoder", save_encoder)
        record = digits_models.train_encoder(folder, steps=2)
    assert 0 <= record["accuracy"] <= 1 and record["steps"] == 2
    return folder, *saved


@pytest.fixture(scope="module")
def classifier_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "new" / "classifier.safetensors"
    assert digits_models.train_classifier(path, steps=40) > 0.5
    return path


def test_loaded_encoder_gives_the_trained_tokens(trained, pixels):
    folder, module, params = trained
    encoder, loaded = vit.load_encoder(folder, resolution=16, image_size=16)
    assert encoder.module == module and encoder.grid == 4
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    tokens = encoders.encode(encoder, loaded, jnp.asarray(pixels))
    assert tokens.shape == (20, 16, 64)
    _, expected = module.apply({"params": params}, encoders.preprocess(encoder, jnp.asarray(pixels)))
    np.testing.assert_array_equal(tokens, expected)


def test_loaded_classifier(classifier_path, pixels):
    classify = digits_models.load_classifier(classifier_path)
    features, logits = classify(pixels)
    assert features.shape == (20, 64) and logits.shape == (20, 10) and features.dtype == logits.dtype == np.float32
    params = weights.read_state_dict(classifier_path)
    np.testing.assert_allclose(logits, features @ params["head.kernel"] + params["head.bias"], rtol=1e-4, atol=1e-4)
    many = classify(np.repeat(pixels, 30, axis=0))  # three batches, the last one padded
    np.testing.assert_allclose(many[1], np.repeat(logits, 30, axis=0), rtol=1e-4, atol=1e-4)


def test_stored_accuracy_is_that_of_the_loaded_classifier(classifier_path):
    source = DigitsSource(16, "test")
    _, logits = digits_models.load_classifier(classifier_path)(np.stack([record["image"] for record in source]))
    assert digits_models.train_classifier(classifier_path, steps=40) == np.mean(logits.argmax(axis=-1) == source.labels)


def test_finished_work_is_skipped(trained, classifier_path, capsys, monkeypatch):
    monkeypatch.setattr(digits_models, "_train", None)
    assert digits_models.train_encoder(trained[0], steps=2)["steps"] == 2
    digits_models.train_classifier(classifier_path, steps=40)
    assert capsys.readouterr().out.count("training skipped") == 2


def test_other_settings_are_no_silent_reuse(trained, classifier_path):
    with pytest.raises(ValueError, match="config.json exists, trained with .*'steps': 2.*; asked for .*'steps': 3"):
        digits_models.train_encoder(trained[0], steps=3)
    with pytest.raises(ValueError, match="choose another path, or remove"):
        digits_models.train_classifier(classifier_path, steps=40, seed=5)


def test_interrupted_encoder_is_trained_again(trained, tmp_path, monkeypatch):
    folder, _, params = trained
    for name in ("training.json", "model.safetensors"):  # config.json comes last
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    monkeypatch.setattr(digits_models, "_train", lambda *_: ({"encoder": params}, {"accuracy": 0.5}))
    assert digits_models.train_encoder(tmp_path, steps=2) == {"accuracy": 0.5}
    vit.load_encoder(tmp_path, resolution=16, image_size=16)


def test_augment(pixels):
    changed = digits_models.augment(jax.random.key(0), jnp.asarray(pixels))
    assert changed.shape == pixels.shape and changed.dtype == jnp.uint8
    np.testing.assert_array_equal(changed[..., 0], changed[..., 2])
    assert 1 < np.abs(np.asarray(changed, float) - pixels).mean() < 60


def test_augment_by_nothing_changes_nothing(pixels, monkeypatch):
    for name in ("_MAX_SHIFT", "_MAX_ANGLE", "_MAX_SCALING"):
        monkeypatch.setattr(digits_models, name, 0)
    np.testing.assert_array_equal(digits_models.augment(jax.random.key(0), jnp.asarray(pixels)), pixels)


def test_errors(classifier_path, tmp_path, pixels):
    with pytest.raises(ValueError, match=r"uint8 \[20, 16, 8, 3\]; allowed: uint8 \[N, 16, 16, 3\]"):
        digits_models.load_classifier(classifier_path)(pixels[:, :, :8])
    with pytest.raises(ValueError, match="image_size is 18; allowed: a multiple of 4"):
        digits_models.train_classifier(tmp_path / "a.safetensors", image_size=18)
    with pytest.raises(ValueError, match="steps is 0"):
        digits_models.train_encoder(tmp_path / "encoder", steps=0)
    for names in ({"features": np.zeros(3)}, {"features.kernel": np.zeros((1024, 64), np.float32)}):
        weights.write_safetensors(tmp_path / "b.safetensors", names, overwrite=True)
        with pytest.raises(ValueError, match="is no classifier of this script: .*head.bias"):
            digits_models.load_classifier(tmp_path / "b.safetensors")


def test_command_line(monkeypatch, capsys):
    calls = []
    for name in ("train_encoder", "train_classifier"):
        monkeypatch.setattr(digits_models, name, lambda path, **settings: calls.append((str(path), settings)))
    digits_models.main(["--encoder", "a", "--classifier", "b", "--encoder-steps", "3", "--seed", "7"])
    classifier_steps = digits_models.CLASSIFIER_STEPS
    assert calls == [
        ("a", {"image_size": 16, "steps": 3, "seed": 7}),
        ("b", {"image_size": 16, "steps": classifier_steps, "seed": 8}),
    ]
    with pytest.raises(SystemExit):
        digits_models.main([])
    assert "nothing to do" in capsys.readouterr().err
