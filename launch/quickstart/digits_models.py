"""Two small networks for runs on scikit-learn's digits, trained in seconds: an encoder to align with, and a classifier.

The encoder has DINOv2's architecture and layout on disk, so training treats it like the published one. The classifier, whose
features and labels evaluate the samples, has another architecture and seed: it does not share the encoder's features.
"""

import argparse
import functools
import math
import time
from pathlib import Path

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from checkpoints_tools import weights
from checkpoints_tools.vit import save_encoder
from repae_jax import cli, files, images
from repae_jax.data.digits import DigitsSource
from repae_jax.models import encoders
from repae_jax.models.vit import VisionTransformer

NUM_CLASSES = DigitsSource.num_classes
NUM_FEATURES = 64  # width of the classifier's features
ENCODER = {"patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4}
ENCODER_STEPS = 600
CLASSIFIER_STEPS = 600
_BATCH_SIZE = 32
_LEARNING_RATE = 4e-3
_MAX_SHIFT = 0.08  # share of the image's height
_MAX_ANGLE = 0.15  # radians
_MAX_SCALING = 0.1
_EVALUATION_BATCH_SIZE = 256
_REPORTS = 4  # lines of progress per training


class PatchMeanClassifier(nn.Module):
    """A linear layer on the mean of the patch tokens, so that these and not the class token are trained."""

    encoder: VisionTransformer

    @nn.compact
    def __call__(self, x):
        """Pre-processed images [B, H, H, 3] -> logits [B, 10]."""
        _, patches = self.encoder(x)
        return nn.Dense(NUM_CLASSES, name="head")(patches.mean(axis=1))


class ConvClassifier(nn.Module):
    """Three convolutions and two dense layers; the input of the last one is the feature vector."""

    @nn.compact
    def __call__(self, x):
        """Images [B, H, H, 3] in [-1, 1] -> (features [B, 64], logits [B, 10])."""
        for width, stride in ((32, 1), (64, 2), (64, 2)):
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.relu(nn.Dense(NUM_FEATURES, name="features")(x.reshape(x.shape[0], -1)))
        return x, nn.Dense(NUM_CLASSES, name="head")(x)


def train_encoder(folder, *, image_size=16, steps=ENCODER_STEPS, seed=0):
    """Trains a small vision transformer to classify digits and saves it, without its head, in Hugging Face's layout.

    The folder is created if absent; an encoder in it is kept if it was trained with the same settings, else ValueError. Images
    have a multiple of 4 pixels. Returns 'accuracy' on the held-out digits, 'seconds' and the settings.
    """
    folder = Path(folder)
    encoder = encoders.make_encoder(ENCODER, resolution=image_size, image_size=image_size)
    model = PatchMeanClassifier(encoder.module)

    def logits_fn(params, pixels):
        return model.apply({"params": params}, encoders.preprocess(encoder, pixels))

    def save(params):
        save_encoder(folder, encoder.module, params["encoder"], overwrite=True)

    settings = {"image_size": image_size, "steps": steps, "seed": seed}
    return _train_once("encoder", folder / "config.json", folder / "training.json", settings, model, logits_fn, save)


def train_classifier(path, *, image_size=16, steps=CLASSIFIER_STEPS, seed=1):
    """Trains a small convolutional network to classify digits and saves it; returns the share of held-out digits read rightly.

    Arguments are those of `train_encoder`, but for `path`, a .safetensors file, beside which its record is stored as .json.
    """
    path = Path(path)
    if image_size < 4 or image_size % 4:
        raise ValueError(f"image_size is {image_size}; allowed: a multiple of 4, e.g. 16")
    model = ConvClassifier()

    def logits_fn(params, pixels):
        return model.apply({"params": params}, images.to_float(pixels))[1]

    def save(params):
        weights.write_safetensors(path, flax.traverse_util.flatten_dict(params, sep="."))

    settings = {"image_size": image_size, "steps": steps, "seed": seed}
    return _train_once("classifier", path, path.with_suffix(".json"), settings, model, logits_fn, save)["accuracy"]


def load_classifier(path):
    """Returns the classifier that `train_classifier` saved in a .safetensors file; ValueError if it holds another network.

    It is a function: images uint8 [N, H, H, 3], N >= 1 -> (features float32 [N, 64], logits float32 [N, 10]), NumPy arrays.
    """
    state_dict = weights.read_state_dict(path)
    image_size = _image_size(state_dict, path)
    params = flax.traverse_util.unflatten_dict(state_dict, sep=".")
    apply = jax.jit(lambda pixels: ConvClassifier().apply({"params": params}, images.to_float(pixels)))

    def classify(pixels):
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (image_size, image_size, 3) or not len(pixels):
            raise ValueError(
                f"classifier {path} got {pixels.dtype} {list(pixels.shape)}; allowed: uint8 "
                f"[N, {image_size}, {image_size}, 3] with N >= 1"
            )
        return _in_batches(apply, pixels)

    return classify


def _image_size(state_dict, path):
    """Returns the image height of a classifier's parameters; ValueError if they are another network's."""
    inputs = np.atleast_1d(state_dict.get("features.kernel", 0)).shape[0]  # the last map, a quarter of the image's height
    image_size = 4 * max(math.isqrt(inputs // NUM_FEATURES), 1)
    example = jnp.zeros((1, image_size, image_size, 3))
    expected = jax.eval_shape(ConvClassifier().init, jax.random.key(0), example)["params"]
    trees = state_dict, flax.traverse_util.flatten_dict(expected, sep=".")
    found, wanted = ({(name, tuple(leaf.shape)) for name, leaf in tree.items()} for tree in trees)
    if wrong := sorted({name for name, _ in found ^ wanted}):
        raise ValueError(
            f"{path} is no classifier of this script: {', '.join(wrong)} missing, unexpected or of another shape; "
            "remove the file and train it again"
        )
    return image_size


def _train_once(name, weights_path, record_path, settings, model, logits_fn, save):
    """Trains and saves a network unless it is there; returns its record. ValueError if it was trained with other settings."""
    if not weights_path.exists():
        params, record = _train(logits_fn, model, name, settings)
        record_path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(record_path, record, overwrite=True)  # first: where the network is, its record is
        save(jax.device_get(params))
        return record
    record = files.read_json(record_path) if record_path.exists() else {}
    recorded = {name: record.get(name) for name in settings}
    if recorded != settings:
        raise ValueError(
            f"{weights_path} exists, trained with {recorded}; asked for {settings}. Ask for the same, choose another path, "
            f"or remove {weights_path}"
        )
    print(f"{weights_path} exists (held-out accuracy {record['accuracy']:.3f}), training skipped", flush=True)
    return record


def _train(logits_fn, model, name, settings):
    """Trains logits_fn(params, uint8 [B, H, H, 3]) -> [B, 10]; returns (params, settings with 'accuracy' and 'seconds')."""
    steps, image_size, start = settings["steps"], settings["image_size"], time.monotonic()
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed: at least 1")
    train, test = all_records(image_size, "train"), all_records(image_size, "test")
    init_key, run_key = jax.random.split(jax.random.key(settings["seed"]))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, image_size, image_size, 3)))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, _LEARNING_RATE, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))

    def loss_fn(params, key):
        index_key, augment_key = jax.random.split(key)
        index = jax.random.randint(index_key, (_BATCH_SIZE,), 0, len(train[1]))
        logits = logits_fn(params, augment(augment_key, jnp.asarray(train[0])[index]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(train[1])[index]).mean()

    @jax.jit
    def update(params, opt_state, step):
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(run_key, step))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    for step in range(steps):
        params, opt_state, loss = update(params, opt_state, step)
        if (step + 1) % max(steps // _REPORTS, 1) == 0:
            print(f"{name}: step {step + 1}/{steps}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    logits = _in_batches(jax.jit(functools.partial(logits_fn, params)), test[0])
    accuracy = float((logits.argmax(axis=-1) == test[1]).mean())
    seconds = round(time.monotonic() - start, 1)
    print(f"{name}: held-out accuracy {accuracy:.3f} after {seconds:.0f} s", flush=True)
    return params, {**settings, "accuracy": accuracy, "seconds": seconds}


def all_records(image_size, split):
    """Returns all images of the split 'train' or 'test', uint8 [N, H, H, 3], and their labels, int32 [N]."""
    source = DigitsSource(image_size, split)
    return np.stack([source[i]["image"] for i in range(len(source))]), source.labels


def augment(key, pixels):
    """Shifts, rotates and scales images, uint8 [B, H, H, 3], slightly, with black beyond the edges."""
    batch, size = pixels.shape[:2]
    shift_key, angle_key, scale_key = jax.random.split(key, 3)
    shift = jax.random.uniform(shift_key, (batch, 2), minval=-_MAX_SHIFT * size, maxval=_MAX_SHIFT * size)
    angle = jax.random.uniform(angle_key, (batch,), minval=-_MAX_ANGLE, maxval=_MAX_ANGLE)
    scale = jax.random.uniform(scale_key, (batch,), minval=1 - _MAX_SCALING, maxval=1 + _MAX_SCALING)
    center = (size - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(size) - center] * 2, indexing="ij"))  # [2, H, H]

    def warp(image, shift, angle, scale):
        rotation = scale * jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
        source = jnp.tensordot(rotation, grid, axes=1) + (center + shift)[:, None, None]
        sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=list(source), order=1)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image.astype(jnp.float32))

    # rounded to gray levels: training images have the same precision as all others
    return jnp.round(jax.vmap(warp)(pixels, shift, angle, scale)).clip(0, 255).astype(jnp.uint8)


