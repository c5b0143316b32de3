"""Runs as pipelines of diffusers: its own library makes the images that our sampler makes of the same noise."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command_line import call, error_of
from small_files import assert_same_bits, save_encoder, save_vae

import repae_jax
from checkpoints_tools import pipeline_folder
from checkpoints_tools.export import export
from checkpoints_tools.vae import stats_for_sit
from configs import ldm
from repae_jax.diffusion import ddpm
from repae_jax.diffusion.ddpm import NoiseObjective
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.diffusion.samplers import Sampling
from repae_jax.job import build, frozen_weights
from repae_jax.models.sit import SiT
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import load_model
from repae_jax.training import checkpoint

torch = pytest.importorskip("torch")
LABELS = np.asarray([0, 3, 9], np.int32)
STEPS = 5


def make_run(folder, config):
    """Folder of a run with one checkpoint, of random weights."""
    job = build.build(build.plain_config(config), jax.devices()[:1])
    fingerprint = checkpoint.fingerprint(frozen_weights.load_frozen_vae(job)) if job.frozen_vae else None
    with checkpoint.Checkpointer(folder) as checkpointer:
        data_state = {"loader": {}, "inputs": {"frozen_vae": fingerprint}}
        checkpointer.save(7, small.random_state(job), data_state, job.config)
    return folder


@pytest.fixture(scope="module")
def sit_run(tmp_path_factory):
    """REPA-E's, with all that diffusers' own DiT lacks, and aligned with its average, which samples do not show."""
    changes = {"sit.qk_norm": True, "sit.mlp_ratio": 2.0, "sit.learned_positions": True, "sampling.guidance_scale": 1.5}
    return make_run(tmp_path_factory.mktemp("sit") / "run", small.config({**changes, **small.SELF_FLOW}))


@pytest.fixture(scope="module")
def frozen_vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "vae"
    save_vae(folder)
    return folder


@pytest.fixture(scope="module")
def dit_run(tmp_path_factory, frozen_vae):
    changes = {
        "sit.learned_sigma": True, "diffusion.path": "ddpm", "sampling.sampler": "ancestral", "encoders": {},
        "init.vae": str(frozen_vae), "loss.sit": {"velocity": 0.0, "align": 0.0, "noise": 1.0, "bound": 1.0},
        "vae.channels": 32, "vae.norm_groups": 8, "vae.quant_convs": True,
    }  # fmt: skip
    return make_run(tmp_path_factory.mktemp("dit") / "run", small.config(changes, ldm))


@pytest.fixture
def pipeline_of(tmp_path, monkeypatch):
    """pipeline_of(folder) -> the pipeline as diffusers loads it."""
    import diffusers

    monkeypatch.setattr(diffusers.utils.dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def load(folder):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def noise_of(key, index, shape):
    """Noise number `index` of our sampler, channels first, for torch."""
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), index) for i in range(len(LABELS))]
    noise = np.stack([jax.random.normal(k, shape) for k in keys])
    return torch.tensor(noise.transpose(0, 3, 1, 2))


def our_images(model, sampling, key):
    run = jax.jit(generate.make_generate(model.nets, model.objective, model.latent_shape, sampling))
    images, finite = run(model.params, jnp.asarray(LABELS), jnp.arange(len(LABELS)), key)
    assert finite.all()
    return np.asarray(images).astype(int)


def check_images(ours, theirs):
    """Rounding of float32 moves a value over the border of two gray levels now and then, never further."""
    theirs = np.stack([np.asarray(image) for image in theirs]).astype(int)
    assert np.mean((ours > 0) & (ours < 255)) > 0.5 and ours.std() > 10  # pictures that could differ
    assert np.abs(ours - theirs).max() <= 1
    assert np.mean(ours != theirs) < 0.01


@pytest.mark.integration
def test_a_sit_makes_the_same_images_in_diffusers(sit_run, tmp_path, pipeline_of):
    assert call("export", sit_run, tmp_path / "hf", "--to", "diffusers") == 0
    pipeline, model, key = pipeline_of(tmp_path / "hf"), load_model(sit_run, devices=jax.devices()[:1]), jax.random.key(3)
    guidance = {"guidance_scale": 2.5, "guidance_low": 0.2, "guidance_high": 0.8, "guidance_channels": 3}
    latents = noise_of(key, STEPS, model.latent_shape)
    theirs = pipeline(LABELS.tolist(), STEPS, latents=latents, **guidance).images
    check_images(our_images(model, Sampling("euler", STEPS, **guidance), key), theirs)
    without = np.stack(pipeline(LABELS.tolist(), STEPS, latents=latents, output_type="np", guidance_scale=1.0).images)
    assert np.abs(without - np.stack(theirs) / 255).max() > 0.02  # guidance shows
    assert pipeline.config.guidance_scale == 1.5 and type(pipeline).__name__ == "SiTPipeline"


@pytest.mark.integration
def test_a_dit_makes_the_same_images_in_diffusers(dit_run, tmp_path, pipeline_of, monkeypatch):
    from diffusers.schedulers import scheduling_ddpm

    assert call("export", dit_run, tmp_path / "hf") == 0
    pipeline, model, key = pipeline_of(tmp_path / "hf"), load_model(dit_run, devices=jax.devices()[:1]), jax.random.key(3)
    noises = iter([noise_of(key, index, model.latent_shape) for index in range(STEPS)])
    doubled = lambda shape, **_: torch.cat([next(noises)] * 2, dim=1)[:, : shape[1]]  # noqa: E731
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", doubled)
    start = noise_of(key, STEPS, model.latent_shape)
    theirs = pipeline(LABELS.tolist(), STEPS, guidance_scale=1.5, latents=start).images
    check_images(our_images(model, Sampling("ancestral", STEPS, guidance_scale=1.5), key), theirs)


@pytest.mark.integration
def test_a_dit_takes_the_published_steps():
    import diffusers

    from checkpoints_tools.shipped.pipeline import SiTPipeline

    scheduler = diffusers.DDPMScheduler.from_config(pipeline_folder._SCHEDULERS[True])
    for steps in (2, 21, 69, 250, 999, 1000):  # 21, 69 and 999 meet halves, which are rounded in two ways
        times = SiTPipeline._set_times(SimpleNamespace(scheduler=scheduler), steps, None)
        assert times == ddpm.timesteps(steps)[:-1].tolist(), steps


@pytest.mark.integration
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_a_sit_takes_shifted_steps(shift):
    """Those of our sampler, to its transformer and to diffusers' scheduler: rounding of float32."""
    import diffusers

    from checkpoints_tools.shipped.pipeline import SiTPipeline

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config({**pipeline_folder._SCHEDULERS[False], "shift": shift})
    times = SiTPipeline._set_times(SimpleNamespace(scheduler=scheduler), 7, None)
    expected = Sampling("euler", time_shift=shift).method.times(7)
    assert times == expected[:-1].tolist()
    np.testing.assert_allclose(scheduler.sigmas, expected, atol=1e-6)


