"""A run in a bucket, on a real object-store server: as one on a disk, through kills, damage and refusals."""

import io
import json
import os
import re
import signal
import threading
import time

import jax
import kill_trials
import numpy as np
import pytest
import small
from caches import Pictures, make_cache
from command_line import call
from etils import epath
from feature_stub import Noise, StubNetwork, write_adm
from PIL import Image

from repae_jax import buckets, cache_latents, evaluate_tokenizer, files, prepare_images, sample, train
from repae_jax.analyze_latents import __main__ as analyze
from repae_jax.data.array_record import PreparedImages
from repae_jax.data.latents import CachedLatents
from repae_jax.demo.studio import Studio
from repae_jax.distributed.compilation_cache import use_compilation_cache
from repae_jax.evaluate import __main__ as evaluate
from repae_jax.evaluate import measuring
from repae_jax.job import build, initial_state
from repae_jax.report import __main__ as report_command
from repae_jax.training import checkpoint, metric_log
from repae_jax.training.workdir import prepare_workdir

pytestmark = pytest.mark.integration
JOB, STEPS = "ldm", 8  # and checkpoints every four
RUN, DIGITS = "gs://bucket/run", "gs://bucket/digits"
SAVING_8 = "(POST|PUT) .*run/checkpoints/8"


def train_there(environment, workdir, compiled, log):
    """Trains in each process: the run in the bucket reads the digits there, prepared, the one on the disk makes them itself."""
    os.environ |= environment
    prepared = {"data__source": "array_record", "data__options": {"path": DIGITS}} if workdir == RUN else {}
    kill_trials.train_in(JOB, STEPS, workdir, compiled, log, **prepared)


class Trainer:
    """Starts the run; each time it ends, or is killed."""

    def __init__(self, environment, folder, compiled):
        self._context, self._environment = kill_trials.processes(), environment
        self._folder, self._compiled = folder, compiled

    def log(self, number):
        return self._folder / f"{number}.log"

    def start(self, number, workdir):
        process = self._context.Process(
            target=train_there, args=(self._environment, str(workdir), str(self._compiled), str(self.log(number)))
        )
        process.start()
        return process

    def finish(self, number, workdir):
        process = self.start(number, workdir)
        process.join(120)
        process.kill()
        assert process.exitcode == 0, self.log(number).read_text()[-3000:]


def wait_until(is_so, seconds=90):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


def upload(folder, address):
    """Copies a folder as `gcloud storage cp -r` does."""
    for file in folder.rglob("*"):
        if file.is_file():
            epath.Path(file).copy(epath.Path(address) / file.relative_to(folder), overwrite=True)


@pytest.fixture(scope="module")
def killed(object_store, tmp_path_factory, compiled):
    """(Trainer, Path of the same run without a break on a disk): the run at RUN was killed while it saved step 8."""
    folder = tmp_path_factory.mktemp("runs")
    trainer = Trainer(object_store.environment, folder, compiled)
    trainer.finish("whole", folder / "whole")
    command = ["--data=digits", "--image_size=8", "--shard_size=512", "--workers=0", f"--out={folder / 'digits'}"]
    prepare_images.run(prepare_images.parse_args(command))
    with object_store.reached():
        upload(folder / "digits", DIGITS)
    object_store.answer((SAVING_8, "wait"))
    process = trainer.start("killed", RUN)
    try:
        wait_until(lambda: any(re.search(SAVING_8, f"{r.method} {r.path}") for r in object_store.requests()))
    finally:
        process.kill()
        process.join()
        object_store.answer()
    assert process.exitcode == -signal.SIGKILL, trainer.log("killed").read_text()[-3000:]
    return trainer, folder / "whole"


@pytest.fixture(scope="module")
def finished(killed):
    """The same, with the run continued to its end."""
    trainer, whole = killed
    trainer.finish("continued", RUN)
    return trainer, whole


def test_killed_while_saving_and_continued(finished, gs):
    trainer, whole = finished
    assert re.findall(r"^step (\d)/8", trainer.log("continued").read_text(), re.MULTILINE) == list("5678")
    kill_trials.check(
        kill_trials.left_by(JOB, STEPS, epath.Path(RUN)), kill_trials.left_by(JOB, STEPS, whole), "the run in the bucket"
    )


def test_metrics_are_uploaded_seldom(finished, gs):
    """Objects take about one write a second: those of metrics are written before checkpoints and at the end."""
    finished_uploads = [r.path for r in gs.requests() if r.method == "PUT" and r.status == 200]
    for name in ("name=run/metrics.jsonl", "name=run/tensorboard/events"):
        count = sum(name in path for path in finished_uploads)
        assert 0 < count <= 2 + 2, f"{name} was written {count} times by two processes, one of which was killed"


