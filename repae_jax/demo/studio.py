"""What the page asks for -> pictures: samples of one or several checkpoints of a run, and the way there."""

import base64
import collections
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from repae_jax import buckets
from repae_jax.analysis.representation import principal_components
from repae_jax.diffusion.samplers import SAMPLERS, Sampling, check_sampler
from repae_jax.ranges import SEED, whole
from repae_jax.sampling.generate import SamplesNotFinite
from repae_jax.sampling.load_model import LoadedModel, load_model
from repae_jax.sampling.stepwise import Point, Stepper
from repae_jax.training import checkpoint

MOST_IMAGES, MOST_STEPS = 16, 1000
MOST_CHECKPOINTS = 4  # side by side, which all stay in memory
MOST_POINTS = 12  # of a trajectory
_NUMBERS = {"steps": int, "guidance_scale": float, "guidance_low": float, "guidance_high": float}  # settings that are asked for


@dataclasses.dataclass(frozen=True)
class Request:
    """A request says what is to be sampled."""

    labels: tuple[int, ...]
    seed: int
    points: int  # of the trajectory that are shown
    checkpoints: tuple[int, ...]  # their steps
    sampling: Sampling


class Abandoned(Exception):
    """Nobody waits for the pictures any more."""


def _go_on(is_wanted):
    if not is_wanted():
        raise Abandoned