@pytest.mark.integration
def test_a_pipeline_keeps_the_shift_of_its_run(tmp_path):
    folder = make_run(tmp_path / "run", small.config({"sampling.time_shift": 2.5}))
    assert call("export", folder, tmp_path / "hf") == 0
    assert json.loads((tmp_path / "hf" / "scheduler" / "scheduler_config.json").read_text())["shift"] == 2.5
    assert load_model(tmp_path / "hf").sampling == load_model(folder).sampling


@pytest.mark.integration
def test_networks_that_predict_latents_are_not_taken_for_others(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", small.config({"diffusion.predicts": "data"}))
    for command in (("export", folder, tmp_path / "hf"), ("convert", folder, tmp_path / "x.pt", "--weights_only")):
        text = error_of(monkeypatch, *command)
        assert "config.diffusion.predicts='data'" in text and "take the output for a velocity" in text


@pytest.mark.integration
def test_an_unusual_run_makes_the_same_images_in_diffusers(tmp_path, pipeline_of):
    config = small.config({"diffusion.path": "cosine", "data.num_classes": 1, "sit.projector": "conv"})
    config.encoders.second = config.encoders.target.copy_and_resolve_references()
    folder = tmp_path / "hf"
    folder.mkdir()  # empty, such as the place of a disk
    call("export", make_run(tmp_path / "run", config), folder)
    assert not list(folder.glob(".*"))
    pipeline, model, key = pipeline_of(folder), load_model(folder, devices=jax.devices()[:1]), jax.random.key(3)
    latents = noise_of(key, STEPS, model.latent_shape)
    settings = {"guidance_scale": 2.0, "guidance_high": 0.5}
    sampling = Sampling("euler", STEPS, **settings)
    run = jax.jit(generate.make_generate(model.nets, model.objective, model.latent_shape, sampling))
    ours = np.asarray(run(model.params, jnp.zeros(3, int), jnp.arange(3), key)[0]).astype(int)
    check_images(ours, pipeline([0, 0, 0], STEPS, latents=latents, **settings).images)
    tensors = pipeline([0, 0, 0], STEPS, latents=latents, output_type="pt", **settings).images
    assert np.abs(tensors.numpy().transpose(0, 2, 3, 1) * 255 - ours).max() <= 2
    pipeline.to(torch.bfloat16)
    coarse = pipeline([0, 0, 0], STEPS, latents=latents, output_type="np", **settings).images
    assert 0 < np.abs(coarse * 255 - ours).mean() < 8
    for labels in ([1], [-1], [0.5], []):
        with pytest.raises(ValueError, match="allowed: a list of whole numbers from 0 to 0"):
            pipeline(labels)
    with pytest.raises(ValueError, match="output_type 'jpg' is unknown; allowed: 'pil'"):
        pipeline([0], output_type="jpg")
    card = (folder / "README.md").read_text()
    assert "class_labels=[0], " in card and "model.sample([0], " in card and "class-conditional" not in card


@pytest.mark.integration
def test_an_exported_pipeline_is_read_as_the_run_it_is_of(sit_run, dit_run, tmp_path):
    for run in (sit_run, dit_run):
        folder = tmp_path / run.parent.name
        call("export", run, folder)
        trained, model, again = pipeline_folder.load(folder), load_model(run), load_model(folder)
        params = {name: leaf for name, leaf in model.params["sit"].items() if not name.startswith("projectors")}
        assert_same_bits(jax.device_get(again.params["sit"]), jax.device_get(params))
        assert_same_bits(jax.device_get(again.params["vae"]), jax.device_get(model.params["vae"]))
        np.testing.assert_allclose(again.params["latent_stats"].var, model.params["latent_stats"].var, rtol=1e-6)
        for name in ("latent_shape", "num_classes", "sampling", "step"):
            assert getattr(again, name) == getattr(model, name), name
        assert again.objective == (
            NoiseObjective() if run is dit_run else VelocityObjective()
        )  # how training draws is left out
        assert trained.config["data"]["num_classes"] == 10
    assert isinstance(repae_jax.load(folder), repae_jax.Model)
    assert isinstance(repae_jax.load_vae(folder), repae_jax.Vae)


@pytest.mark.integration
def test_a_published_checkpoint_is_exported(sit_run, tmp_path, monkeypatch):
    published = tmp_path / "whole.pt"
    call("convert", sit_run, published, "--weights_only")
    call("export", published, tmp_path / "hf")
    again, expected = load_model(tmp_path / "hf"), load_model(published)
    for name in ("sit", "vae"):
        params = {key: leaf for key, leaf in expected.params[name].items() if not key.startswith("projectors")}
        assert_same_bits(jax.device_get(again.params[name]), jax.device_get(params))
    assert (again.step, again.sampling.sampler, again.latent_shape) == (7, "sde", expected.latent_shape)
    assert "from a published checkpoint" in (tmp_path / "hf" / "README.md").read_text()
    message = error_of(monkeypatch, "export", published, tmp_path / "new", "--vae", tmp_path / "hf")
    assert "whole.pt holds a VAE of its own: leave" in message and not (tmp_path / "new").exists()


@pytest.mark.integration
def test_folders_that_cannot_be_made(monkeypatch, sit_run, dit_run, frozen_vae, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    assert "hf exists and is not empty: choose another name" in error_of(monkeypatch, "export", sit_run, folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    call("export", sit_run, folder, "--overwrite")
    assert (folder / "notes.txt").exists() and (folder / "model_index.json").exists()
    message = error_of(monkeypatch, "export", sit_run, sit_run, "--overwrite")
    assert "run is the folder of a run, which is no place for a pipeline" in message
    assert "is written to a local folder" in error_of(monkeypatch, "export", sit_run, "gs://bucket/hf")
    message = error_of(monkeypatch, "export", sit_run, tmp_path / "new", "--vae", frozen_vae)
    assert "is a run with a VAE of its own: leave" in message
    save_encoder(tmp_path / "encoder")
    message = error_of(monkeypatch, "export", tmp_path / "encoder", tmp_path / "new")
    assert "is a vision encoder (Hugging Face folder); a pipeline is made of a run" in message
    other = tmp_path / "other-vae"
    config = json.loads((frozen_vae / "config.json").read_text())
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config))
    arrays = read_arrays(frozen_vae)
    arrays["encoder.conv_in.bias"] = arrays["encoder.conv_in.bias"] + 1
    save_arrays(other, arrays)
    assert "was trained on the frozen VAE" in error_of(monkeypatch, "export", dit_run, tmp_path / "new", "--vae", other)
    assert not (tmp_path / "new").exists()
    assert "is no local path" in error_of(monkeypatch, "export", "nobody/nothing", tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.guidance_schedule": "linear"}, "config.sampling.guidance_schedule='linear', but a pipeline of diffusers"),
        ({"loss.sit.internal": 0.5}, "has a head for internal guidance, trained by config.loss.sit.internal"),
    ],
)
def test_guidance_that_a_pipeline_does_not_know(tmp_path, changes, message):
    run = make_run(tmp_path / "run", small.config(changes))
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "pipeline")


