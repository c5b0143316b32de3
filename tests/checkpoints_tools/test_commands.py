"""`python -m checkpoints_tools`, as its users call it: what it writes, prints and refuses."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import small
from command_line import call, error_of
from small_files import STATS, TINY_DINOV2, load_sit, torch_model
from weight_files import write_checkpoint, write_torch

from checkpoints_tools import __main__ as commands
from checkpoints_tools import (
    artefacts,
    convert,
    describe,
    identify,
    locate,
    published,
    sit,
    torch_param_order,
    training_state,
    vae,
    vae_stats,
    verify,
    weights,
)
from checkpoints_tools.mapping import to_torch
from configs import common, repae
from repae_jax import files
from repae_jax.job import build, initial_state
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.sit import SiT
from repae_jax.sampling.load_model import load_model
from repae_jax.training import checkpoint

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
# group norms of 32 groups, as all published files have
CHANGES = {"vae.channels": 32, "vae.norm_groups": 32}


@pytest.fixture(scope="module")
def job():
    return build.build(small.config(CHANGES), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(job):
    """A state with moments and an average of no special value."""
    base = small.random_state(job)
    other = small.random_state(job, seed=1)
    rng = np.random.default_rng(2)

    def with_moments(net):
        mu, nu = (jax.tree.map(lambda x: rng.random(x.shape, np.float32), net.params) for _ in range(2))
        return net.replace(opt_state=optax.tree.set(net.opt_state, mu=mu, nu=nu, count=np.int32(7)))

    nets = {name: with_moments(getattr(base, name)) for name in ("sit", "vae", "disc")}
    ema = base.ema.replace(params=other.sit.params, latent_stats=other.latent_stats)
    return jax.device_get(base.replace(step=np.int32(7), ema=ema, **nets))


@pytest.fixture(scope="module")
def workdir(job, state, tmp_path_factory):
    """A run with a checkpoint after step 7."""
    folder = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpointer(folder) as checkpointer:
        assert checkpointer.save(7, state, {"next_batch": 7, "bad_records": [], "records": 10}, job.config)
    return folder


@pytest.fixture(scope="module")
def published_run(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "run"
    assert call("convert", workdir, folder) == 0
    return folder


@pytest.fixture(scope="module")
def vae_folder(published_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "diffusers"
    assert call("extract-vae", published_run, folder) == 0
    return folder


def same_checkpoint(path, expected):
    a, b = published.read(path), published.read(expected)
    assert (a.steps, a.args, a.networks.keys()) == (b.steps, b.args, b.networks.keys())
    for name in b.networks:
        same_arrays(a.networks[name], b.networks[name])
    for name, adam in b.optimizers.items():
        assert a.optimizers[name].steps == adam.steps
        same_arrays(a.optimizers[name].exp_avg, adam.exp_avg)
        same_arrays(a.optimizers[name].exp_avg_sq, adam.exp_avg_sq)


def same_arrays(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].tobytes() == array.tobytes(), name


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_becomes_a_published_one_and_comes_back_bit_for_bit(job, state, published_run, tmp_path):
    assert sorted(str(path.relative_to(published_run)) for path in published_run.rglob("*.*")) == [
        "args.json", "checkpoints/0000007.pt",
    ]  # fmt: skip
    args = json.loads((published_run / "args.json").read_text())
    assert args["num_classes"] == 10 and args["encoder_depth"] == 1 and args["enc_type"] == "custom"

    files = {"checkpoint": str(published_run), "vae": "", "disc": "", "latent_stats": ""}
    config = {**job.config, "init": {**job.config["init"], **files}, "steps": 8, "ema_sigmas": (0.1,)}
    continued = initial_state.create_initial_state(build.build(config, jax.devices()[:1]), {"vae": None}, None)
    assert small.differing(continued.averages, {"sigma_0_1": state.ema}) == []
    assert small.differing(continued.replace(averages=None), state) == []


@pytest.mark.slow
def test_adamws_moments_are_not_muons(job, published_run, workdir, tmp_path):
    """A published checkpoint is continued by Muon only without its moments."""
    call("convert", workdir, tmp_path / "weights.pt", "--weights_only")

    def start(path):
        init = {"checkpoint": str(path), "vae": "", "disc": "", "latent_stats": ""}
        muon = {**job.config["optim"], "sit": {**job.config["optim"]["sit"], "method": "muon"}}
        config = {**job.config, "init": {**job.config["init"], **init}, "optim": muon, "steps": 8}
        return initial_state.create_initial_state(build.build(config, jax.devices()[:1]), {"vae": None}, None)

    with pytest.raises(ValueError, match=r"config.init.checkpoint: .* config.optim.sit.method='muon' cannot .*--weights_only"):
        start(published_run)
    state = start(tmp_path / "weights.pt")
    assert int(state.step) == 7 and not any(leaf.any() for leaf in jax.tree.leaves(state.sit.opt_state))


def test_the_published_code_reads_the_file(published_run):
    """It is read with torch alone, as its scripts do: plain tensors in a dict, args a Namespace."""
    with torch.serialization.safe_globals([commands.argparse.Namespace]):
        content = torch.load(published_run / "checkpoints" / "0000007.pt", weights_only=True)
    assert set(content) == {"model", "ema", "vae", "discriminator", "opt", "opt_vae", "opt_disc", "args", "steps"}
    assert content["steps"] == 7 and content["args"].qk_norm is False
    bn = torch.nn.BatchNorm2d(4, affine=False)
    bn.load_state_dict({name.removeprefix("bn."): value for name, value in content["ema"].items() if name.startswith("bn.")})
    assert int(bn.num_batches_tracked) == 7


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_every_way_to_a_single_file_gives_the_same_file(workdir, published_run, tmp_path, ending, capsys):
    assert call("convert", workdir, tmp_path / f"a{ending}") == 0
    assert call("convert", published_run, tmp_path / f"b{ending}") == 0
    assert f"wrote {tmp_path / f'a{ending}'}" in capsys.readouterr().out
    call("convert", tmp_path / f"a{ending}", tmp_path / "again")
    for path in (tmp_path / f"a{ending}", tmp_path / f"b{ending}", tmp_path / "again"):
        same_checkpoint(path, published_run)


def test_weights_only_leaves_the_optimizers_out(workdir, published_run, tmp_path):
    call("convert", workdir, tmp_path / "small.pt", "--weights_only")
    small_one, whole = published.read(tmp_path / "small.pt"), published.read(published_run)
    assert small_one.optimizers == {} and set(whole.optimizers) == {"opt", "opt_vae", "opt_disc"}
    same_arrays(small_one.networks["ema"], whole.networks["ema"])


def test_the_vae_of_a_run_in_the_published_layout(workdir, published_run, state, tmp_path):
    names = ["e2e.pt", "e2e-discriminator-ckpt.pt", "e2e-latents-stats.pt"]
    for source, folder in ((workdir, "a"), (published_run, "b")):
        call("extract-vae", source, tmp_path / folder / "e2e.pt")
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == sorted(names)
    for name in names:
        same_arrays(*(weights.read_state_dict(tmp_path / folder / name) for folder in "ab"))
    stats = torch.load(tmp_path / "a" / "e2e-latents-stats.pt", weights_only=True)
    assert stats["latents_scale"].shape == (1, 4, 1, 1)
    np.testing.assert_allclose(stats["latents_scale"].flatten(), 1 / np.sqrt(state.ema.latent_stats.var), rtol=1e-6)
    np.testing.assert_array_equal(stats["latents_bias"].flatten(), state.ema.latent_stats.mean)
    disc = weights.read_state_dict(tmp_path / "a" / "e2e-discriminator-ckpt.pt")
    same_arrays(disc, published.read(published_run).networks["discriminator"])


def test_diffusers_loads_the_folder(vae_folder, state):
    diffusers = pytest.importorskip("diffusers")
    model, info = diffusers.AutoencoderKL.from_pretrained(vae_folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    np.testing.assert_array_equal(np.float32(model.config.latents_mean), state.ema.latent_stats.mean)
    np.testing.assert_array_equal(np.float32(np.square(model.config.latents_std)), state.ema.latent_stats.var)


def test_a_vae_goes_round_all_layouts_bit_for_bit(published_run, vae_folder, tmp_path):
    call("convert", vae_folder, tmp_path / "a.pt")
    call("convert", tmp_path / "a.pt", tmp_path / "b.safetensors")
    call("convert", tmp_path / "b.safetensors", tmp_path / "folder")
    same_arrays(weights.read_state_dict(tmp_path / "a.pt"), published.read(published_run).networks["vae"])
    same_arrays(weights.read_state_dict(tmp_path / "folder"), weights.read_state_dict(vae_folder))
    for name, value in vae.read_latent_stats(vae_folder).items():  # in between, 1 / std was rounded to float32
        np.testing.assert_allclose(vae.read_latent_stats(tmp_path / "folder")[name], value, rtol=3e-7)


def test_a_source_is_resolved_and_read_once(vae_folder, tmp_path, monkeypatch):
    calls = []

    def counted(function):
        return lambda path, *args: calls.append((function.__name__, str(path))) or function(path, *args)

    monkeypatch.setattr(locate, "resolve", counted(locate.resolve))
    monkeypatch.setattr(weights, "read_file", counted(weights.read_file))
    call("convert", vae_folder, tmp_path / "vae.pt")
    assert calls == [("resolve", str(vae_folder)), ("read_file", str(vae_folder / "diffusion_pytorch_model.safetensors"))]


def save_plain_sit(path):
    """(module, variables) of a SiT-S/2 with sigma channels, written as plain SiT's file."""
    module = SiT(num_classes=10, latent_channels=4, patch_size=2, hidden_size=384, depth=12, num_heads=6, encoder_depth=12)
    module = module.clone(learned_sigma=True)
    rng = np.random.default_rng(0)
    target = sit.abstract_sit(module, 2, False)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), target)
    write_torch(path, to_torch(sit.sit_table(module, latent_norm=False), variables))
    return module, variables


