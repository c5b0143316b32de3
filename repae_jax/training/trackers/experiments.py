"""Trackers that keep the records of many runs, on this machine or on a server: Weights & Biases, Trackio, MLflow."""

import collections
import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import logging

from repae_jax.training.trackers.base import Picture, Record, Tracker, named, reason

CLOSE_SECONDS = 120  # for which the end of a run waits for a server
_MLFLOW_TAG = "repae_jax.run"  # by which a run is found again
_MOST_PARAMS = 100  # MLflow's, of one call
_LONGEST_PARAM = 500  # characters, of MLflow's older servers
_REFUSALS = {400, 404, 413, 422}  # HTTP statuses of what will never be taken


class Wandb(Tracker):
    """Weights & Biases. A process of its own sends to the server, in the background.

    Rows of its record are numbered by our steps. It takes none before its last: what a resumed run has still to say of earlier
    steps, such as the score of the one that was stopped, comes as further rows. The metric "step" is the axis of all curves.
    """

    package, extra = "wandb", "wandb"

    def __init__(self, run: Record):
        import wandb

        self._picture = wandb.Image
        self._run = wandb.init(
            project=run.project, name=run.name, id=run.identity, resume="allow", config=dict(run.config), allow_val_change=True
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def _log(self, step, content):
        self._run.log({"step": step, **content}, step=step if step >= self._run.step else None)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hands the metrics to wandb's process."""
        self._log(step, dict(scalars))

    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Hands the pictures to wandb's process."""
        self._log(step, {name: self._picture(image) for name, image in images.items()})

    def close(self, *, is_failed: bool) -> None:
        """Waits until wandb's process has sent everything; it gives up after WANDB_FINISH_TIMEOUT."""
        self._run.finish(exit_code=int(is_failed))


class Trackio(Tracker):
    """Trackio: a database on this machine, or a Space of the Hugging Face hub; written in the background by its own threads."""

    package, extra = "trackio", "trackio"

    def __init__(self, run: Record):
        import trackio

        self._picture = trackio.Image
        name = f"{run.name}-{run.identity}"  # trackio continues a run by its name
        self._run = trackio.init(run.project, name=name, config=dict(run.config), resume="allow", embed=False)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Hands the metrics to trackio's threads."""
        self._run.log(dict(scalars), step=step)

    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Hands the pictures to trackio's threads."""
        self._run.log({name: self._picture(image) for name, image in images.items()}, step=step)

    def close(self, *, is_failed: bool) -> None:
        """Waits for trackio's threads."""
        self._run.finish()


class Mlflow(Tracker):
    """MLflow. Its client waits for its server at every call, so a thread calls it: training never waits.

    What cannot be sent is kept, and tried again with the next metrics and at the end; what is refused for good is left out,
    with a warning.
    """

    package, extra = "mlflow", "mlflow"

    def __init__(self, run: Record):
        import mlflow

        self._entities, self._error, self._client = mlflow.entities, mlflow.MlflowException, mlflow.MlflowClient()
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found else self._client.create_experiment(run.project)
        same = self._client.search_runs([experiment], f"tags.{_MLFLOW_TAG} = '{run.identity}'", max_results=1)
        if same:
            self._id = same[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._create(run, experiment)
        self._pending: collections.deque[Callable[[], Any]] = collections.deque()
        self._pool, self._is_over = concurrent.futures.ThreadPoolExecutor(1), False
        self._sending: concurrent.futures.Future | None = None

    def _create(self, run, experiment):
        """Returns MLflow's name of a new run, with the config as its parameters, which MLflow never lets change."""
        identity = self._client.create_run(experiment, tags={_MLFLOW_TAG: run.identity}, run_name=run.name).info.run_id
        params = [self._entities.Param(name, str(value)[:_LONGEST_PARAM]) for name, value in flatten(run.config).items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(identity, params=params[first : first + _MOST_PARAMS], synchronous=True)
        return identity

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the metrics, in the background."""
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in scalars.items()]
        self._send(functools.partial(self._client.log_batch, self._id, metrics=metrics, synchronous=True))

    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Sends the pictures, in the background."""
        for name, image in images.items():
            self._send(functools.partial(self._client.log_image, self._id, image, key=name, step=step, synchronous=True))

    def _send(self, call):
        is_idle = self._sending is None or self._sending.done()
        if is_idle:
            self._warn_of_failure("they are sent again with the next")
        self._pending.append(call)
        if is_idle:
            self._sending = self._pool.submit(self._send_pending)

    def _send_pending(self):
        while self._pending and not self._is_over:
            try:
                self._pending[0]()
            except self._error as error:
                if error.get_http_status_code() not in _REFUSALS:
                    raise
                logging.warning("%s, which refuses an entry (%s): it is left out", named("mlflow"), reason(error))
            self._pending.popleft()

    def _warn_of_failure(self, consequence):
        if self._sending is None:
            return
        if not self._sending.done():
            why = f"no end within {CLOSE_SECONDS} s"
        elif error := self._sending.exception():
            why = reason(error)
        else:
            return
        lost = len(self._pending)
        logging.warning("%s: %d entries could not be sent (%s); %s", named("mlflow"), lost, why, consequence)

    def close(self, *, is_failed: bool) -> None:
        """Sends the rest, with the end of the run; a failure, or a server that takes too long, is a warning."""
        status = "FAILED" if is_failed else "FINISHED"
        self._pending.append(functools.partial(self._client.set_terminated, self._id, status))
        self._sending = self._pool.submit(self._send_pending)
        concurrent.futures.wait([self._sending], CLOSE_SECONDS)
        self._is_over = True
        self._warn_of_failure("they are lost to MLflow, metrics.jsonl has them")
        self._pool.shutdown(wait=False)


def flatten(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Returns the values of nested sections by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return flat
