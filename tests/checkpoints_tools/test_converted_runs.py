"""Runs of every job: converted, extracted, continued, inspected, sampled. Their checkpoints are written, not trained."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
import small
from command_line import call, error_of
from small_files import published_shapes
from weight_files import write_torch

from checkpoints_tools import published, published_args, vae, vae_layouts, weights
from configs import ldm
from configs import vae as vae_config
from repae_jax import sample
from repae_jax.job import build, frozen_weights, initial_state
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.sampling.load_model import load_model
from repae_jax.training import checkpoint, checkpoint_files
from repae_jax.training.optimizer import without_fixed

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.integration
STEP = 7
ENCODERS = {
    "target": {
        "architecture": {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}, "weights": "random", "image_size": 8,
        "spatial_gamma": None,
    },
}  # fmt: skip


def make_config(module, **changes):
    """A job's tiny preset at 8 x 8 pixels, with a VAE of 32 group-norm groups, as published files have."""
    config = module.get_config("tiny").unlock()
    config.data.image_size = 8
    config.vae.update(channel_multipliers=(1, 1), channels=32, norm_groups=32)
    if "disc" in config:
        config.disc.num_layers = 1
    if "sit" in config:
        config.encoders = ENCODERS
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[field] = value
    return config


def make_run(folder, config):
    """(job, state, workdir) of a run with one checkpoint, of random weights and moments, its averages others."""
    job = build.build(config, jax.devices()[:1])
    rng = np.random.default_rng(0)
    abstract = initial_state.abstract_state(job)
    state = jax.tree_util.tree_map_with_path(lambda path, leaf: small._random_leaf(path, leaf, rng), abstract)
    for name in ("sit", "vae", "disc"):
        if (net := getattr(state, name)) is not None:
            mu, nu = (jax.tree.map(lambda x: rng.random(x.shape, np.float32), net.params) for _ in range(2))
            mu, nu = (without_fixed(net.opt_state, tree) for tree in (mu, nu))
            opt_state = optax.tree.set(net.opt_state, mu=mu, nu=nu, count=np.int32(STEP))
            state = state.replace(**{name: net.replace(opt_state=opt_state)})
    state = state.replace(step=np.int32(STEP))
    loader_state = {"next_batch": STEP, "bad_records": [], "records": 10}
    fingerprint = checkpoint.fingerprint(frozen_weights.load_frozen_vae(job)) if job.frozen_vae else None
    data_state = {"loader": loader_state, "inputs": {"frozen_vae": fingerprint, "records": ""}}
    with checkpoint.Checkpointer(folder) as checkpointer:
        assert checkpointer.save(STEP, state, data_state, job.config)
    return job, state, folder


def make_vae(folder, seed=0):
    module = make_config(vae_config).vae.to_dict()
    module = AutoencoderKL(**{name: tuple(x) if isinstance(x, list) else x for name, x in module.items()})
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), vae_layouts.abstract_params(module))
    stats = {"mean": np.float32([0.1, -0.2, 0.3, 0.4]), "var": np.float32([0.5, 1.0, 2.0, 4.0])}
    vae.save_diffusers(folder, module, params, stats)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def frozen_vae(folder):
    return make_vae(folder / "vae")


@pytest.fixture(scope="module")
def sit_run(folder, frozen_vae):
    return make_run(folder / "sit", make_config(ldm, init__vae=str(frozen_vae)))


@pytest.fixture(scope="module")
def self_run(folder, frozen_vae):
    """It aligns with its average, beside an encoder."""
    run = {"loss__sit__self": 0.8, "loss__self_depth": 2, "diffusion__second_time_share": 0.25}
    return make_run(folder / "self", make_config(ldm, init__vae=str(frozen_vae), **run))


@pytest.fixture(scope="module")
def dit_run(folder, frozen_vae):
    """It has no encoders. Its norms tell the number of heads, so that its weights alone can be read."""
    config = make_config(
        ldm, init__vae=str(frozen_vae), encoders={}, sit__qk_norm=True, sit__learned_sigma=True, diffusion__path="ddpm",
        sampling__sampler="ancestral",
    )  # fmt: skip
    config.loss.sit.update(velocity=0.0, align=0.0, noise=1.0, bound=1.0)
    return make_run(folder / "dit", config)


@pytest.fixture(scope="module")
def vae_run(folder):
    """VA-VAE's training, with a map from latents to tokens."""
    return make_run(folder / "tokenizer", make_config(vae_config, encoders=ENCODERS, loss__vae__vf=0.1))


@pytest.fixture(scope="module")
def disc_run(folder, frozen_vae):
    config = make_config(vae_config, init__vae=str(frozen_vae))
    config.loss.vae.update(dict.fromkeys(config.loss.vae, 0.0))
    return make_run(folder / "disc", config)