def test_a_plain_sit_is_turned_round(tmp_path):
    plain, turned = tmp_path / "SiT-S-2.pt", tmp_path / "turned.pt"
    module, variables = save_plain_sit(plain)
    call("convert", plain, turned, "--plain_sit")

    loaded = load_sit(turned)
    assert loaded.layout == "repae" and not loaded.module.learned_sigma
    np.testing.assert_allclose(np.sqrt(loaded.variables["latent_stats"]["var"]), 1 / 0.18215, rtol=1e-6)
    z = np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)
    t, labels = np.float32([0.2, 0.9]), np.int32([3, 10])
    expected, _ = module.apply(variables, z, t, labels)
    velocity, _ = loaded.module.apply({"params": loaded.variables["params"]}, z, 1 - t, labels)
    np.testing.assert_allclose(velocity, -expected[..., :4], atol=2e-5 * np.abs(expected).max())

    with pytest.raises(ValueError, match="'repae', not a plain SiT"):
        convert.convert(turned, tmp_path / "twice.pt", plain_sit=True)


def test_a_plain_sit_of_its_training_file(tmp_path):
    """SiT's own checkpoints: model, ema, opt and args without a learning rate; the average is taken."""
    module = SiT(num_classes=10, latent_channels=4, patch_size=2, hidden_size=384, depth=12, num_heads=6, encoder_depth=12)
    rng = np.random.default_rng(0)
    target = sit.abstract_sit(module, 2, False)
    networks = [jax.tree.map(lambda leaf: rng.normal(0, 0.05, leaf.shape).astype(np.float32), target) for _ in range(2)]
    table = sit.sit_table(module, latent_norm=False)
    model, ema = (torch_param_order.to_ordered_torch(table, variables) for variables in networks)
    write_torch(tmp_path / "training.pt", {"model": model, "ema": ema, "args": commands.argparse.Namespace(lr=1)})
    with pytest.raises(ValueError, match="plain SiT, whose t = 0 is noise"):
        load_model(tmp_path / "training.pt")
    call("convert", tmp_path / "training.pt", tmp_path / "turned.safetensors", "--plain_sit")
    turned = load_sit(tmp_path / "turned.safetensors")
    np.testing.assert_array_equal(turned.variables["params"]["x_embedder"]["bias"], ema["x_embedder.proj.bias"])
    call("convert", tmp_path / "training.pt", tmp_path / "again.pt")
    same_arrays(published.read(tmp_path / "again.pt").networks["ema"], ema)


