"""Two small networks for runs on small pictures, trained in seconds to minutes: an encoder to align with, and a classifier.

The encoder has DINOv2's architecture and layout on disk, so training treats it like the published one. The classifier, whose
features and labels evaluate the samples, has another architecture and seed: it does not share the encoder's features.
"""

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8

from checkpoints_tools import weights
from checkpoints_tools.vit import save_encoder
from launch import pictures as picture_sets
from launch.pictures import Pictures
from repae_jax import cli, files, images
from repae_jax.models import encoders
from repae_jax.models.vit import VisionTransformer

Classifier = Callable[[UInt8[np.ndarray, "N H H 3"]], tuple[Float[np.ndarray, "N 64"], Float[np.ndarray, "N K"]]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a training by AdamW with a cosine schedule of the learning rate."""

    steps: int
    batch_size: int
    learning_rate: float  # at its largest, after a tenth of the steps
    label_smoothing: float = 0.0


NUM_FEATURES = 64  # width of the classifier's features
# By name of the pictures.
ENCODERS = {
    "digits": {"patch_size": 4, "hidden_size": 64, "depth": 4, "num_heads": 4},
    "emoji": {"patch_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 4},
}
CONVOLUTIONS = {"digits": (32, 64, 64), "emoji": (32, 64, 64, 128)}  # of the classifier: all but the first halve the picture
ENCODER_RECIPES = {"digits": Recipe(600, 32, 4e-3), "emoji": Recipe(2000, 64, 1e-3, label_smoothing=0.1)}
CLASSIFIER_RECIPES = {"digits": Recipe(600, 32, 4e-3), "emoji": Recipe(1500, 64, 2e-3, label_smoothing=0.1)}
_MAX_SHIFT = 0.08  # share of the image's height
_MAX_ANGLE = 0.15  # radians
_MAX_SCALING = 0.1
_EVALUATION_BATCH_SIZE = 256
_DIGITS_SIZE = 16
_REPORTS = 4  # lines of progress per training
_LABEL_OF_TARGET = "label_of_target"  # in a classifier's file


class PatchMeanClassifier(nn.Module):
    """A linear layer on the mean of the patch tokens, so that these and not the class token are trained."""

    encoder: VisionTransformer
    num_targets: int

    @nn.compact
    def __call__(self, x):
        """Pre-processed images [B, H, H, 3] -> logits [B, T]."""
        _, patches = self.encoder(x)
        return nn.Dense(self.num_targets, name="head")(patches.mean(axis=1))


class ConvClassifier(nn.Module):
    """Convolutions and two dense layers; the input of the last one is the feature vector."""

    widths: tuple[int, ...]
    num_targets: int

    @nn.compact
    def __call__(self, x):
        """Images [B, H, H, 3] in [-1, 1] -> (features [B, 64], logits [B, T])."""
        for i, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=1 if i == 0 else 2)(x)
            x = nn.relu(nn.GroupNorm(num_groups=8)(x))
        x = nn.relu(nn.Dense(NUM_FEATURES, name="features")(x.reshape(x.shape[0], -1)))
        return x, nn.Dense(self.num_targets, name="head")(x)


def train_encoder(
    folder: str | Path,
    pictures: Pictures,
    *,
    architecture: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Trains a small vision transformer to classify pictures and saves it, without its head, in Hugging Face's layout.

    Args:
      folder: created if absent; an encoder in it is kept if it was trained with the same settings.
      pictures: their height must be a multiple of the encoder's patch size.
      architecture: as `encoders.make_encoder` takes it; by default that of ENCODERS.
      recipe: by default that of ENCODER_RECIPES.
      seed: of the parameters and the batches.

    Returns:
      The settings, 'seconds', and the shares of the held-out pictures that the network reads rightly: 'accuracy' of labels
      and 'target_accuracy' of targets; 'probe_accuracy' and 'probe_target_accuracy' are those of `probe` on its frozen tokens.

    Raises:
      ValueError: if the folder has an encoder that was trained otherwise, or the settings do not fit.
    """
    folder, size, recipe = Path(folder), pictures.image_size, recipe or ENCODER_RECIPES[pictures.name]
    architecture = dict(ENCODERS[pictures.name] if architecture is None else architecture)
    encoder = encoders.make_encoder(architecture, resolution=size, image_size=size)
    model = PatchMeanClassifier(encoder.module, len(pictures.target_names))

    def logits_fn(params, pixels):
        return model.apply({"params": params}, encoders.preprocess(encoder, pixels))

    def train():
        params, record = _train("encoder", model, logits_fn, pictures, recipe, seed)
        record |= probe(lambda pixels: encoders.encode(encoder, params["encoder"], pixels).mean(axis=1), pictures)
        print(f"encoder: a linear layer on its frozen tokens reads {record['probe_accuracy']:.3f} of the labels", flush=True)
        return params, record

    def save(params):
        save_encoder(folder, encoder.module, params["encoder"], overwrite=True)

    settings = {"pictures": pictures.name, "image_size": size, "architecture": architecture, **dataclasses.asdict(recipe)}
    return _train_once(folder / "config.json", folder / "training.json", {**settings, "seed": seed}, train, save)


def train_classifier(path: str | Path, pictures: Pictures, *, recipe: Recipe | None = None, seed: int = 1) -> dict[str, Any]:
    """Trains a small convolutional network to classify pictures and saves it; returns the record, as `train_encoder`.

    `path` is a .safetensors file, beside which the record is stored as .json. The probe is not in it. `recipe` is by default
    that of CLASSIFIER_RECIPES.
    """
    path, size, widths = Path(path), pictures.image_size, CONVOLUTIONS[pictures.name]
    recipe = recipe or CLASSIFIER_RECIPES[pictures.name]
    multiple = _halving(widths)
    if size < multiple or size % multiple:
        raise ValueError(f"image_size is {size}; allowed: a multiple of {multiple}, e.g. {4 * multiple}")
    model = ConvClassifier(widths, len(pictures.target_names))

    def logits_fn(params, pixels):
        return model.apply({"params": params}, images.to_float(pixels))[1]

    def train():
        return _train("classifier", model, logits_fn, pictures, recipe, seed)

    def save(params):
        state_dict = flax.traverse_util.flatten_dict(params, sep=".")
        weights.write_safetensors(path, {**state_dict, _LABEL_OF_TARGET: pictures.label_of_target})

    settings = {"pictures": pictures.name, "image_size": size, "convolutions": list(widths), **dataclasses.asdict(recipe)}
    return _train_once(path, path.with_suffix(".json"), {**settings, "seed": seed}, train, save)


def load_classifier(path: str | Path) -> Classifier:
    """Returns the classifier that `train_classifier` saved in a .safetensors file; ValueError if it holds another network.

    It is a function: images uint8 [N, H, H, 3], N >= 1 -> (features float32 [N, 64], logits float32 [N, K]), NumPy arrays. The
    logits are those of the K labels: of a label with several targets, the logarithm of the sum of their exponentials.
    """
    state_dict = weights.read_state_dict(path)
    model, image_size = _classifier_of(state_dict, path)
    label_of_target = state_dict.pop(_LABEL_OF_TARGET)
    params = flax.traverse_util.unflatten_dict(state_dict, sep=".")

    @jax.jit
    def apply(pixels):
        features, logits = model.apply({"params": params}, images.to_float(pixels))
        return features, label_logits(logits, label_of_target)

    def classify(pixels):
        pixels = np.asarray(pixels)
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (image_size, image_size, 3) or not len(pixels):
            raise ValueError(
                f"classifier {path} got {pixels.dtype} {list(pixels.shape)}; allowed: uint8 "
                f"[N, {image_size}, {image_size}, 3] with N >= 1"
            )
        return in_batches(apply, pixels)

    return classify


def label_logits(logits: Float[Array, "B T"], label_of_target: np.ndarray) -> Float[Array, "B K"]:
    """Sums the probabilities of each label's targets: returns logarithms of the sums, up to the same constant for all."""
    belongs = np.arange(label_of_target.max() + 1)[:, None] == label_of_target  # [K, T]
    return jax.nn.logsumexp(jnp.where(belongs, logits[:, None], -jnp.inf), axis=-1)


def probe(features_fn: Callable[[UInt8[Array, "B H H 3"]], Float[Array, "B D"]], pictures: Pictures) -> dict[str, float]:
    """Fits logistic regressions on features of the training pictures; returns the shares of held-out pictures read rightly.

    Returns:
      'probe_accuracy' of labels and 'probe_target_accuracy' of targets. Features are standardized first.
    """
    from sklearn.linear_model import LogisticRegression  # here: quick to import without it
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (in_batches(jax.jit(features_fn), split.images) for split in (pictures.train, pictures.test))
    shares = {}
    for name, kind in (("probe_accuracy", "labels"), ("probe_target_accuracy", "targets")):
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        regression.fit(train, getattr(pictures.train, kind))
        shares[name] = float(regression.score(test, getattr(pictures.test, kind)))
    return shares


def _halving(widths):
    """Returns by how much a classifier's convolutions reduce the image's height."""
    return 2 ** (len(widths) - 1)


def _classifier_of(state_dict, path):
    """Returns (ConvClassifier, image height) of the parameters in a file; ValueError if they are another network's."""

    def size(name, axis):
        return dict(enumerate(np.shape(state_dict.get(name, 0)))).get(axis, 1)

    count = sum(name.startswith("Conv_") and name.endswith(".kernel") for name in state_dict)
    widths = tuple(size(f"Conv_{i}.kernel", 3) for i in range(count)) or CONVOLUTIONS["digits"]
    widths = tuple(max(width // 8, 1) * 8 for width in widths)  # another network's may not fit the norms' groups
    image_size = _halving(widths) * max(math.isqrt(size("features.kernel", 0) // widths[-1]), 1)
    model = ConvClassifier(widths, size("head.kernel", 1))
    expected = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))["params"]
    label_of_target = jax.ShapeDtypeStruct((model.num_targets,), jnp.int32)
    trees = state_dict, {**flax.traverse_util.flatten_dict(expected, sep="."), _LABEL_OF_TARGET: label_of_target}
    found, wanted = ({(name, tuple(leaf.shape)) for name, leaf in tree.items()} for tree in trees)
    if wrong := sorted({name for name, _ in found ^ wanted}):
        raise ValueError(
            f"{path} is no classifier of this script: {', '.join(wrong)} missing, unexpected or of another shape; "
            "remove the file and train it again"
        )
    return model, image_size


def _train_once(weights_path, record_path, settings, train, save):
    """Trains and saves a network unless it is there; returns its record. ValueError if it was trained with other settings."""
    if not weights_path.exists():
        params, numbers = train()
        record = {**settings, **numbers}
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


def _train(name, model, logits_fn, pictures, recipe, seed):
    """Trains logits_fn(params, uint8 [B, H, H, 3]) -> [B, T]; returns (params, accuracies and 'seconds')."""
    steps, size, start = recipe.steps, pictures.image_size, time.monotonic()
    if steps < 1:
        raise ValueError(f"steps is {steps}; allowed: at least 1")
    init_key, run_key = jax.random.split(jax.random.key(seed))
    params = jax.jit(model.init)(init_key, jnp.zeros((1, size, size, 3)))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0, recipe.learning_rate, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))

    def loss_fn(params, key, pixels, targets):
        index_key, augment_key = jax.random.split(key)
        index = jax.random.randint(index_key, (recipe.batch_size,), 0, len(targets))
        logits = logits_fn(params, augment(augment_key, pixels[index], pictures.edges, pictures.mirrored))
        return _cross_entropy(logits, targets[index], recipe.label_smoothing).mean()

    @jax.jit
    def update(params, opt_state, step, *data):
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(run_key, step), *data)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    data = jax.device_put((pictures.train.images, pictures.train.targets))
    for step in range(steps):
        params, opt_state, loss = update(params, opt_state, step, *data)
        if (step + 1) % max(steps // _REPORTS, 1) == 0:
            print(f"{name}: step {step + 1}/{steps}  loss {loss:.3f}  {time.monotonic() - start:.0f} s", flush=True)
    logits = in_batches(jax.jit(functools.partial(logits_fn, params)), pictures.test.images)
    record = _accuracies(logits, pictures)
    seconds = round(time.monotonic() - start, 1)
    print(f"{name}: held-out accuracy {record['accuracy']:.3f} after {seconds:.0f} s", flush=True)
    return params, {**record, "seconds": seconds}


def _cross_entropy(logits, targets, smoothing):
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(jax.nn.one_hot(targets, logits.shape[-1]), smoothing))


