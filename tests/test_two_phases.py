"""A run of two phases, by one command: what is handed over, where it continues, and what is refused before it begins."""

import json
import re
import shutil
import weakref
from types import SimpleNamespace

import jax
import numpy as np
import peers
import pytest
import small
from etils import epath

from configs import ldm, paper, repae
from repae_jax import cli, train
from repae_jax.job import build, frozen_weights, two_phases
from repae_jax.models import rae
from repae_jax.report import __main__ as report
from repae_jax.sampling.load_model import load_model, load_vae
from repae_jax.training import checkpoint
from repae_jax.training.phases import phases_of

QUIET = {"hooks.samples_every": 0, "checkpoint.every": 2, "checkpoint.keep_last": 2, "log.every": 1}


# the joint step that is the quickest to compile: VAE and SiT alone
PLAIN = {"encoders": {}, "loss.vae.align": 0.0, "loss.sit.align": 0.0, "loss.vae.gan": 0.0}


DECODER = {"optim.vae.fixed": rae.FROZEN, "loss.vae.kl": 0.0}  # of an RAE


def joint(**changes):
    return small.config({**QUIET, **PLAIN, "hooks.reconstructions_every": 0, "steps": 2, **changes}, repae)


def then(**changes):
    return small.config({**QUIET, "steps": 4, "encoders": {}, "loss.sit.align": 0.0, **changes}, ldm)