def test_legacy_names_in_a_training_file(published_run, tmp_path, caplog):
    """REPA's older checkpoints call the blocks behind the projectors decoder_blocks."""
    checkpoint = published.read(published_run)

    def legacy(arrays):
        return {name.replace("blocks.1.", "decoder_blocks.0."): array for name, array in arrays.items()}

    old = {name: legacy(checkpoint.networks[name]) for name in ("model", "ema")}
    args = commands.argparse.Namespace(**checkpoint.args)
    write_torch(tmp_path / "legacy.pt", {**old, "opt": {}, "args": args, "steps": 7})
    read = published.read(tmp_path / "legacy.pt")
    for name in ("model", "ema"):
        same_arrays(read.networks[name], dict(checkpoint.networks[name]))
    assert read.optimizers == {} and "its optimizers are left out" in caplog.text


def test_folders_may_have_dots_in_their_names(published_run, tmp_path):
    folder = tmp_path / "sit-xl-dinov2-b-enc8-repae-sdvae-0.5-1.5-400k"
    call("convert", published_run, folder)
    same_checkpoint(folder, published_run)


def test_networks_by_themselves_change_their_container(published_run, vae_folder, tmp_path):
    call("extract-vae", published_run, tmp_path / "e2e.pt")
    for name in ("e2e-discriminator-ckpt", "e2e-latents-stats"):
        call("convert", tmp_path / f"{name}.pt", tmp_path / f"{name}.safetensors")
        same_arrays(weights.read_state_dict(tmp_path / f"{name}.safetensors"), weights.read_state_dict(tmp_path / f"{name}.pt"))