def _accuracies(logits, pictures):
    """Returns the shares of held-out pictures whose label and target have the largest logit."""
    labels = np.asarray(label_logits(logits, pictures.label_of_target)).argmax(axis=-1)
    return {
        "accuracy": float((labels == pictures.test.labels).mean()),
        "target_accuracy": float((logits.argmax(axis=-1) == pictures.test.targets).mean()),
    }


def augment(key: Array, pixels: UInt8[Array, "B H H 3"], edges: str, mirrored: bool) -> UInt8[Array, "B H H 3"]:
    """Shifts, rotates and scales images slightly; returns them, half of them mirrored if these are as good.

    `edges` says what lies beyond them, as the `mode` of `jax.scipy.ndimage.map_coordinates`: 'constant' is black.
    """
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
        sample = functools.partial(jax.scipy.ndimage.map_coordinates, coordinates=list(source), order=1, mode=edges)
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(image.astype(jnp.float32))

    # rounded to gray levels: training images have the same precision as all others
    warped = jnp.round(jax.vmap(warp)(pixels, shift, angle, scale)).clip(0, 255).astype(jnp.uint8)
    if not mirrored:
        return warped
    turn = jax.random.bernoulli(jax.random.fold_in(key, 3), shape=(batch, 1, 1, 1))
    return jnp.where(turn, warped[:, :, ::-1], warped)