def data_url(pixels: UInt8[np.ndarray, "H W 3"]) -> str:
    """Returns a picture as an address that holds it, a PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def latent_colors(latents: Float[np.ndarray, "N h w C"]) -> UInt8[np.ndarray, "N h w 3"]:
    """Returns latents as colors: their first three principal components, or channels where there are fewer than three."""
    values = principal_components(latents) if latents.shape[-1] > 2 else np.repeat(latents[..., :1], 3, axis=-1)
    largest = np.abs(values).max() or 1.0
    return np.round(127.5 * (values / largest + 1)).astype(np.uint8)


class Studio:
    """A run, or another model, that pictures are asked of; one request is computed at a time.

    Args:
      workdir: the folder of a run, also in a bucket, whose newer checkpoints are found while it trains; or what `load_model`
        takes.
      vae: the VAE of a model that holds none.

    ValueError or FileNotFoundError if there is nothing to sample from, another OSError if a bucket cannot be reached.
    """

    def __init__(self, workdir: str, vae: str | None = None):
        buckets.check(workdir)
        folder = epath.Path(workdir)
        self._workdir, self._vae = workdir, vae
        self._is_run = folder.is_dir() and not any((folder / name).exists() for name in ("args.json", "model_index.json"))
        self._only = 0
        here = self.checkpoints()
        if not here:
            raise FileNotFoundError(
                f"{workdir} has no checkpoint to sample from: give the --workdir of a run that has written one "
                "(config.checkpoint.every says after how many steps)"
            )
        self._models: collections.OrderedDict[int, LoadedModel] = collections.OrderedDict()
        self._lock = threading.Lock()
        model = self._load(here[-1] if self._is_run else None)
        self._only = model.step or 0
        self._models[model.step or 0] = model
        self._stepper = Stepper(model.nets, model.objective, model.latent_shape)
        self._default, self._num_classes = model.sampling, model.num_classes
        self._samplers = [name for name, sampler in SAMPLERS.items() if isinstance(model.objective, sampler.objective)]

    def checkpoints(self) -> list[int]:
        """Returns the steps that can be sampled now, ascending."""
        if not self._is_run:
            return [self._only]
        with buckets.reached(self._workdir):
            return checkpoint.saved_steps(self._workdir)

    def describe(self) -> dict[str, Any]:
        """Returns what the page shows before anything is sampled."""
        default = dataclasses.asdict(self._default)
        return {
            "name": epath.Path(self._workdir).name, "checkpoints": self.checkpoints(), "classes": self._num_classes,
            "samplers": self._samplers, "default": {name: default[name] for name in ("sampler", *_NUMBERS)},
        }  # fmt: skip

    def parse(self, query: Mapping[str, str]) -> Request:
        """Returns the request of an address's fields; ValueError, in one line, for a value that is not possible.

        Fields: labels and checkpoints (numbers with commas between them), seed, points, and those of `Sampling`. All but
        labels have defaults.
        """
        known = {"labels", "checkpoints", "seed", "points", "sampler", *_NUMBERS}
        if unknown := sorted(set(query) - known):
            raise ValueError(f"unknown: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}")
        fields = {name: _number(name, query[name], kind) for name, kind in _NUMBERS.items() if name in query}
        sampling = dataclasses.replace(self._default, sampler=query.get("sampler", self._default.sampler), **fields)
        sampling = dataclasses.replace(sampling, precision="float32")
        check_sampler(sampling, self._stepper.objective)
        _check("steps", sampling.steps, 1, MOST_STEPS)
        labels = _numbers("labels", query.get("labels", ""))
        _check("number of labels", len(labels), 1, MOST_IMAGES)
        for label in labels:
            _check("label", label, 0, self._num_classes - 1)
        here = self.checkpoints()
        asked = _numbers("checkpoints", query["checkpoints"]) if query.get("checkpoints") else here[-1:]
        _check("number of checkpoints", len(asked), 1, MOST_CHECKPOINTS)
        if gone := sorted(set(asked) - set(here)):
            raise ValueError(f"there is no checkpoint of step {gone[0]}; there are {', '.join(map(str, here))}")
        seed, points = _number("seed", query.get("seed", "0"), int), _number("points", query.get("points", "8"), int)
        if problem := SEED.problem(seed):
            raise ValueError(f"seed {seed} {problem}")
        _check("points", points, 2, MOST_POINTS)
        return Request(labels, seed, points, asked, sampling)

    def sample(self, request: Request, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Returns the pictures: for each checkpoint the images, and the way to the first of them.

        SamplesNotFinite is raised for broken weights, Abandoned once `is_wanted` says that nobody waits for them any more,
        which is asked at every step.
        """
        with self._lock:
            began = time.perf_counter()
            results = [self._sample(step, request, is_wanted) for step in request.checkpoints]
        return {"results": results, "seconds": time.perf_counter() - began}

    def _sample(self, step, request, is_wanted):
        points = []
        _go_on(is_wanted)
        params, labels = self._model(step).params, np.asarray(request.labels, np.int32)
        for point in self._stepper.steps(params, labels, jax.random.key(request.seed), request.sampling):
            _go_on(is_wanted)
            points.append(jax.block_until_ready(point))
        if not np.isfinite(points[-1].z).all():
            raise SamplesNotFinite(f"the samples of step {step} are not finite: training has diverged; take an earlier step")
        images = self._stepper.decode(params, points[-1].z)
        way = self._way(params, points, request.points)
        return {"step": step, "images": list(map(data_url, images)), "trajectory": way}

    def _way(self, params, points: Sequence[Point], count):
        """Evenly spaced points of the first sample's way, from noise to data: time, image and latents."""
        shown = [points[i] for i in np.unique(np.round(np.linspace(0, len(points) - 1, count)).astype(int))]
        colors = latent_colors(np.stack([np.asarray(point.z[0]) for point in shown]))
        images = [self._stepper.decode(params, point.z)[0] for point in shown]  # of all, for which there is a program
        return [
            {"t": point.t, "image": data_url(image), "latents": data_url(color)}
            for point, image, color in zip(shown, images, colors)
        ]

    def _model(self, step):
        if step not in self._models:
            self._models[step] = self._load(step)
            while len(self._models) > MOST_CHECKPOINTS:
                self._models.popitem(last=False)
        self._models.move_to_end(step)
        return self._models[step]

    def _load(self, step):
        return load_model(self._workdir, step, jax.devices()[:1], self._vae)


def _number(name, text, kind):
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is no {'whole ' if kind is int else ''}number") from None


def _numbers(name, text):
    return tuple(_number(name, part, int) for part in text.split(",") if part.strip())


def _check(name, value, least, most):
    if problem := whole(least, most).problem(value):
        raise ValueError(f"{name} {value} {problem}")