def on(row, make, **changes):
    """`joint` or `then` on the VAE of a row of configs/paper.py."""
    section = paper.get_config(f"{row},tiny").vae.to_dict()
    return lambda: make(**{"vae": section, "data.image_size": 16, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Workdir of a run of both phases, the second with cached latents in a folder beside it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train.train_in_two_phases(joint(), then(), workdir, str(workdir.parent / "latents"))
    return workdir


@pytest.mark.integration
def test_the_second_phase_is_on_the_vae_of_the_first(finished):
    """Its frozen VAE, its latents' scale and its images are those of the joint phase, bit for bit but a square root."""
    first, second = finished / "joint", finished / "frozen"
    assert checkpoint.saved_steps(first) == [2] and checkpoint.saved_steps(second) == [2, 4]
    trained, frozen = load_vae(first), load_vae(second)
    assert small.differing(trained.params, frozen.params) == []
    averages = load_model(first).params["latent_stats"]
    np.testing.assert_array_equal(trained.latent_stats.mean, averages.mean)
    for name in ("mean", "var"):
        np.testing.assert_allclose(getattr(frozen.latent_stats, name), getattr(averages, name), rtol=1e-6)
    configs = [checkpoint.read_config(folder) for folder in (first, second)]
    assert configs[1]["init"]["vae"] == configs[1]["init"]["latent_stats"] == str(finished / "e2e-vae")
    for name in ("source", "options", "image_size", "num_classes"):
        assert configs[0]["data"][name] == configs[1]["data"][name]
    assert configs[1]["data"]["cache"] == str(finished.parent / "latents") and configs[1]["job"] == "ldm"


@pytest.mark.integration
def test_a_finished_run_ends_at_once_and_keeps_the_vae(finished, monkeypatch):
    monkeypatch.setattr(two_phases, "hand_over", lambda _: pytest.fail("the VAE was written again"))
    assert train.train_in_two_phases(joint(), then(), finished, str(finished.parent / "latents"))


@pytest.mark.slow
def test_it_continues_in_the_phase_that_was_stopped(finished, tmp_path, monkeypatch):
    """Stopped in each phase, and between them; the second phase is that of the run without a break."""
    workdir, stopped = tmp_path / "run", []

    def stopping(name):
        def stop(config, folder):
            stopped.append(folder.name)
            return (None, False) if folder.name == name else trained(config, folder)

        return stop

    trained = train.train
    monkeypatch.setattr(train, "train", stopping("joint"))
    assert not train.train_in_two_phases(joint(), then(), workdir)
    assert stopped == ["joint"] and not two_phases.is_handed_over(workdir)
    shutil.copytree(finished / "joint", workdir / "joint")
    monkeypatch.setattr(two_phases, "hand_over", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    monkeypatch.setattr(train, "train", trained)
    with pytest.raises(OSError, match="disk full"):
        train.train_in_two_phases(joint(), then(), workdir)
    monkeypatch.undo()
    monkeypatch.setattr(train, "train", stopping("frozen"))
    assert not train.train_in_two_phases(joint(), then(), workdir)
    assert two_phases.is_handed_over(workdir) and stopped[-2:] == ["joint", "frozen"]
    monkeypatch.undo()
    assert train.train_in_two_phases(joint(), then(), workdir)
    states = [load_model(folder / "frozen").params for folder in (workdir, finished)]
    assert small.largest_error(states[0], states[1]) < 5e-5  # latents of a cache, and encoded in the step


def test_the_state_of_the_joint_phase_is_freed_before_the_second(tmp_path, monkeypatch):
    """Its networks, moments and averages would fill the devices beside those of the second phase."""
    states, alive = [], []

    class State:
        pass

    def trained(*_):
        alive.extend(state() is not None for state in states)
        state = State()
        states.append(weakref.ref(state))
        return state, True

    monkeypatch.setattr(train, "train", trained)
    monkeypatch.setattr(two_phases, "hand_over", lambda _: None)
    monkeypatch.setattr(two_phases, "check_first", lambda *_: None)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)
    assert train.train_in_two_phases(joint(), then(), tmp_path / "run")
    assert alive == [False]


def test_it_says_that_it_was_stopped_between_the_phases(tmp_path, monkeypatch, warnings):
    monkeypatch.setattr(two_phases, "is_handed_over", lambda _: True)
    monkeypatch.setattr(two_phases, "check_first", lambda *_: None)
    monkeypatch.setattr(train.cache_latents, "cache_latents", lambda *_, **__: None)
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("a phase has begun"))
    assert not train.train_in_two_phases(joint(), then(), tmp_path / "run", str(tmp_path / "latents"))
    assert any("asked to stop while latents were cached" in message for message in warnings)


@pytest.mark.integration
def test_another_joint_phase_comes_too_late(finished):
    with pytest.raises(ValueError, match=r"--config.steps=3, but the joint phase in .*joint has ended after 2, .*: give 2, or"):
        train.train_in_two_phases(joint(steps=3), then(), finished)
    with pytest.raises(ValueError, match="belongs to a run with another config.*\n  seed: stored 0, given 1"):
        train.train_in_two_phases(joint(seed=1), then(), finished)


@pytest.mark.integration
def test_other_commands_are_told_the_last_phase(finished):
    with pytest.raises(ValueError, match=f"no checkpoints in '{finished}/checkpoints'; give {finished}/frozen$"):
        load_model(finished)
    with pytest.raises(ValueError, match=r"is a run of two phases, in its folders joint and frozen: add --then"):
        two_phases.check_workdir(finished, is_of_two=False)
    with pytest.raises(ValueError, match="is a run of one phase, and --then is for one of two"):
        two_phases.check_workdir(finished / "joint", is_of_two=True)


@pytest.mark.integration
def test_the_report_shows_both_phases_on_one_page(finished, tmp_path):
    out = tmp_path / "page.html"
    report.run(report.parse_args([str(finished), f"--out={out}"]))
    text = out.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script[^>]*id="data"[^>]*>(.*?)</script>', text, re.DOTALL)[1])
    assert [(run["name"], run["job"]) for run in data["runs"]] == [("joint", "repae"), ("frozen", "ldm")]
    assert data["heading"].startswith("run, a run of two phases: 2 + 4 steps, ")
    assert {len(run["curves"]["sit/loss"]["s"]) for run in data["runs"]} == {2, 4}
    single = report.run(report.parse_args([str(finished / "joint"), f"--out={tmp_path / 'one.html'}"]))
    assert '"heading":""' in single.read_text(encoding="utf-8")


def test_the_report_of_the_first_phase_alone(tmp_path):
    (tmp_path / "joint").mkdir()
    assert phases_of(tmp_path) == [] and report.in_phases([str(tmp_path)]) == [str(tmp_path)]
    (tmp_path / "joint" / "metrics.jsonl").write_text("")
    assert [folder.name for folder in phases_of(tmp_path)] == ["joint"]


# ---- mistakes of the second phase, before the first one ---------------------------------------------------------------


@pytest.fixture
def never_trained(monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("the first phase has begun"))


@pytest.mark.usefixtures("never_trained")
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (joint, lambda: joint(), "--then has config.job='repae'; with --then it has to be 'ldm'"),
        (then, then, "--config has config.job='ldm'; with --then it has to be 'repae'"),
        (joint, lambda: then(**{"vae.latent_channels": 8}), "--then has config.vae.latent_channels=8, but --config has 4"),
        (joint, on("vtp-dit-xl", then), "--then has config.vae.family='vtp', but --config has None"),
        (on("vtp-dit-xl", joint, **{"loss.vae.kl": 0.0}), then, "--then has config.vae.family=None, but --config has 'vtp'"),
        (on("rae-dit-xl", joint, **DECODER), on("rae-dit-xl", then), "config.vae.family='rae', whose encoder is never trained"),
        (joint, lambda: then(**{"data.image_size": 16}), "--then has config.data.image_size=16, but --config has 8"),
        (joint, lambda: then(**{"data.num_classes": 11}), "--then has config.data.num_classes=11, but --config has 10"),
        (joint, lambda: then(**{"init.checkpoint": "x.pt"}), "--then has config.init.checkpoint='x.pt', but the first phase"),
        (joint, lambda: then(**{"data.cache": "/x"}), "--then has config.data.cache='/x', but .*: give --cache_latents=FOLDER"),
        (joint, lambda: then(**{"data.options.path": "/x"}), "--then has config.data.options.path='/x', but the first phase"),
        (joint, lambda: then(**{"sit.patch_size": 3}), "^--then: config.sit.patch_size=3 does not divide"),
        (joint, lambda: then(**{"optim.sit.eps": -1.0}), "^--then: config.optim.sit.eps=-1.0 must be"),
        (joint, lambda: then(**{"hooks.fid_every": 2}), "^--then: config.hooks.fid_every=2, but config.hooks.fid_reference is"),
        (joint, lambda: then(**{"sit.num_heads": 3}), "^--then: .*num_heads"),
        (joint, lambda: then(**{"steps": 0}), "^--then: config.steps=0 must be at least 1$"),
        (lambda: joint(**{"steps": 0}), then, "^config.steps=0 must be at least 1$"),
    ],
)
def test_a_second_phase_that_cannot_be(first, second, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        train.train_in_two_phases(first(), second(), tmp_path / "run")
    assert cli.line_of(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("never_trained")
def test_an_encoder_that_is_not_there(tmp_path):
    config = small.config({**QUIET, "steps": 4}, ldm)
    config.encoders.target.weights = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="absent"):
        train.train_in_two_phases(joint(), config, tmp_path / "run")


@pytest.mark.usefixtures("never_trained")
def test_a_cache_in_a_bucket(tmp_path):
    with pytest.raises(ValueError, match="--cache_latents=gs://bucket/latents: latents are cached on a local or mounted disk"):
        train.train_in_two_phases(joint(), then(), tmp_path / "run", "gs://bucket/latents")


@pytest.mark.usefixtures("never_trained")
def test_a_cache_that_cannot_be_or_is_of_another_vae(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"--cache_latents={tmp_path}/file: .* cannot be written to .*: give a folder"):
        train.train_in_two_phases(joint(), then(), tmp_path / "run", str(tmp_path / "file"))
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents" / "settings.json").write_text("{}")
    with pytest.raises(ValueError, match="/latents holds latents already, but the VAE of this .*: give another folder"):
        train.train_in_two_phases(joint(), then(), tmp_path / "run", str(tmp_path / "latents"))
    assert not (tmp_path / "run").exists()


FLAGS = [f"--config={small.ROOT}/configs/repae.py:tiny", "--workdir=run"]
THEN = f"--then={small.ROOT}/configs/ldm.py:tiny"


def test_the_command_line_has_fields_of_both_configs():
    given = [*FLAGS, THEN, "--config.steps=8", "--then.steps=16", "--then.sit.qk_norm=True", "--cache_latents=latents"]
    args = train.parse_args(given)
    assert (args.config.steps, args.then.steps, args.then.sit.qk_norm, args.config.sit.qk_norm) == (8, 16, True, False)
    assert (args.config.job, args.then.job, args.cache_latents) == ("repae", "ldm", "latents")
    assert train.parse_args(FLAGS).then is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([THEN, "--then.stepps=1"], "then has no field 'stepps'"),
        ([f"--then={small.ROOT}/configs/ldm.py:tinny"], f"--then={small.ROOT}/configs/ldm.py:tinny: preset 'tinny'"),
        (["--then=absent.py"], "--then=absent.py: there is no file 'absent.py'"),
        ([THEN, "--then.init.vae=x.pt"], "--then.init.vae=x.pt: the first phase gives config.init.vae of the second: leave"),
        ([THEN, "--then.data.options.path=/x"], "the first phase gives config.data.options of the second"),
        ([THEN, "--then.data.cache=/x"], "gives config.data.cache of the second: give --cache_latents=FOLDER"),
        ([THEN, "--then.init={'vae': 'x'}"], "config.init.vae of the second: leave it out, and set the other fields of init"),
        ([THEN, "--then.data.options={'path': '/x'}"], "the first phase gives config.data.options of the second: leave it out"),
        ([THEN, f"--flagfile={small.ROOT}/absent"], "Unable to open flagfile"),
        (["--cache_latents=/x"], "--cache_latents=/x is for the second phase of a run: add --then"),
    ],
)
def test_words_that_are_refused(words, message):
    with pytest.raises((SystemExit, ValueError)) as caught:
        train.parse_args([*FLAGS, *words])
    assert message in str(caught.value)