@pytest.fixture(scope="module")
def converted(folder, sit_run, self_run, dit_run):
    """Job -> folder of the published layout."""
    targets = {name: folder / f"{name}-published" for name in ("sit", "self", "dit")}
    for target, (_, _, workdir) in zip(targets.values(), (sit_run, self_run, dit_run)):
        assert call("convert", workdir, target) == 0
    return targets


def torch_content(folder):
    with torch.serialization.safe_globals([published.argparse.Namespace]):
        return torch.load(folder / "checkpoints" / f"{STEP:07d}.pt", weights_only=True)


def images(workdir, **options):
    """The first samples of a run, as `repae_jax.sample` makes them."""
    trained = load_model(workdir, devices=jax.devices()[:1], **options)
    sampling = dataclasses.replace(trained.sampling, steps=3, guidance_scale=1.5, guidance_channels=3)
    labels = np.arange(4, dtype=np.int32)
    return np.concatenate([batch for _, batch in sample.sample_batches(trained, sampling, labels, 4, 0)])


def continued(run, path, **init):
    job = run[0]
    files = {**job.config["init"], "checkpoint": str(path), **init}
    config = {**job.config, "init": files, "steps": STEP + 1}
    return initial_state.create_initial_state(build.build(config, jax.devices()[:1]), {"vae": None}, None)


# ---------------------------------------------------------------------------------------------------------------------
# On a frozen VAE.
# ---------------------------------------------------------------------------------------------------------------------


def test_the_published_layout_of_a_run_on_a_frozen_vae(converted, frozen_vae):
    """sit-ldm-*: names, shapes and order of the published modules; AdamW's state without one of the fixed positions."""
    content = torch_content(converted["sit"])
    assert set(content) == {"model", "ema", "opt", "args", "steps"} and content["steps"] == STEP
    shapes = published_shapes(
        hidden_size=32, depth=2, patch_size=1, rows=11, tokens=16, features=(16,), projector=32, norm=True
    )  # fmt: skip
    for name in ("model", "ema"):
        assert [(key, tuple(value.shape)) for key, value in content[name].items()] == list(shapes.items())
    parameters = [name for name in shapes if not name.startswith("bn.")]
    assert content["opt"]["param_groups"][0]["params"] == list(range(len(parameters)))
    assert parameters[0] == "pos_embed" and set(content["opt"]["state"]) == set(range(1, len(parameters)))
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(shapes[name])) for name in parameters])
    adam.load_state_dict(content["opt"])

    args = json.loads((converted["sit"] / "args.json").read_text())
    assert args["vae_ckpt"] == str(frozen_vae) and args["vae_latents_name"] == "vae" and args["enc_type"] == "custom"
    assert (args["path_type"], args["prediction"], args["bn_momentum"]) == ("linear", "v", 0.1)
    assert not {"loss_cfg_path", "disc_pretrained_ckpt", "vae_learning_rate", "vae_align_proj_coeff"} & set(args)


def test_a_dit_and_a_run_without_encoders(converted):
    content = torch_content(converted["dit"])
    assert not any(name.startswith("projectors.") for name in content["model"])
    assert tuple(content["ema"]["final_layer.linear.weight"].shape) == (8, 32)
    args = json.loads((converted["dit"] / "args.json").read_text())
    assert (args["path_type"], args["prediction"], args["enc_type"]) == ("ddpm", "eps", "None")


@pytest.mark.parametrize("name", ["sit", "self", "dit"])
def test_it_comes_back_bit_for_bit(request, converted, name):
    run = request.getfixturevalue(f"{name}_run")
    assert small.differing(continued(run, converted[name]), run[1]) == []


@pytest.mark.parametrize("name", ["sit", "self", "dit"])
def test_the_same_images_from_the_run_and_its_conversion(request, converted, frozen_vae, name):
    expected = images(request.getfixturevalue(f"{name}_run")[2])
    assert len({image.tobytes() for image in expected}) == 4
    np.testing.assert_array_equal(images(converted[name], vae_path=frozen_vae), expected)