def in_batches(function: Callable, *arrays: np.ndarray) -> Any:
    """Applies a function in batches of one size along the first axis, so that it is compiled once; returns NumPy arrays."""
    count, parts = len(arrays[0]), []
    for first in range(0, count, _EVALUATION_BATCH_SIZE):
        rows = np.minimum(np.arange(first, first + _EVALUATION_BATCH_SIZE), count - 1)  # the last batch repeats the last row
        parts.append(jax.device_get(function(*(array[rows] for array in arrays))))
    return jax.tree.map(lambda *part: np.concatenate(part)[:count], *parts)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=cli.path, metavar="FOLDER", help="train the encoder and save it here")
    parser.add_argument("--classifier", type=cli.path, metavar="FILE", help="train the classifier, save it here (.safetensors)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--emoji", type=cli.path, metavar="FOLDER", help="pictures prepared by launch.emoji; default: digits")
    size_help = f"height and width of the digits in pixels (default: {_DIGITS_SIZE})"
    source.add_argument("--image-size", type=cli.whole(1, 4096), help=size_help)
    updates = {"type": cli.whole(1), "help": "updates; by default the recipe's"}
    parser.add_argument("--encoder-steps", **updates)
    parser.add_argument("--classifier-steps", **updates)
    seed_help = "the classifier's is one higher (default: %(default)s)"
    parser.add_argument("--seed", type=cli.whole(0, 2**32 - 2), default=0, help=seed_help)
    options = parser.parse_args(argv)
    if options.encoder is None and options.classifier is None:
        parser.error("nothing to do: give --encoder FOLDER, --classifier FILE.safetensors, or both")
    return options


@cli.command(parse_args, "interrupted: nothing was written; the same command starts again")
def main(options: argparse.Namespace) -> None:
    """Trains the networks that the command line names."""
    pictures = picture_sets.emoji(options.emoji) if options.emoji else picture_sets.digits(options.image_size or _DIGITS_SIZE)

    def recipe(recipes, steps):
        default = recipes[pictures.name]
        return dataclasses.replace(default, steps=steps or default.steps)

    if options.encoder:
        train_encoder(options.encoder, pictures, recipe=recipe(ENCODER_RECIPES, options.encoder_steps), seed=options.seed)
    if options.classifier:
        chosen = recipe(CLASSIFIER_RECIPES, options.classifier_steps)
        train_classifier(options.classifier, pictures, recipe=chosen, seed=options.seed + 1)


if __name__ == "__main__":
    main()