def test_a_published_sit_needs_a_vae_that_fits():
    sit = SiT(num_classes=10, latent_channels=4, patch_size=2, hidden_size=8, depth=1, num_heads=2, encoder_depth=1)
    mine, its = ({"mean": np.full(4, mean), "var": np.ones(4)} for mean in (0.0, 1.0))
    fitting, other = (SimpleNamespace(latent_channels=channels) for channels in (4, 16))
    assert stats_for_sit(sit, mine, fitting, its, "a.pt") is mine and stats_for_sit(sit, None, fitting, its, "a.pt") is its
    with pytest.raises(ValueError, match="the VAE has 16 latent channels, the SiT of a.pt 4"):
        stats_for_sit(sit, None, other, its, "a.pt")
    with pytest.raises(ValueError, match="a.pt has no latent batch norm, as REPA and DiT have none: give --vae as"):
        stats_for_sit(sit, None, fitting, None, "a.pt")


def test_a_damaged_pipeline(tmp_path):
    (tmp_path / "transformer").mkdir()
    for name in ("repae_jax.json", "transformer/config.json", "model_index.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match="is no pipeline that was exported here: 'num_attention_heads' is missing"):
        repae_jax.load(tmp_path)
    fields = "num_embeds_ada_norm", "in_channels", "patch_size", "attention_head_dim", "num_layers", "mlp_ratio", "qk_norm"
    config = dict.fromkeys((*fields, "num_attention_heads", "out_channels", "sample_size"), 0)
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "repae_jax.json").write_text('{"encoder_depth": 1}')
    with pytest.raises(ValueError, match="is not what it looks like, or it is damaged: ZeroDivisionError"):
        repae_jax.load(tmp_path)


def read_arrays(folder):
    import safetensors.numpy

    return safetensors.numpy.load_file(folder / "diffusion_pytorch_model.safetensors")


def save_arrays(folder, arrays):
    import safetensors.numpy

    safetensors.numpy.save_file(arrays, folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.integration
def test_a_pipeline_in_a_bucket_is_loaded_whole(sit_run, bucket, tmp_path):
    """Not its VAE alone; a folder that is no pipeline of ours stays what it was."""
    assert call("export", sit_run, tmp_path / "hf") == 0
    shutil.copytree(tmp_path / "hf", bucket / "hf")
    loaded, local = repae_jax.load("gs://bucket/hf"), repae_jax.load(tmp_path / "hf")
    assert isinstance(loaded, repae_jax.Model) and loaded.loaded.sampling == local.loaded.sampling
    assert_same_bits(jax.device_get(loaded.loaded.params), jax.device_get(local.loaded.params))
    copied = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert copied == {"model_index.json", "repae_jax.json", "config.json", "diffusion_pytorch_model.safetensors"}
    (bucket / "hf" / "repae_jax.json").unlink()
    assert isinstance(repae_jax.load("gs://bucket/hf"), repae_jax.Vae)