def _in_batches(fn, pixels):
    """Applies fn in batches of one shape, so that it is compiled once; returns NumPy arrays."""
    padded = np.pad(pixels, [(0, -len(pixels) % _EVALUATION_BATCH_SIZE), (0, 0), (0, 0), (0, 0)])
    batches = np.split(padded, len(padded) // _EVALUATION_BATCH_SIZE)
    results = [jax.device_get(fn(batch)) for batch in batches]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pixels)], *results)


def parse_args(argv=None):
    """Parses the command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=cli.path, metavar="FOLDER", help="train the encoder and save it here")
    parser.add_argument("--classifier", type=cli.path, metavar="FILE", help="train the classifier, save it here (.safetensors)")
    size_help = "height and width in pixels (default: %(default)s)"
    parser.add_argument("--image-size", type=cli.whole(1, 4096), default=16, help=size_help)
    updates = {"type": cli.whole(1), "help": "updates (default: %(default)s)"}
    parser.add_argument("--encoder-steps", default=ENCODER_STEPS, **updates)
    parser.add_argument("--classifier-steps", default=CLASSIFIER_STEPS, **updates)
    seed_help = "the classifier's is one higher (default: %(default)s)"
    parser.add_argument("--seed", type=cli.whole(0, 2**32 - 2), default=0, help=seed_help)
    options = parser.parse_args(argv)
    if options.encoder is None and options.classifier is None:
        parser.error("nothing to do: give --encoder FOLDER, --classifier FILE.safetensors, or both")
    return options


@cli.command(parse_args, "interrupted: nothing was written; the same command starts again")
def main(options):
    """Trains the networks that the command line names."""
    size, seed = options.image_size, options.seed
    if options.encoder:
        train_encoder(options.encoder, image_size=size, steps=options.encoder_steps, seed=seed)
    if options.classifier:
        train_classifier(options.classifier, image_size=size, steps=options.classifier_steps, seed=seed + 1)


if __name__ == "__main__":
    main()
