"""Writing caches of latents: the same files after any interruption and from any number of processes.

Most tests write with a stub for the VAE, see `caches`.
"""

import itertools
import json
import socket
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from caches import Pictures, encode, encode_both, frozen_config, make_cache
from processes import contents, in_threads, run_script, script_env

from checkpoints_tools import vae as vae_files
from repae_jax import cache_latents, cli, images
from repae_jax.data import latents, shard_writer, shards
from repae_jax.distributed import multihost
from repae_jax.job import build, frozen_weights, training_data

# ---- the files ------------------------------------------------------------------------------------------------------


def test_files(tmp_path):
    assert make_cache(tmp_path / "a", Pictures(20)) == 3
    named = [f"shard-{i:05d}{ending}" for i in range(3) for ending in (".array_record", ".json")]
    assert sorted(contents(tmp_path / "a")) == sorted(
        [*named, "labels.npy", "latents-stats.safetensors", "manifest.json", "places.npy", "settings.json"]
    )
    manifest = shards.read_manifest(tmp_path / "a", latents.FORMAT)
    assert manifest["records"] == 20 and [shard["records"] for shard in manifest["shards"]] == [8, 8, 4]
    assert manifest["vae"] == "vae.pt" and manifest["fingerprint"] == "0123456789abcdef"
    for shard in manifest["shards"]:
        assert shards.shard_damage(tmp_path / "a", shard, check_content=True) is None
    assert (shards.SETTINGS, shards.MANIFEST) == ("settings.json", "manifest.json")


@pytest.mark.parametrize("flips", [False, True])
def test_statistics_are_those_of_sampled_latents(tmp_path, flips):
    source = Pictures(50, bad=[3, 49])
    make_cache(tmp_path / "a", source, flips)
    good = np.delete(source.pixels, [3, 49], axis=0)
    mean, std = np.split(np.float64((encode_both if flips else encode)(good)), 2, axis=-1)
    axes = tuple(range(mean.ndim - 1))
    stats = latents.CachedLatents(tmp_path / "a").latent_stats
    np.testing.assert_allclose(stats["mean"], mean.mean(axes), rtol=1e-6)
    np.testing.assert_allclose(stats["var"], mean.var(axes) + np.square(std).mean(axes), rtol=1e-6)
    drawn = mean + std * np.random.default_rng(0).standard_normal((200, *mean.shape))
    np.testing.assert_allclose(stats["var"], drawn.var((0, *(axis + 1 for axis in axes))), rtol=0.03)
    read = vae_files.read_latent_stats(tmp_path / "a" / latents.STATS)
    for name in stats:
        np.testing.assert_allclose(read[name], stats[name], rtol=1e-6)


@pytest.mark.integration
def test_worker_processes_and_block_sizes_change_nothing(tmp_path):
    source = Pictures(7, bad=[2])
    make_cache(tmp_path / "a", source)
    make_cache(tmp_path / "b", source, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---- interruptions --------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_killed_at_random_times_the_files_are_the_same(tmp_path):
    script = f"import caches; caches.interrupted_trials({str(tmp_path)!r}, 6, 0)"
    run = run_script(script)
    assert run.returncode == 0, run.stderr
    trials = [json.loads(line) for line in run.stdout.splitlines()]
    whole = contents(tmp_path / "whole")
    assert len(trials) == 6 and sum(trial["kills"] for trial in trials) >= 2  # how many depends on the machine's speed
    for trial in range(6):
        assert contents(tmp_path / f"cut-{trial}") == whole
    cache = latents.CachedLatents(tmp_path / "whole")
    source = Pictures(90)
    for i in set(range(90)) - {17, 40}:  # nothing is lost, nothing is there twice
        np.testing.assert_array_equal(cache[i]["moments"], encode(source.pixels[i : i + 1])[0])


def test_asked_to_stop_it_keeps_finished_shards(tmp_path):
    source, stopped = Pictures(40), threading.Event()

    def stop_after_two_shards(pixels):
        if (tmp_path / "cut" / "shard-00001.json").exists():
            stopped.set()
        return encode(pixels)

    assert make_cache(tmp_path / "cut", source, encode=stop_after_two_shards, stopped=stopped) is None
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("shard-*")}
    assert len(kept) in (4, 6)  # two shards, or three: one is written while the next is encoded
    with pytest.raises(ValueError, match="has no manifest.json.*unfinished.*continues where it stopped"):
        latents.CachedLatents(tmp_path / "cut")
    assert make_cache(tmp_path / "cut", source) == 5 - len(kept) // 2
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    make_cache(tmp_path / "whole", source)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_cache_is_left_alone(tmp_path):
    source = Pictures(20)
    make_cache(tmp_path / "a", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert make_cache(tmp_path / "a", source) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *itertools.product(
            ["shard-00001.array_record", "labels.npy", "latents-stats.safetensors", "manifest.json"], ["cut", "byte", "gone"]
        ),
        ("shard-00001.json", "cut"),
        ("shard-00001.json", "gone"),
    ],
)
def test_damaged_files_are_made_again(tmp_path, warnings, name, damage):
    source = Pictures(20)
    make_cache(tmp_path / "a", source)
    before = contents(tmp_path / "a")
    file = tmp_path / "a" / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        at = len(whole) // 2
        file.write_bytes(whole[:at] + (b"" if damage == "cut" else bytes([whole[at] ^ 1]) + whole[at + 1 :]))
    make_cache(tmp_path / "a", source)
    assert contents(tmp_path / "a") == before
    latents.CachedLatents(tmp_path / "a")