def test_words_of_a_flag_file_are_refused(tmp_path):
    (tmp_path / "flags").write_text("# of the second phase\n--then.steps=3\n--then.init.latent_stats=x.pt\n")
    with pytest.raises(ValueError, match="--then.init.latent_stats=x.pt: the first phase gives config.init.latent_stats of"):
        train.parse_args([*FLAGS, THEN, f"--flagfile={tmp_path}/flags"])
    (tmp_path / "flags").write_text("--then.steps=3\n--then.init.stats_images=8\n")
    args = train.parse_args([*FLAGS, THEN, f"--flagfile={tmp_path}/flags"])
    assert (args.then.steps, args.then.init.stats_images) == (3, 8)


def test_fields_of_a_second_phase_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        train.parse_args([*FLAGS, "--then.steps=1"])
    assert "unrecognized arguments: --then.steps=1; add --then=FILE" in capsys.readouterr().err


def test_given_fields_are_fields_of_the_config():
    config = ldm.get_config()
    for name in two_phases.GIVEN:
        section, _, field = name.partition(".")
        assert field in config[section]


def test_a_published_row_as_second_phase(tmp_path):
    """Its own VAE and statistics are replaced, and the images are those of the first."""
    first, second = paper.get_config("repae-xl-vavae"), paper.get_config("final")
    first.data.options.path = "/data/imagenet/train"
    config = two_phases.second_config(first, second, tmp_path)
    assert config.init.vae == config.init.latent_stats == str(tmp_path / "e2e-vae") and config.steps == 4_000_000
    assert config.data.options.path == "/data/imagenet/train" and second.init.vae.startswith("REPA-E/")
    assert build.build(config, jax.devices()[:1]).frozen_vae