@pytest.mark.slow
def test_sampling_continues_where_it_stopped(finished, gs, monkeypatch):
    """Samples go to the run's folder in the bucket, as to that of a run on a disk."""
    arguments = ("--num_samples=12", "--batch_size=8", "--steps=2", "--sampler=heun", "--grid=4")
    save, saved = sample._save_part, []

    def interrupted(path, array):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    command = sample.parse_args([f"--workdir={RUN}", *arguments])
    monkeypatch.setattr(sample, "_save_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sample.run(command)
    monkeypatch.setattr(sample, "_save_part", save)
    npz = sample.run(command)
    assert str(npz.parent) == f"{RUN}/generated" and npz.name.startswith("0000008-heun2-")
    with np.load(io.BytesIO(npz.read_bytes())) as arrays:
        assert arrays["arr_0"].shape == (12, 8, 8, 3) and arrays["arr_1"].shape == (12,)
        assert len(np.unique(arrays["arr_0"], axis=0)) == 12
    assert sorted(path.suffix for path in npz.parent.iterdir()) == [".json", ".npz", ".png"]


def test_inspected_and_reported(finished, gs, capsys, tmp_path):
    assert call("inspect", RUN, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["step"] == STEPS
    page = report_command.run(report_command.parse_args([RUN]))
    assert str(page) == f"{RUN}/report.html" and page.read_text().startswith("<!doctype html>")


# -- without training -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job():
    return build.build(small.config(vae__channels=32, vae__norm_groups=32), jax.devices()[:1])


def save(job, workdir, *steps):
    """Checkpoints of a run that trains everything, which are not trained; the state of the first."""
    states = [small.random_state(job, seed=step) for step in steps]
    with checkpoint.Checkpointer(workdir) as checkpointer:
        for step, state in zip(steps, states):
            position = {"loader": {"next_batch": step, "bad_records": [], "records": 9}, "inputs": {}}
            checkpointer.save(step, state, position, job.config)
    return states[0]


def test_a_damaged_checkpoint(job, gs, capfd):
    """The one before is used, and little is said; what is damaged is kept."""
    workdir = epath.Path("gs://bucket/damaged")
    first = save(job, workdir, 1, 2)
    newest = workdir / "checkpoints/2/state"
    for folder, _, names in newest.walk():
        for name in names if folder.name == "d" else ():
            (folder / name).unlink()
    gs.answer(("GET .*checkpoints/2/state/.*/d/.*[0-7]([?]|$)", 0.5))  # the others fail before
    capfd.readouterr()
    with checkpoint.Checkpointer(workdir) as checkpointer:
        state, position, step = checkpointer.restore(initial_state.abstract_state(job), job.config)
    assert step == position["loader"]["next_batch"] == 1 and not small.differing(state, first)
    assert [path.name for path in (workdir / "checkpoints_damaged").iterdir()] == ["2-0"]
    time.sleep(1)
    assert len(capfd.readouterr().err.splitlines()) < 20


def test_a_save_that_fails_leaves_no_threads(job, gs):
    """Orbax's would wait for five minutes, and the process with them."""
    refused = pytest.raises(OSError, match="gs://bucket/refused/checkpoints cannot be reached .*403")
    with refused, checkpoint.Checkpointer("gs://bucket/refused") as checkpointer:
        gs.answer(("(POST|PUT) .*refused/checkpoints/1", 403))
        position = {"loader": {"next_batch": 1, "bad_records": [], "records": 9}, "inputs": {}}
        checkpointer.save(1, small.random_state(job, seed=1), position, job.config)
        checkpointer.wait()
    wait_until(lambda: not any(type(thread).__name__ == "_SignalingThread" for thread in threading.enumerate()), 10)


@pytest.mark.parametrize("answer, path", [(401, "2/state"), (401, "2/data"), (403, "2/state")])
def test_a_checkpoint_out_of_reach_is_no_damage(job, gs, answer, path):
    """Nothing is moved; nor is it tried again by us, as the clients have done that for long."""
    workdir = epath.Path("gs://bucket/out-of-reach")
    if not workdir.exists():
        save(job, workdir, 1, 2)
    gs.answer((f"GET .*out-of-reach/checkpoints/{path}/", answer))
    began = time.monotonic()
    with checkpoint.Checkpointer(workdir) as checkpointer, pytest.raises(OSError) as caught:
        checkpointer.restore(initial_state.abstract_state(job), job.config)
    assert re.match(f"(.Errno 13. )?checkpoint .*out-of-reach/checkpoints/2' cannot be read .*{answer}", str(caught.value))
    assert len(str(caught.value).splitlines()) == 1 and time.monotonic() - began < 20
    assert not (workdir / "checkpoints_damaged").exists()


def test_a_run_copied_to_the_bucket(job, gs, tmp_path):
    """In a bucket Orbax takes for unfinished, and deletes, what lacks a mark: those from a disk have it."""
    first = save(job, tmp_path / "run", 1)
    upload(tmp_path / "run", "gs://bucket/copied")
    with checkpoint.Checkpointer("gs://bucket/copied") as checkpointer:
        state, _, step = checkpointer.restore(initial_state.abstract_state(job), job.config)
    assert step == 1 and not small.differing(state, first)


def test_played_with(job, gs, tmp_path):
    """The page's pictures are those of the same run on a disk, and a newer checkpoint is found; mistakes are one line."""
    for place in (gs.address, tmp_path):
        save(job, f"{place}/played", 1)
    there, here = (Studio(f"{place}/played") for place in (gs.address, tmp_path))
    fields = {"labels": "3", "steps": "2", "points": "2"}
    pictures = [studio.sample(studio.parse(fields), lambda: True)["results"] for studio in (there, here)]
    assert pictures[0] == pictures[1] and pictures[0][0]["step"] == 1
    save(job, f"{gs.address}/played", 2)
    assert there.describe()["checkpoints"][-1] == 2
    with pytest.raises(FileNotFoundError, match="gs://bucket/absent does not exist, or cannot be read") as absent:
        Studio(f"{gs.address}/absent")
    gs.answer((r"GET /storage/v1/b/bucket\?", 403))
    with pytest.raises(OSError, match="gs://bucket/played cannot be reached .*may its account use the bucket") as refused:
        Studio(f"{gs.address}/played")
    assert all(len(str(error.value).splitlines()) == 1 for error in (absent, refused))


@pytest.mark.slow
def test_vae_extracted_and_converted(job, gs, tmp_path):
    save(job, "gs://bucket/e2e", 3)
    save(job, tmp_path / "e2e", 3)
    for place in ("gs://bucket/e2e", tmp_path / "e2e"):
        target = f"{place}-vae" if place == "gs://bucket/e2e" else tmp_path / "vae"
        assert call("extract-vae", place, target) == 0
    there = epath.Path("gs://bucket/e2e-vae")
    assert {path.name for path in there.iterdir()} == {path.name for path in (tmp_path / "vae").iterdir()}
    for path in (tmp_path / "vae").iterdir():
        assert (there / path.name).read_bytes() == path.read_bytes()
    for place in ("gs://bucket", tmp_path):
        assert call("convert", f"{place}/e2e", f"{place}/0000003.pt", "--weights_only") == 0
    assert epath.Path("gs://bucket/0000003.pt").read_bytes() == (tmp_path / "0000003.pt").read_bytes()


@pytest.mark.slow
def test_scores_go_to_the_run(job, gs, tmp_path, monkeypatch):
    workdir = epath.Path("gs://bucket/scored")
    save(job, workdir, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "load_network", lambda weights, batch_size: StubNetwork(batch_size))
    write_adm(tmp_path / "real.npz", Noise(20, 8).pixels)
    given = f"--reference={tmp_path / 'real.npz'}", "--inception=weights.pth", "--batch_size=8"
    sampling = "--num_samples=8", "--steps=2", "--sampler=heun"
    path, result = measuring.run(evaluate.parse_args([str(workdir), *given, *sampling]))
    assert path.parent == workdir / "evaluations" and json.loads(path.read_text())["metrics"] == result["metrics"]
    assert not list((tmp_path / "cache/repae_jax/unfinished").rglob("*.parts"))
    path, _ = evaluate_tokenizer.run(evaluate_tokenizer.parse_args([str(workdir), "--num_images=8", "--batch_size=8"]))
    assert {file.name for file in path.parent.glob("tokenizer-*")} == {path.name, f"{path.stem}.png"}
    path = analyze.run(analyze.parse_args([str(workdir), "--num_images=16", "--batch_size=8"]))
    assert path.parent == workdir / "analysis" and (path.parent / "pca.png").exists() and analyze.summary(path)
    with pytest.raises(ValueError, match="gs://bucket/scored/analysis holds analysis.json"):
        analyze.run(analyze.parse_args([str(workdir)]))


@pytest.mark.parametrize(
    "workdir, rules, message",
    [
        ("gs://other/run", (), "gs://other/run cannot be reached .NotFound: 404 .*other does not exist.*does the bucket exist"),
        ("gs://bucket/run", [(r"GET /storage/v1/b/bucket\?", 403)], "Forbidden: 403 .*roles .*storage.legacyBucketReader"),
        ("gs://bucket/run", [("PUT|POST", 403)], "PermissionDeniedError: .* 403 .*roles storage.objectUser"),
        ("gs://bucket/run", [(".", 401)], "gs://bucket/run cannot be reached .*has this machine credentials"),
    ],
)
def test_a_bucket_that_cannot_be_used(workdir, rules, message, gs, monkeypatch):
    gs.answer(*rules)
    with pytest.raises(OSError, match=message) as caught:
        prepare_workdir(workdir)
    assert len(str(caught.value).splitlines()) == 1


def test_a_bucket_that_is_not_there_is_no_place_for_compiled_programs(gs):
    """JAX would wait for it for ever, without a word."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.raises(OSError, match="bucket other does not exist"):
            use_compilation_cache("gs://other/run")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_bucket_that_does_not_answer_is_told(gs, monkeypatch, warnings):
    monkeypatch.setattr(buckets, "WARN_SECONDS", 0.2)
    gs.answer((".", "wait"))
    timer = threading.Timer(1, gs.answer)
    timer.start()
    prepare_workdir("gs://bucket/slow")
    timer.join()
    assert any(re.match("waiting for gs://bucket/slow, for . s so far", line) for line in warnings)


def test_metrics_in_a_bucket(gs, monkeypatch, warnings):
    """Uploaded in the background, seldom; what fails is tried again, and fails before a checkpoint is saved."""
    folder, config = epath.Path("gs://bucket/metrics"), {"log": {"trackers": ("tensorboard",), "project": "p"}}
    folder.joinpath("metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    monkeypatch.setattr(buckets, "UPLOAD_SECONDS", 0)
    gs.answer(("metrics", 403))
    with pytest.raises(OSError, match="gs://bucket/metrics cannot be reached"):
        metric_log.Writer(folder, 1, config)
    gs.answer()
    with pytest.raises(RuntimeError, match="^the first$"), metric_log.open_writer(folder, 1, config) as writer:
        gs.answer(("POST|PUT", 403))
        wait_until(lambda: writer.write_scalars(2, {"loss": 0.5}) or any("tried again later" in line for line in warnings))
        with pytest.raises(OSError, match="gs://bucket/metrics cannot be reached"):
            writer.flush()
        raise RuntimeError("the first")  # a failure while closing does not hide it
    gs.answer()
    with metric_log.open_writer(folder, 1, config) as writer:
        for step in (2, 3):
            writer.write_scalars(step, {"loss": 0.5})
        writer.flush()
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
        writer.write_scalars(4, {"loss": 0.5})
    with metric_log.open_writer(folder, 0, config) as writer:  # a run without a checkpoint
        writer.write_scalars(1, {"loss": 0.5})
    lines = {path.name: len(path.read_text().splitlines()) for path in folder.glob("metrics.jsonl*")}
    assert lines == {"metrics.jsonl": 1, "metrics.jsonl.1": 4}


def test_images_and_latents_from_a_bucket(gs, tmp_path):
    """Made on a disk and copied: the same records."""
    (tmp_path / "pictures/a").mkdir(parents=True)
    for number in range(5):
        files.save_png(tmp_path / f"pictures/a/{number}.png", np.full((8, 8, 3), 50 * number, np.uint8))
    options = "--image_size=8", "--shard_size=2", "--workers=0", f"--out={tmp_path / 'images'}"
    prepare_images.run(prepare_images.parse_args([f"--data=folder:path={tmp_path / 'pictures'}", *options]))
    make_cache(tmp_path / "latents", Pictures(9))
    for name, opened in {"images": lambda path: PreparedImages(path, 8), "latents": CachedLatents}.items():
        upload(tmp_path / name, f"gs://bucket/{name}")
        remote, local = opened(f"gs://bucket/{name}"), opened(tmp_path / name)
        assert len(remote) == len(local) and remote.contents_hash == local.contents_hash
        for record in range(len(local)):
            for field, value in local[record].items():
                np.testing.assert_array_equal(remote[record][field], value)


@pytest.mark.slow
def test_training_on_latents_in_a_bucket(gs, tmp_path):
    """The state is the one after training on latents on a disk."""
    cache_latents.cache_latents(kill_trials.config(JOB, 2), tmp_path / "made")
    upload(tmp_path / "made", "gs://bucket/made")
    states = []
    for cache in (tmp_path / "made", "gs://bucket/made"):
        config = kill_trials.config(JOB, 2, data__cache=str(cache))
        state, finished = train.train(config, tmp_path / f"run{len(states)}")
        assert finished
        states.append(state)
    assert not small.differing(*states)


def test_pictures_in_a_bucket(gs):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for _ in range(2):  # replaced
        files.save_png("gs://bucket/pictures/a.png", picture)
    with epath.Path("gs://bucket/pictures/a.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(file.read()))), picture)
    assert [path.name for path in epath.Path("gs://bucket/pictures").iterdir()] == ["a.png"]
