"""Trackers that write TensorBoard's files, into the workdir."""

import io
import os
import socket
import time
from collections.abc import Mapping

from PIL import Image

from repae_jax.training.trackers.base import Picture, Record, Tracker


class TensorBoard(Tracker):
    """TensorBoard's files, written by its own package without TensorFlow, each event on disk at once."""

    package, extra, has_records = "tensorboard", "", False

    def __init__(self, run: Record):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{run.first_step}"
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._file = RecordWriter((folder / name).open("ab"))
        self._write(0, file_version="brain.Event:2")
        # TensorBoard drops what earlier starts have written of the steps that follow
        self._write(run.first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def _write(self, step, **content):
        self._file.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes all metrics as one event."""
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in scalars.items()]
        self._write(step, summary=self._summary(value=values))

    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Writes all pictures as one event."""
        values = []
        for name, pixels in images.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            height, width, colors = pixels.shape
            image = self._summary.Image(height=height, width=width, colorspace=colors, encoded_image_string=png.getvalue())
            values.append(self._summary.Value(tag=name, image=image))
        self._write(step, summary=self._summary(value=values))

    def close(self, *, is_failed: bool) -> None:
        """Closes the file."""
        self._file.close()


class Clu(Tracker):
    """TensorBoard's files as clu writes them, with TensorFlow."""

    package, extra, has_records = "clu", "clu", False

    def __init__(self, run: Record):
        import tensorflow as tf
        from clu import metric_writers

        tf.config.set_visible_devices([], "GPU")  # otherwise TensorFlow would reserve the memory that JAX needs
        self._writer = metric_writers.SummaryWriter(str(run.folder / "tensorboard"))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes all metrics."""
        self._writer.write_scalars(step, scalars)
        self._writer.flush()

    def write_images(self, step: int, images: Mapping[str, Picture]) -> None:
        """Writes the pictures."""
        self._writer.write_images(step, {name: image[None] for name, image in images.items()})
        self._writer.flush()

    def close(self, *, is_failed: bool) -> None:
        """Closes the file."""
        self._writer.close()