MEASURED = """
import resource, sys, time
from checkpoints_tools.__main__ import parse_args, run
start = time.time()
run(parse_args(["convert", *sys.argv[1:]]))
print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--plain_sit"]])
def test_a_sit_xl_in_a_minute_and_two_and_a_half_times_its_size(tmp_path, options):
    module = SiT(num_classes=1000, latent_channels=4, patch_size=2, hidden_size=1152, depth=28, num_heads=16, encoder_depth=28)
    rng = np.random.default_rng(0)
    target = sit.abstract_sit(module, 16, False)
    variables = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), target)
    source = tmp_path / "sit.pt"
    write_torch(source, torch_param_order.to_ordered_torch(sit.sit_table(module, latent_norm=False), variables))
    del variables
    command = [sys.executable, "-c", MEASURED, str(source), str(tmp_path / "out.safetensors"), *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, peak = map(float, process.stdout.split()[-2:])
    print(f"{seconds:.0f} s, peak {peak / source.stat().st_size:.2f} times the file")
    assert seconds < 60 and peak < 2.5 * source.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------------------------------


def described(path, capsys):
    capsys.readouterr()
    assert call("inspect", path, "--json") == 0
    (about,) = json.loads(capsys.readouterr().out)
    assert call("inspect", path) == 0
    assert about["kind"] in capsys.readouterr().out
    return about


def test_inspect(job, state, workdir, published_run, vae_folder, tmp_path, capsys):
    sit_size = sum(leaf.size for leaf in jax.tree.leaves(state.sit.params))
    about = described(workdir, capsys)
    assert about["step"] == 7 and about["steps_saved"] == [7] and about["sit"]["parameters"] == sit_size

    about = described(published_run, capsys)
    assert about["kind"] == "published training checkpoint" and about["steps"] == 7
    assert about["ema"]["depth"] == 2 and about["ema"]["num_heads"] == 2 and about["ema"]["layout"] == "repae"
    assert about["model"]["parameters"] == sit_size + 2 * 4  # and the batch norm's statistics
    np.testing.assert_allclose(about["ema"]["latent_std"], np.sqrt(state.ema.latent_stats.var), rtol=1e-6)
    assert about["opt_vae"]["updates"] == 7 and about["vae"]["norm_groups"] == 32

    about = described(vae_folder, capsys)
    assert about["kind"] == "VAE" and about["layout"] == "diffusers" and about["factor"] == 2
    np.testing.assert_allclose(about["latent_mean"], state.ema.latent_stats.mean, rtol=1e-6)
    leaves = jax.tree.leaves(state.vae.params)
    assert about["parameters"] == sum(leaf.size for leaf in leaves)
    rms = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in leaves) / about["parameters"])
    assert about["rms"] == pytest.approx(rms)

    call("extract-vae", published_run, tmp_path / "e2e.pt")
    assert described(tmp_path / "e2e-latents-stats.pt", capsys)["kind"] == "latent statistics"
    assert described(tmp_path / "e2e-discriminator-ckpt.pt", capsys)["kind"] == "PatchGAN discriminator"


def test_inspect_counts_what_is_not_finite(published_run, tmp_path, capsys):
    arrays = dict(published.read(published_run).networks["ema"])
    arrays["blocks.0.mlp.fc1.bias"] = np.full_like(arrays["blocks.0.mlp.fc1.bias"], np.nan)
    # sizes are none of S, B, L and XL: with one head, the norms tell the heads
    weights.write_safetensors(tmp_path / "sit.safetensors", arrays)
    with pytest.raises(ValueError, match="give num_heads"):
        describe.describe(identify.identify(tmp_path / "sit.safetensors"))
    assert describe.weight_statistics(arrays)["not_finite"] == ["blocks.0.mlp.fc1.bias"]


def test_verify(published_run, vae_folder, capsys):
    pytest.importorskip("diffusers")
    assert call("verify", published_run, vae_folder, "--image_size", 16) == 0
    out = capsys.readouterr().out
    assert out.count("within 2e-05") == 2 and out.count("SiT velocity") == 1 and out.count("VAE decoder") == 2
    assert call("verify", vae_folder, "--image_size", 16, "--tolerance", 1e-12) == 1
    assert "NOT within 1e-12" in capsys.readouterr().out


def test_verify_sees_a_wrong_network(vae_folder, monkeypatch):
    """A network of ours that computes something else than PyTorch's."""
    pytest.importorskip("diffusers")
    right = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, z: right(self, z * (1 + 1e-4)))
    by_name = {difference.output: difference for difference in verify.verify(vae_folder, 16)}
    assert by_name["VAE decoder"].float32 > 2e-5 > by_name["VAE encoder, mean and log-variance"].float32