# ---- several processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_take_both_phases(tmp_path, compiled):
    """The frozen VAE of both is the one that process 0 has written."""
    for name, call in (("config", "joint()"), ("then", "then(steps=2)")):
        text = f"import test_two_phases\ndef get_config():\n    return test_two_phases.{call}\n"
        (tmp_path / f"{name}.py").write_text(text)
    flags = ("--config", tmp_path / "config.py", "--then", tmp_path / "then.py")
    ended = peers.finish(tmp_path / "run", compiled, flags=flags)
    assert "finished; everything is in" in ended[0][1]
    assert checkpoint.saved_steps(tmp_path / "run" / "frozen") == [2]
    trained, frozen = (load_vae(tmp_path / "run" / name) for name in ("joint", "frozen"))
    assert small.differing(trained.params, frozen.params) == []


def test_all_processes_wait_for_the_vae(tmp_path, monkeypatch):
    """Processes other than 0 read it, too, so that an error is everywhere, and write nothing."""
    calls = []
    monkeypatch.setattr(two_phases.identify, "identify", lambda path: calls.append(path))
    monkeypatch.setattr(two_phases.convert, "find_vae", lambda _: SimpleNamespace(module=0, params=1, latent_stats=2))
    monkeypatch.setattr(two_phases.jax, "process_index", lambda: 1)
    monkeypatch.setattr(two_phases.vae, "save_diffusers", lambda *_: pytest.fail("process 1 wrote"))
    monkeypatch.setattr(two_phases.multihost, "all_gather", calls.append)
    two_phases.hand_over(tmp_path)
    assert calls == [str(tmp_path / "joint"), None]


def test_encoders_are_loaded_by_one_function(monkeypatch):
    job = build.build(joint())
    monkeypatch.setattr(frozen_weights, "load_encoders", lambda job: ("these",))
    monkeypatch.setattr(frozen_weights, "put_weights", lambda job, tree, _: tree)
    monkeypatch.setattr(frozen_weights.sharding, "tree_sharding", lambda *_: None)
    assert frozen_weights.load_frozen(job)["encoders"] == ("these",)


@pytest.mark.slow
def test_in_a_bucket(gs, tmp_path):
    """Both phases, continued after the first, with the cache of latents on a disk."""
    workdir = epath.Path("gs://bucket/two-phases")
    assert train.train_in_two_phases(joint(), then(steps=2), workdir)
    assert (workdir / "e2e-vae" / "config.json").exists() and checkpoint.saved_steps(workdir / "frozen") == [2]
    assert train.train_in_two_phases(joint(), then(steps=2), workdir)
    trained, frozen = (load_vae(str(workdir / name)) for name in ("joint", "frozen"))
    assert small.differing(trained.params, frozen.params) == []
    page = report.run(report.parse_args([str(workdir), f"--out={tmp_path / 'page.html'}"]))
    assert "a run of two phases" in page.read_text(encoding="utf-8")