# ---- several processes ----------------------------------------------------------------------------------------------


def test_every_process_makes_its_own_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    source, counts = Pictures(50, bad=[9]), {}

    def work(process):
        counts[process] = make_cache(tmp_path / "three", source, process_index=process, process_count=3)

    in_threads(work)
    assert counts == {0: 3, 1: 2, 2: 2}
    make_cache(tmp_path / "one", source)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_what_another_number_of_processes_began_is_continued(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "_POLL_SECONDS", 0.01)
    source, stopped = Pictures(50), threading.Event()
    threading.Timer(1.0, stopped.set).start()
    assert make_cache(tmp_path / "a", source, stopped=stopped, process_count=3) is None  # waits for processes 1 and 2
    assert make_cache(tmp_path / "a", source) == 4
    make_cache(tmp_path / "one", source)
    assert contents(tmp_path / "a") == contents(tmp_path / "one")


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fingerprint": "fedcba9876543210"}, "fingerprint: '0123456789abcdef' there, 'fedcba9876543210' here"),
        ({"shard_size": 4}, "shard_size: 8 there, 4 here"),
        ({"precision": "bfloat16"}, "precision: 'float32' there, 'bfloat16' here"),
        ({"latent_shape": [1, 2, 2]}, r"latent_shape: \[2, 2, 2\] there, \[1, 2, 2\] here"),
    ],
)
def test_other_settings_do_not_mix(tmp_path, changes, message):
    source = Pictures(20)
    make_cache(tmp_path / "a", source)
    before = contents(tmp_path / "a")
    with pytest.raises(ValueError, match=f"made with other settings; choose another --out(.|\n)*{message}"):
        make_cache(tmp_path / "a", source, changes=changes)
    assert contents(tmp_path / "a") == before


def test_other_images_do_not_mix(tmp_path):
    make_cache(tmp_path / "a", Pictures(20))
    for other in (Pictures(20, label_shift=1), Pictures(20, name="photo"), Pictures(21)):
        with pytest.raises(ValueError, match="records_hash"):
            make_cache(tmp_path / "a", other)


def test_files_may_move(tmp_path):
    """The paths of weights and images are notes, and may differ."""
    make_cache(tmp_path / "a", Pictures(20))
    before = contents(tmp_path / "a")
    assert make_cache(tmp_path / "a", Pictures(20), changes={"vae": "elsewhere/vae.pt"}) == 0
    assert contents(tmp_path / "a") == before


def test_too_many_bad_images(tmp_path, warnings):
    source = Pictures(40, bad=[3, 11, 30])
    message = r"3 of 40 records \(7.50%\) cannot be decoded, 2 are allowed: picture-3, picture-11, picture-30. .* broken 30"
    for _ in range(2):  # records of finished shards count
        with pytest.raises(RuntimeError, match=message):
            make_cache(tmp_path / "a", source, max_bad_fraction=0.05)
    assert any("picture-11: OSError: broken 11" in warning for warning in warnings)
    make_cache(tmp_path / "a", source)
    assert shards.read_manifest(tmp_path / "a", latents.FORMAT)["bad_records"] == [[i, f"picture-{i}"] for i in (3, 11, 30)]


def test_nothing_but_bad_images(tmp_path, warnings):
    with pytest.raises(RuntimeError, match="no image could be decoded"):
        make_cache(tmp_path / "a", Pictures(5, bad=range(5)))