def test_published_dits(dit_run, converted, frozen_vae, tmp_path):
    """DiT-XL-2-256x256.pt holds weights alone: only who samples can say that they are not a plain SiT's."""
    ema = dict(published.read(converted["dit"]).networks["ema"])
    bare = {name: array for name, array in ema.items() if not name.startswith("bn.")}
    write_torch(tmp_path / "DiT.pt", bare)
    with pytest.raises(ValueError, match="plain SiT, whose t = 0 is noise.*convert --plain_sit.*--sampler ancestral"):
        images(tmp_path / "DiT.pt", vae_path=frozen_vae)
    with pytest.raises(ValueError, match="as REPA and DiT have none: give --vae as diffusers' folder"):
        images(tmp_path / "DiT.pt", vae_path=_without_stats(frozen_vae, tmp_path), sampler="ancestral")
    samples = images(tmp_path / "DiT.pt", vae_path=frozen_vae, sampler="ancestral")
    trained = load_model(tmp_path / "DiT.pt", vae_path=frozen_vae, sampler="ancestral")
    assert (trained.sampling.sampler, trained.sampling.steps) == ("ancestral", 250)

    # the same weights as a run that has the statistics of that VAE
    stats = vae.read_latent_stats(frozen_vae)
    state = continued(dit_run, tmp_path / "DiT.pt", latent_stats=str(frozen_vae))
    for net in (state.sit, state.ema):
        assert small.differing(net.params, dit_run[1].ema.params) == []
    np.testing.assert_array_equal(state.ema.latent_stats.var, stats["var"])
    _, _, workdir = dit_run
    config = checkpoint.read_config(workdir)
    again = tmp_path / "again"
    with checkpoint.Checkpointer(again) as checkpointer:
        checkpointer.save(STEP, jax.device_get(state), checkpoint.read_data_state(workdir), config)
    np.testing.assert_array_equal(samples, images(again))


def _without_stats(folder, tmp_path):
    loaded = vae.load_vae(folder)
    vae.save_published(tmp_path / "bare.pt", loaded.module, loaded.params, None)
    return tmp_path / "bare.pt"


def test_a_dits_file_is_none_for_a_velocity(sit_run, converted, tmp_path):
    ema = dict(published.read(converted["dit"]).networks["ema"])
    write_torch(tmp_path / "DiT.pt", {name: array for name, array in ema.items() if not name.startswith("bn.")})
    with pytest.raises(ValueError, match="for training with config.diffusion.path='ddpm'"):
        continued(sit_run, tmp_path / "DiT.pt")
    with pytest.raises(ValueError, match="config.diffusion.path='linear', but path_type='ddpm'"):
        continued(sit_run, converted["dit"])


def test_a_checkpoint_without_a_projector_to_its_own_tokens(self_run, converted):
    with pytest.raises(ValueError, match=r"config.init.checkpoint: .*no projector .*projectors\.1\..*config.loss.sit.self=0.8"):
        continued(self_run, converted["sit"])


def test_a_checkpoint_of_another_job(sit_run, converted, tmp_path):
    """Arguments of fields that this job does not have are no difference."""
    args = published.read(converted["sit"]).args | {"vae_learning_rate": 1.0, "bn_momentum": 0.1, "cfg_prob": 0.2}
    differences = published_args.check_args(args, sit_run[0].config, "x.pt")
    assert differences == ["config.diffusion.label_dropout=0.1, but cfg_prob=0.2"]


def test_the_frozen_vae_must_be_the_right_one(sit_run, frozen_vae, tmp_path):
    _, _, workdir = sit_run
    other = make_vae(tmp_path / "other", seed=1)
    with pytest.raises(
        ValueError, match="trained on the frozen VAE .* not on .*other, which is .* give the right one as --vae"
    ):
        images(workdir, vae_path=other)
    moved = tmp_path / "run"
    shutil.copytree(workdir, moved)
    parts = [moved / "checkpoints" / str(STEP) / name / "metadata" for name in ("config", "checksums")]
    config, checksums = (json.loads(part.read_text()) for part in parts)
    config["init"]["vae"] = str(tmp_path / "gone")
    checksums["parts"]["config"] = checkpoint_files.digest(config)
    for part, content in zip(parts, (config, checksums)):
        part.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match="has a frozen VAE, .*gone, which is not there: give --vae"):
        images(moved)
    np.testing.assert_array_equal(images(moved, vae_path=frozen_vae), images(workdir))


def test_a_run_on_a_frozen_vae_holds_none(sit_run, frozen_vae, tmp_path, monkeypatch):
    message = error_of(monkeypatch, "extract-vae", sit_run[2], tmp_path / "x.pt")
    assert "a run on a frozen VAE and holds none" in message and f"config.init.vae={str(frozen_vae)!r}" in message
    message = error_of(monkeypatch, "convert", sit_run[2], tmp_path / "x-discriminator-ckpt.pt")
    assert "without a discriminator" in message
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers.
# ---------------------------------------------------------------------------------------------------------------------