def test_the_list_of_artefacts(capsys):
    assert call("artefacts") == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "file", "what", "fills", "license"] and lines[-1] == artefacts.GATED
    listed = artefacts.ARTEFACTS
    assert [line.split()[0] for line in lines[:-2]] == [artefact.name for artefact in listed]
    assert len({artefact.name for artefact in listed}) == len(listed)
    config = repae.get_config()
    for artefact in listed:
        assert all(artefact), artefact
        hub = locate.HUB_NAME.fullmatch(artefact.name)
        if hub:
            assert not hub[1].endswith((".pt", ".pth")) and " " not in artefact.name
            if hub[2] and "." in hub[2]:
                assert artefact.file == hub[2]
        else:
            assert artefact.name.startswith("https://") and " " not in artefact.name
        if artefact.fills.startswith("config."):
            for filled in artefact.fills.split(", "):
                field = config
                for name in filled.replace("NAME", "target").split(".")[1:]:
                    assert name in field, artefact
                    field = field[name]
        elif artefact.fills.startswith("checkpoints_tools."):
            module, _, function = artefact.fills.rpartition(".")
            assert callable(getattr(importlib.import_module(module), function))
        else:
            commands.parse_args([*artefact.fills.split(), "source", "target"])


def test_every_encoder_is_in_the_list():
    known = {artefact.name for artefact in artefacts.ARTEFACTS} | {artefact.file for artefact in artefacts.ARTEFACTS}
    assert set(common.ENCODERS.values()) <= known


@pytest.mark.parametrize("command", ["", "inspect", "convert", "extract-vae", "verify", "artefacts"])
def test_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.parse_args([command, "--help"] if command else ["--help"])
    assert "usage: python -m checkpoints_tools" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["inspect ~/a gs://b/~/c", "convert ~/a ~/b --latent_stats ~/c", "extract-vae ~/a ~/b", "verify ~/a ~/b"]
)
def test_paths_below_the_home_folder(monkeypatch, command):
    """A shell leaves `~` alone within quotes, and after `=`."""
    monkeypatch.setenv("HOME", "/home/me")
    args = vars(commands.parse_args(command.split()))
    given = [path for value in args.values() for path in (value if isinstance(value, list) else [value])]
    expected = [word.replace("~/", "/home/me/") if word.startswith("~") else word for word in command.split() if "/" in word]
    assert [path for path in given if "/" in str(path)] == expected


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "checkpoints_tools", "inspect", str(tmp_path / "no.pt")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.startswith("error: ") and "no.pt does not exist" in process.stderr