def test_latents_that_are_not_finite(tmp_path):
    source = Pictures(20)

    def overflow(pixels):
        moments = encode(pixels)
        moments[(pixels == source.pixels[12]).all((1, 2, 3))] = np.inf
        return moments

    with pytest.raises(RuntimeError, match="latents of 1 images are not finite, first picture-12; .*config.init.vae"):
        make_cache(tmp_path / "a", source, encode=overflow)


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    write, written = shard_writer.ArrayRecordWriter, []

    class Full(write):
        def close(self):
            super().close()
            written.append(self)
            if len(written) == 2:
                raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(shard_writer, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="shard-00001.array_record could not be written .*No space left.* GB free: make space"):
        make_cache(tmp_path / "a", Pictures(20))
    assert sorted(contents(tmp_path / "a")) == ["settings.json", "shard-00000.array_record", "shard-00000.json"]


# ---- with a VAE -----------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("flips", [False, True])
def test_moments_are_those_of_the_vae(tmp_path, flips):
    config = frozen_config()
    count = cache_latents.cache_latents(config, tmp_path / "a", flips, shard_size=200)
    assert count == 2
    job, source = build.build(config), training_data.make_images(config)
    params = frozen_weights.load_frozen(job)["vae"]
    cache = latents.CachedLatents(tmp_path / "a")
    latents.check_cache(cache, cache_latents.fingerprint(params), job.latent_shape, 8)
    joined = latents.WithMoments(source, cache)
    assert len(joined) == 355 and cache.vae == "random" and cache.latent_shape == job.latent_shape

    @jax.jit
    def expected(pixels):
        posterior = job.nets.vae.apply({"params": params}, images.to_float(pixels), method="encode")
        return jnp.concatenate([posterior.mean, jnp.exp(0.5 * posterior.logvar)], axis=-1)

    records = [0, 199, 200, 354]
    pixels = np.stack([source[i]["image"] for i in records])
    moments = np.stack([joined[i]["moments"] for i in records])
    sides = [pixels, pixels[:, :, ::-1]] if flips else [pixels]
    for side, actual in zip(sides, np.moveaxis(moments, 1, 0) if flips else [moments]):
        np.testing.assert_allclose(actual, expected(side), rtol=1e-5, atol=1e-6)


@pytest.mark.integration
def test_training_takes_the_flags_that_it_prints(tmp_path):
    cache_latents.cache_latents(frozen_config(), tmp_path / "a")
    text = cache_latents.summary(tmp_path / "a")
    assert "355 records (0 undecodable) of (4, 4, 8) in 1 shards" in text
    given = dict(word.removeprefix("--config.").split("=") for word in text.split() if word.startswith("--config."))
    assert sorted(given) == ["data.cache", "init.latent_stats"]
    stats = latents.CachedLatents(given["data.cache"]).latent_stats
    for name, values in vae_files.read_latent_stats(given["init.latent_stats"]).items():
        np.testing.assert_allclose(values, stats[name], rtol=1e-6)
    # a config that names a cache can be cached again
    assert cache_latents.cache_latents(frozen_config({"data.cache": given["data.cache"]}), tmp_path / "a") == 0


@pytest.mark.slow
def test_two_processes_of_jax_and_the_command(tmp_path):
    """Two with four devices each, and the command line with eight: the same files."""
    config = tmp_path / "config.py"
    config.write_text("from caches import frozen_config as get_config\n")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    script = f"""
import sys, jax
jax.distributed.initialize({address!r}, num_processes=2, process_id=int(sys.argv[1]))
assert jax.device_count() == 8 and jax.local_device_count() == 4
import caches
from repae_jax import cache_latents
print(cache_latents.cache_latents(caches.frozen_config(), {str(tmp_path / "two")!r}, shard_size=40))
"""
    arguments = [["-c", script, str(process)] for process in range(2)]
    arguments.append(["-m", "repae_jax.cache_latents", "--config", config, "--shard_size=40", "--out", tmp_path / "one"])
    started = []
    for given, devices in zip(arguments, (4, 4, 8)):
        env = script_env(XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        command = [sys.executable, *given]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in started]
    assert [output for output, _ in outputs[:2]] == ["5\n", "4\n"], outputs
    assert outputs[2][0].startswith(f"{tmp_path / 'one'}: 355 records (0 undecodable)"), outputs
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (lambda: small.config(), {}, "config.job='repae' trains its VAE, whose latents change"),
        (lambda: frozen_config({"init.vae": ""}), {}, "config.init.vae is empty"),
        (lambda: frozen_config(), {"out": "gs://bucket/cache"}, "goes to a local or mounted disk, not to gs://bucket/cache"),
        (lambda: frozen_config(), {"out": "/proc/cache"}, "'/proc/cache' cannot be written to"),
        (lambda: frozen_config(), {"shard_size": 0}, "shard_size is 0; allowed: 1 and above"),
    ],
)
def test_mistakes(tmp_path, config, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        cache_latents.cache_latents(config(), **{"out": tmp_path / "a", **options})
    assert cli.line_of(caught.value)