def test_the_vae_of_a_tokenizers_run(vae_run, tmp_path):
    """The averaged one, and the map to the encoder's tokens for a further stage of its training."""
    job, state, workdir = vae_run
    call("extract-vae", workdir, tmp_path / "e2e.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"e2e.pt", "e2e-latents-stats.pt", "e2e-discriminator-ckpt.pt"}
    content = torch.load(tmp_path / "e2e.pt", weights_only=True)
    assert list(content)[-1] == "linear_proj.weight" and tuple(content["linear_proj.weight"].shape) == (16, 4, 1, 1)
    np.testing.assert_array_equal(content["linear_proj.weight"][:, :, 0, 0].T, state.ema.params["vf_projection"]["kernel"])
    np.testing.assert_array_equal(vae.read_latent_stats(tmp_path / "e2e-latents-stats.pt")["mean"], state.latent_stats.mean)
    assert job.nets.vae.feature_dim == 16
    params = vae.read_vae_params(tmp_path / "e2e.pt", job.nets.vae)
    assert small.differing(params, state.ema.params) == []

    call("extract-vae", workdir, tmp_path / "folder")  # diffusers knows no such map
    assert not any("proj." in name and "linear" in name for name in weights.read_state_dict(tmp_path / "folder"))
    params = vae.read_vae_params(tmp_path / "folder", job.nets.vae)
    assert "vf_projection" not in params
    assert small.differing(params, {name: tree for name, tree in state.ema.params.items() if name != "vf_projection"}) == []


def test_the_discriminator_alone(vae_run, disc_run, tmp_path):
    call("extract-vae", vae_run[2], tmp_path / "e2e.pt")
    for (job, state, workdir), name in ((vae_run, "a"), (disc_run, "b")):
        path = tmp_path / f"{name}-discriminator-ckpt.pt"
        call("convert", workdir, path)
        config = {**job.config, "init": {"vae": job.config["init"]["vae"], "disc": str(path)}}
        places, _, _ = initial_state._read_init(build.build(config, jax.devices()[:1]), initial_state.abstract_state(job))
        assert small.differing(places["disc.params"], state.disc.params) == []
        assert small.differing(places["disc.batch_stats"], state.disc.batch_stats) == []
    extracted = (tmp_path / name for name in ("a-discriminator-ckpt.pt", "e2e-discriminator-ckpt.pt"))
    assert small.differing(*map(weights.read_state_dict, extracted)) == []


def test_what_a_tokenizers_run_is_not(vae_run, disc_run, frozen_vae, tmp_path, monkeypatch):
    for arguments, words in (
        (
            ("convert", vae_run[2], tmp_path / "x.pt"),
            "-discriminator-ckpt.pt to have its discriminator; extract-vae writes its VAE",
        ),
        (("convert", vae_run[2], tmp_path / "x"), "without a SiT, which cannot become a published training checkpoint"),
        (("convert", disc_run[2], tmp_path / "x.pt"), "NAME-discriminator-ckpt.pt to have its discriminator"),
        (("extract-vae", disc_run[2], tmp_path / "x.pt"), f"config.init.vae={str(frozen_vae)!r}; convert it to NAME-disc"),
    ):
        message = error_of(monkeypatch, *arguments)
        assert words in message, message
    assert not list(tmp_path.iterdir())
    for _, _, workdir in (vae_run, disc_run):
        with pytest.raises(ValueError, match="a run of a tokenizer: it has no SiT to sample from"):
            load_model(workdir)


# ---------------------------------------------------------------------------------------------------------------------
# Looking.
# ---------------------------------------------------------------------------------------------------------------------


def test_inspect(sit_run, dit_run, vae_run, disc_run, frozen_vae, capsys):
    runs = {"sit": sit_run, "dit": dit_run, "tokenizer": vae_run, "disc": disc_run}
    assert call("inspect", "--json", *(workdir for _, _, workdir in runs.values())) == 0
    about = dict(zip(runs, json.loads(capsys.readouterr().out)))
    parts = ("sit", "vae", "disc")
    held = {name: {part for part in parts if "parameters" in (entry[part] or {})} for name, entry in about.items()}
    assert held == {"sit": {"sit"}, "dit": {"sit"}, "tokenizer": {"vae", "disc"}, "disc": {"disc"}}
    assert [entry["job"] for entry in about.values()] == ["ldm", "ldm", "vae", "vae"]
    assert [entry.get("objective") for entry in about.values()] == ["linear", "ddpm", None, None]
    for name in ("sit", "dit", "disc"):
        assert about[name]["vae"]["frozen"] == str(frozen_vae) and len(about[name]["vae"]["fingerprint"]) == 16
    assert about["sit"]["encoders"] == {"target": "random"} and about["dit"]["encoders"] == {}
    assert about["tokenizer"]["vae"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(vae_run[1].vae.params))
    assert call("inspect", *(workdir for _, _, workdir in runs.values())) == 0
    assert "fingerprint: " in capsys.readouterr().out