def test_the_commands_of_the_readme(workdir, published_run, tmp_path, monkeypatch):
    """They run in their order, on tiny networks under the names that stand there."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/repae").symlink_to(workdir)
    call("extract-vae", published_run, "sdvae-f8d4.pt")
    torch_model("Dinov2Model", TINY_DINOV2).save_pretrained("facebook/dinov2-base")
    save_plain_sit("SiT-XL-2-256.pt")
    text = (ROOT / "checkpoints_tools" / "README.md").read_text()
    lines = re.findall(r"^python -m checkpoints_tools (?!--help)(.*)", text, flags=re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"inspect", "convert", "extract-vae", "export", "verify", "artefacts"}
    for line in lines:
        if "--push" in line:  # needs the hub
            continue
        tiny = ["--image_size", 16] if line.startswith("verify") else []
        assert call(*line.split(), *tiny) == 0, line


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one line that names the file and what is wrong; the target stays as it was.
# ---------------------------------------------------------------------------------------------------------------------


def network(published_run, name):
    return dict(published.read(published_run).networks[name])


DAMAGES = {
    "extra": (lambda arrays: arrays | {"encoder.stranger": np.zeros(3, np.float32)}, "encoder.stranger"),
    "missing": (lambda arrays: {n: a for n, a in arrays.items() if n != "decoder.conv_in.bias"}, "decoder.conv_in.bias"),
    "shape": (lambda arrays: arrays | {"encoder.norm_out.bias": np.zeros(7, np.float32)}, "encoder.norm_out.bias"),
    "dtype": (lambda arrays: arrays | {"encoder.norm_out.bias": np.zeros(32, np.int32)}, "encoder.norm_out.bias"),
    "nan": (lambda arrays: arrays | {"encoder.norm_out.bias": np.full(32, np.nan, np.float32)}, "encoder.norm_out.bias"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_networks(published_run, tmp_path, monkeypatch, damage):
    change, name = DAMAGES[damage]
    source, target = tmp_path / "vae.safetensors", tmp_path / "target.pt"
    target.write_bytes(b"precious")
    weights.write_safetensors(source, change(network(published_run, "vae")))
    for command in (["convert", source, target, "--overwrite"], ["convert", source, tmp_path / "folder"], ["verify", source]):
        message = error_of(monkeypatch, *command)
        assert str(source) in message and name in message
    assert target.read_bytes() == b"precious" and not (tmp_path / "folder").exists()


@pytest.mark.parametrize("part, name", [("ema", "blocks.1.attn.qkv.weight"), ("discriminator", "main.2.weight")])
def test_a_damaged_network_in_a_training_checkpoint(published_run, tmp_path, monkeypatch, part, name):
    checkpoint = published.read(published_run)
    for array in (None, np.full_like(checkpoint.networks[part][name], np.nan)):
        arrays = {**checkpoint.networks[part], name: array}
        networks = {**checkpoint.networks, part: {n: a for n, a in arrays.items() if a is not None}}
        source = tmp_path / "bad.safetensors"
        write_checkpoint(source, published.dataclasses.replace(checkpoint, networks=networks, optimizers={}), overwrite=True)
        message = error_of(monkeypatch, "convert", source, tmp_path / "target.pt")
        assert f"{source}: {part}" in message and name in message
        assert not (tmp_path / "target.pt").exists()


def test_files_that_cannot_be_read(published_run, vae_folder, tmp_path, monkeypatch):
    file = published_run / "checkpoints" / "0000007.pt"
    (tmp_path / "truncated.pt").write_bytes(file.read_bytes()[:-1000])
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    weights.write_safetensors(tmp_path / "stranger.safetensors", {"layer1.0.conv1.weight": np.zeros(3, np.float32)})
    (tmp_path / "resnet").mkdir()
    files.write_json(tmp_path / "resnet" / "config.json", {"model_type": "resnet"})
    for name, words in {
        "truncated.pt": "truncated",
        "pointer.pt": "Git LFS",
        "empty.safetensors": "empty",
        "stranger.safetensors": "layer1.0.conv1.weight",
        "absent.pt": "does not exist",
        "resnet": "resnet",
    }.items():
        for command in ("convert", "extract-vae"):
            message = error_of(monkeypatch, command, tmp_path / name, tmp_path / "target.pt")
            assert str(tmp_path / name) in message and words in message, message
        assert not (tmp_path / "target.pt").exists()


def test_targets_that_exist_are_kept(workdir, published_run, vae_folder, tmp_path, monkeypatch):
    run = shutil.copytree(published_run, tmp_path / "run")
    file = run / "checkpoints" / "0000007.pt"
    file.write_bytes(b"precious")
    assert f"{file} exists" in error_of(monkeypatch, "convert", published_run, run)
    assert file.read_bytes() == b"precious"
    call("convert", workdir, run, "--overwrite")
    same_checkpoint(run, published_run)

    args = json.loads((run / "args.json").read_text())
    files.write_json(run / "args.json", args | {"max_train_steps": 1}, overwrite=True)  # the run was prolonged since
    file.unlink()
    call("convert", published_run, run)
    assert json.loads((run / "args.json").read_text()) == args
    (run / "args.json").write_text('{"model": "another"}')
    file.unlink()
    assert "args.json is of another run" in error_of(monkeypatch, "convert", published_run, run)
    assert not file.exists() and json.loads((run / "args.json").read_text()) == {"model": "another"}

    stats = tmp_path / "e2e-latents-stats.pt"
    stats.write_bytes(b"precious")
    assert f"{stats} exists" in error_of(monkeypatch, "extract-vae", workdir, tmp_path / "e2e.pt")
    assert stats.read_bytes() == b"precious" and not (tmp_path / "e2e.pt").exists()
    assert "exists" in error_of(monkeypatch, "extract-vae", published_run, vae_folder)


def test_targets_and_sources_that_do_not_fit(workdir, published_run, vae_folder, tmp_path, monkeypatch):
    for arguments, words in (
        (("convert", workdir, tmp_path / "x.ckpt"), "'.ckpt'; allowed: .pt, .safetensors"),
        (("convert", workdir, tmp_path / "x.pt", "--step", 3), "3"),
        (("convert", published_run, tmp_path / "x.pt", "--step", 3), "no checkpoint of step 3; there are 7"),
        (("extract-vae", published_run, tmp_path / "x.pt", "--step", 3), "no checkpoint of step 3; there are 7"),
        (("convert", vae_folder, tmp_path / "x.pt", "--step", 3), "has no step 3 to choose"),
        (("convert", workdir, workdir), "holds the checkpoints of a run of ours"),
        (("convert", vae_folder, tmp_path / "x.pt", "--plain_sit"), "plain_sit"),
        (("extract-vae", vae_folder, tmp_path / "x.pt"), "without a VAE to extract"),
        (("verify", workdir), "workdir of a training run"),
    ):
        message = error_of(monkeypatch, *arguments)
        assert words in message, message
    assert not (tmp_path / "x.pt").exists()


def test_statistics_are_not_invented(published_run, tmp_path, monkeypatch):
    """A published VAE file without its statistics cannot become a diffusers folder, which would take Stable Diffusion's."""
    weights.write_safetensors(tmp_path / "vae.safetensors", network(published_run, "vae"))
    assert "latent statistics are missing" in error_of(monkeypatch, "convert", tmp_path / "vae.safetensors", tmp_path / "out")
    write_torch(tmp_path / "elsewhere.pt", vae_stats.to_arrays(STATS))
    call("convert", tmp_path / "vae.safetensors", tmp_path / "given", "--latent_stats", tmp_path / "elsewhere.pt")
    np.testing.assert_array_equal(vae.read_latent_stats(tmp_path / "given")["mean"], STATS["mean"])
    weights.write_safetensors(tmp_path / "vae-latents-stats.safetensors", vae_stats.to_arrays(STATS))
    call("convert", tmp_path / "vae.safetensors", tmp_path / "out")
    np.testing.assert_array_equal(vae.read_latent_stats(tmp_path / "out")["mean"], STATS["mean"])


def test_places_cover_what_a_state_holds(state):
    """Nothing of a run is forgotten on its way out, but for what the published code does not have."""
    placed = {place for places in training_state.STATE_PATHS.values() for place in places.values()}
    placed |= set(training_state.OPT_STATES.values()) | {"step"}
    leaves = small.leaves(state)
    forgotten = {name for name in leaves if not any(name == place or name.startswith(f"{place}.") for place in placed)}
    assert {name.split(".")[0] for name in forgotten} <= {"lecam", "skipped", "skipped_in_a_row"}
