"""Sampling from a tiny run: exact counts, resumption, independence of the batch size, clear errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small
from PIL import Image
from weight_files import write_checkpoint

from checkpoints_tools import published
from checkpoints_tools.convert import convert, extract_vae
from configs import repae
from repae_jax import sample
from repae_jax.diffusion.interpolant import VelocityObjective
from repae_jax.diffusion.samplers import PRECISIONS, SAMPLERS, Sampling
from repae_jax.sampling import generate
from repae_jax.sampling.load_model import Weaker, load_model
from repae_jax.training import checkpoint


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps, as it is on disk; its weights are drawn."""
    return small.save_run(tmp_path_factory.mktemp("run"), repae.get_config("tiny"))


@pytest.fixture(scope="module")
def loaded(workdir):
    return load_model(workdir)


def arguments(workdir, *extra):
    return sample.parse_args(["--workdir", str(workdir), "--steps", "3", *extra])


def load(npz):
    with np.load(npz) as file:
        return file["arr_0"], file["arr_1"]


@pytest.mark.integration
def test_exact_count_in_adm_layout(workdir, tmp_path):
    npz = sample.run(arguments(workdir, "--num_samples", "21", "--batch_size", "8", "--out", str(tmp_path / "x")))
    samples, labels = load(npz)
    assert samples.shape == (21, 16, 16, 3) and samples.dtype == np.uint8
    assert labels.shape == (21,) and set(np.bincount(labels, minlength=10)) == {2, 3}
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size[0] > 5 * 16
    settings = json.loads((tmp_path / "x.json").read_text())
    assert settings["sampler"] == "sde" and settings["steps"] == 3 and settings["step"] == 2
    assert not (tmp_path / "x.parts").exists()


@pytest.mark.parametrize("options", [{"compiler_options": "xla_tpu_scoped_vmem_limit_kib=32768"}, {}])
def test_how_the_training_step_was_compiled_does_not_matter(workdir, monkeypatch, options):
    """Runs that are older than the field have none."""
    stored = checkpoint.read_config(workdir, 2)
    del stored["compiler_options"]
    monkeypatch.setattr(checkpoint, "read_config", lambda *_: {**stored, **options})
    assert load_model(workdir).step == 2


@pytest.mark.integration
@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(name, marks=() if name == "sde" else pytest.mark.slow)
        for name, method in SAMPLERS.items()
        if method.objective is VelocityObjective and not method.adaptive  # whose steps suit the batch
    ],
)
def test_a_sample_does_not_depend_on_its_batch(workdir, tmp_path, sampler):
    samples = [
        load(
            sample.run(
                arguments(
                    workdir, "--num_samples", "16", "--sampler", sampler, "--batch_size", size, "--out", str(tmp_path / size)
                )
            )
        )[0]
        for size in ("8", "16")
    ]
    assert np.abs(samples[0].astype(int) - samples[1]).max() <= 1  # float rounding at a gray level's edge
    assert len({image.tobytes() for image in samples[0]}) == 16, "no two samples are alike"


@pytest.mark.integration
def test_interrupted_sampling_continues(workdir, tmp_path, monkeypatch):
    args = ("--num_samples", "24", "--batch_size", "8")
    whole = load(sample.run(arguments(workdir, *args, "--out", str(tmp_path / "whole"))))
    save, saved = sample._save_part, []

    def fail_at_the_second(path, array):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, array)

    monkeypatch.setattr(sample, "_save_part", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sample.run(arguments(workdir, *args, "--out", str(tmp_path / "cut")))
    assert [path.name for path in (tmp_path / "cut.parts").glob("*.npy")] == ["000000.npy"]
    parts = []
    monkeypatch.setattr(sample, "_save_part", lambda path, array: (parts.append(path), save(path, array)))
    continued = load(sample.run(arguments(workdir, *args, "--out", str(tmp_path / "cut"))))
    assert len(parts) == 2, "the finished batch is not made again"
    for a, b in zip(whole, continued):
        np.testing.assert_array_equal(a, b)


def broken(content, whole):
    return {"empty": b"", "cut": whole[:-9], "page": b"<html>404</html>"}[content]


@pytest.mark.parametrize("content", ["empty", "cut", "page"])
def test_damaged_parts_are_named(tmp_path, content):
    """Disks leave empty files after a power cut; they are not taken for finished batches."""
    sample._save_part(tmp_path / "000000.npy", np.zeros((2, 8, 8, 3), np.uint8))
    path = tmp_path / "000001.npy"
    path.write_bytes(broken(content, (tmp_path / "000000.npy").read_bytes()))
    with pytest.raises(ValueError, match="000001.npy is damaged: remove it, and run the same command"):
        sample._load_part(path)


def test_damaged_parts_are_found_before_any_is_made(workdir, loaded, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(sample, "sample_batches", lambda *_, **__: pytest.fail("sampled before"))
    folder = sample._open_parts(tmp_path / "x.parts", {})
    (folder / "settings.json").unlink()
    (folder / "000001.npy").touch()
    with pytest.raises(ValueError, match="000001.npy is damaged"):
        sample.run(arguments(workdir, "--num_samples", "16", "--batch_size", "8", "--out", str(tmp_path / "x")))


@pytest.mark.integration
def test_other_settings_do_not_mix(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "write_npz", lambda *_: pytest.fail("not reached"))
    monkeypatch.setattr(sample, "_save_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sample.run(arguments(workdir, "--num_samples", "8", "--batch_size", "8", "--out", str(tmp_path / "x")))
    for option, value in (("seed", "1"), ("precision", "bfloat16")):
        with pytest.raises(ValueError, match=f"other settings.*{option}.*{value}"):
            changed = ("--num_samples", "8", "--batch_size", "8", f"--{option}", value)
            sample.run(arguments(workdir, *changed, "--out", str(tmp_path / "x")))


def test_an_existing_result_is_kept(workdir, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists; choose another --out"):
        sample.run(arguments(workdir, "--num_samples", "8", "--batch_size", "8", "--out", str(tmp_path / "x")))
    assert (tmp_path / "x.npz").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--batch_size", "9"), "--batch_size=9 is not a multiple of the 8 devices"),
        (("--classes", "3", "10"), "allowed are 0..9"),
        (("--guidance_channels", "9"), "guidance_channels=9: the latents have 4"),
        (("--sampler", "ancestral"), "sampler 'ancestral'.* predicts a velocity"),
        (("--internal_scale", "1.5"), "internal_scale=1.5: the model has no head at its tap, which config.loss.sit.internal"),
        (("--guidance_power", "2"), "guidance_power=2.0 and guidance_schedule='constant': only 'power_cosine' has a power"),
    ],
)
def test_bad_arguments(workdir, loaded, monkeypatch, extra, message):
    monkeypatch.setattr(sample, "load_model", lambda *_, **__: loaded)
    if "--batch_size" in extra:
        monkeypatch.setattr(sample, "load_model", lambda *_, **__: pytest.fail("weights were read before"))
    with pytest.raises(ValueError, match=message):
        sample.run(arguments(workdir, *extra))


@pytest.mark.parametrize(
    "extra, message",
    [
        (("--guidance_scale", "0.5"), "--guidance_scale=0.5 must be at least 1"),
        (("--guidance_scale", "nan"), "--guidance_scale=nan must be finite"),
        (("--guidance_low", "0.9", "--guidance_high", "0.1"), "guidance interval"),
        (("--steps", "0"), "--steps=0 must be at least 1"),
        (("--guidance_channels", "0"), "--guidance_channels=0 must be at least 1"),
        (("--autoguidance_scale", "2"), "--autoguidance_scale=2.0, but autoguidance names no weaker network; name one"),
        (("--autoguidance", "runs/x@5"), "--autoguidance is given, but autoguidance_scale=1.0 is no guidance"),
        (("--internal_scale", "2", "--autoguidance_scale", "2"), "--autoguidance_scale=2.0 and internal_scale=2.0: guide away"),
        (("--precision", "float16"), "argument --precision: invalid choice: 'float16' (choose from"),
        (("--classes", "-1"), "argument --classes: -1 must be at least 0"),
        (("--num_samples", "1.5"), "argument --num_samples: '1.5' is no whole number"),
        (("--seed", "-1"), "argument --seed: -1 must lie in [0, 4294967295]"),
        (("--batch_size", "0"), "argument --batch_size: 0 must be at least 1"),
        (("--num", "3"), "unrecognized arguments: --num 3"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(workdir, extra, message, capsys):
    with pytest.raises(SystemExit) as caught:
        arguments(workdir, *extra)
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_settings_of_the_command_line_complete_those_of_the_run(loaded):
    """A power needs the schedule that has one, here or there."""
    of_run = dataclasses.replace(loaded.sampling, guidance_schedule="power_cosine")
    given = arguments("runs/x", "--guidance_power", "2")
    sampling, _ = sample.choose_sampling(given, dataclasses.replace(loaded, sampling=of_run))
    assert (sampling.guidance_schedule, sampling.guidance_power) == ("power_cosine", 2)


def test_no_such_checkpoint(workdir):
    with pytest.raises(ValueError, match="7.*2"):
        sample.run(arguments(workdir, "--step", "7"))


def test_no_run_there(tmp_path):
    with pytest.raises(ValueError, match="[Nn]o checkpoint"):
        sample.run(arguments(tmp_path))


def test_labels():
    balanced = sample.draw_labels("balanced", 25, range(10), 0)
    assert set(np.bincount(balanced)) == {2, 3}
    assert set(sample.draw_labels("random", 100, [3, 5], 0)) == {3, 5}
    np.testing.assert_array_equal(balanced, sample.draw_labels("balanced", 25, range(10), 0))


@pytest.mark.integration
def test_images_use_the_averages_and_no_epsilon(workdir):
    """Pixels follow from the averaged weights: swapping in others changes them, and de-normalizing adds no epsilon."""
    trained = load_model(workdir)
    run = jax.jit(generate.make_generate(trained.nets, trained.objective, trained.latent_shape, trained.sampling))
    args = np.zeros(8, np.int32), np.arange(8), jax.random.key(0)
    base = np.asarray(run(trained.params, *args)[0])
    stats = trained.params["latent_stats"]
    # variance zero: without epsilon every sample decodes the mean, so all images are the same
    flat = np.asarray(run({**trained.params, "latent_stats": stats.replace(var=0 * stats.var)}, *args)[0])
    assert not np.array_equal(base[0], base[1])
    for image in flat[1:]:
        np.testing.assert_array_equal(image, flat[0])


@pytest.mark.integration
def test_samples_that_are_not_finite(workdir, tmp_path, monkeypatch):
    trained = load_model(workdir)
    latent_stats = jax.tree.map(lambda x: x * np.nan, trained.params["latent_stats"])
    broken = dataclasses.replace(trained, params={**trained.params, "latent_stats": latent_stats})
    monkeypatch.setattr(sample, "load_model", lambda *_, **__: broken)
    with pytest.raises(ValueError, match="8 of 8 samples are not finite, first number 0: .* take an earlier step"):
        sample.run(arguments(workdir, "--num_samples", "8", "--batch_size", "8", "--out", str(tmp_path / "x")))


@pytest.mark.slow
def test_guidance_of_the_first_channels(workdir, tmp_path):
    samples = []
    for channels in ((), ("--guidance_channels", "4"), ("--guidance_channels", "3")):
        npz = sample.run(arguments(
            workdir, "--num_samples", "8", "--batch_size", "8", "--guidance_scale", "9", *channels,
            "--out", str(tmp_path / f"x{len(samples)}"),
        ))  # fmt: skip
        samples.append(load(npz)[0])
    np.testing.assert_array_equal(samples[0], samples[1])
    assert json.loads((tmp_path / "x2.json").read_text())["guidance_channels"] == 3
    assert sample.parse_args(["--workdir", "x"]).guidance_channels is None


def test_the_name_of_samples_in_bfloat16_says_so():
    args = sample.parse_args(["--workdir", "x", "--num_samples", "8"])
    names = [sample.settings_name(2, Sampling("euler", 3, precision=precision), args) for precision in PRECISIONS]
    assert names == ["0000002-euler3-cfg1-balanced-8-seed0", "0000002-euler3-cfg1-bfloat16-balanced-8-seed0"]


def test_the_name_of_samples_tells_all_settings_apart():
    args = sample.parse_args(["--workdir", "x", "--num_samples", "8"])
    settings = [
        {}, {"time_shift": 2.0}, {"sampler": "dpmpp"}, {"sampler": "dopri5"}, {"sampler": "dopri5", "tolerance": 1e-4}
    ]  # fmt: skip
    names = [sample.settings_name(2, Sampling(**{"sampler": "sde", "steps": 50, **fields}), args) for fields in settings]
    methods = [name.removeprefix("0000002-").removesuffix("-balanced-8-seed0") for name in names]
    assert methods == [
        "sde50-cfg1", "sde50-cfg1-shift2", "dpmpp50-cfg1", "dopri5-50-cfg1", "dopri5-50-cfg1-tolerance0.0001"
    ]  # fmt: skip


GUIDED = Sampling("euler", 3, guidance_scale=2.0, guidance_schedule="power_cosine", autoguidance_scale=2.0)
CHANGED = {
    "sampler": "heun", "steps": 4, "guidance_scale": 3.0, "guidance_low": 0.1, "guidance_high": 0.9, "guidance_channels": 3,
    "guidance_schedule": "linear", "guidance_power": 3.0, "autoguidance_scale": 3.0, "internal_scale": 2.0, "weaker_low": 0.1,
    "weaker_high": 0.9, "precision": "bfloat16", "time_shift": 2.0, "tolerance": 1e-4,
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Sampling)])
def test_each_setting_makes_another_name(field):
    args = sample.parse_args(["--workdir", "x", "--num_samples", "8"])
    before = dataclasses.replace(GUIDED, autoguidance_scale=1.0) if field == "internal_scale" else GUIDED
    after = dataclasses.replace(before, **{field: CHANGED[field]})
    assert sample.settings_name(2, before, args) != sample.settings_name(2, after, args)


def weaker(step, value):
    return Weaker(None, {"kernel": np.full(3, value, np.float32)}, "runs/small", step)


def test_the_name_of_samples_tells_weaker_networks_apart():
    """By their steps and weights; the model's own head is no other network, and where nothing is guided there is none."""
    args = sample.parse_args(["--workdir", "x", "--num_samples", "8"])
    by_network, by_head = Sampling("euler", 3, autoguidance_scale=2.0), Sampling("euler", 3, internal_scale=2.0)
    given = [(by_network, weaker(2, 0)), (by_network, weaker(2, 1)), (by_network, weaker(None, 1)), (by_head, None)]
    given += [(dataclasses.replace(by_head, guidance_channels=3), None), (Sampling("euler", 3, guidance_channels=3), None)]
    names = [sample.settings_name(2, sampling, args, network) for sampling, network in given]
    hashes = [checkpoint.fingerprint(weaker(2, value).params)[:8] for value in (0, 1)]
    assert [name.removeprefix("0000002-euler3-cfg1").removesuffix("-balanced-8-seed0") for name in names] == [
        f"-auto2in0to1of0000002-{hashes[0]}", f"-auto2in0to1of0000002-{hashes[1]}", f"-auto2in0to1ofunknown-step-{hashes[1]}",
        "-internal2in0to1", "-internal2in0to1on3", "",
    ]  # fmt: skip


def test_batches_of_before_a_setting_are_continued(tmp_path):
    settings = {"num_samples": 8, **dataclasses.asdict(Sampling("euler"))}
    old = {name: value for name, value in settings.items() if name not in ("precision", "time_shift", "tolerance")}
    sample._open_parts(tmp_path / "x.parts", old)
    sample._open_parts(tmp_path / "x.parts", settings)
    with pytest.raises(ValueError, match=r"other settings.*'time_shift': \(1.0, 2.0\)"):
        sample._open_parts(tmp_path / "x.parts", {**settings, "time_shift": 2.0})


def test_the_name_of_samples_says_with_which_average_they_are_drawn():
    args = sample.parse_args(["--workdir", "x", "--num_samples", "8", "--ema", "sigma=0.1"])
    assert sample.settings_name(2, Sampling("euler", 3), args) == "0000002-ema-sigma0.1-euler3-cfg1-balanced-8-seed0"


def test_averages_that_there_cannot_be(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--workdir", "x", "--ema", "sigma=1"])
    assert "--ema=sigma=1: expected a decay in [0, 1), such as 0.999, or sigma=S" in capsys.readouterr().err


@pytest.mark.integration
def test_a_published_run_has_one_average(workdir, tmp_path):
    convert(workdir, tmp_path / "published")
    with pytest.raises(ValueError, match="published is no run of ours, and holds one average: leave --ema 0.9 out"):
        load_model(tmp_path / "published", ema="0.9")
    with pytest.raises(ValueError, match="which has no averages to choose from: leave --ema 0.9 out"):
        convert(tmp_path / "published", tmp_path / "x.safetensors", ema="0.9")


@pytest.mark.integration
def test_guidance_outside_its_interval_changes_nothing(workdir):
    trained = load_model(workdir)
    args = np.arange(8, dtype=np.int32), np.arange(8), jax.random.key(0)
    samples = []
    for scale, high in ((1.0, 1.0), (3.0, 0.0)):
        sampling = Sampling("euler", 3, guidance_scale=scale, guidance_low=0.0, guidance_high=high)
        run = jax.jit(generate.make_generate(trained.nets, trained.objective, trained.latent_shape, sampling))
        samples.append(np.asarray(run(trained.params, *args)[0]))
    assert np.abs(samples[0].astype(int) - samples[1]).max() <= 1


@pytest.mark.slow
def test_a_converted_run_gives_the_same_samples(workdir, tmp_path):
    arguments_ = ("--num_samples", "8", "--batch_size", "8", "--sampler", "sde", "--guidance_scale", "1.5")
    expected = load(sample.run(arguments(workdir, *arguments_, "--out", str(tmp_path / "ours"))))
    for target in (tmp_path / "published", tmp_path / "weights.safetensors"):
        convert(workdir, target, optimizers=False)
        samples = load(sample.run(arguments(target, *arguments_, "--out", str(tmp_path / f"of-{target.stem}"))))
        for actual, array in zip(samples, expected):
            np.testing.assert_array_equal(actual, array)


@pytest.mark.integration
def test_a_run_on_a_frozen_vae(workdir, tmp_path):
    """Checkpoints of sit-ldm-* hold no VAE, and those of REPA no batch norm either."""
    convert(workdir, tmp_path / "whole.pt", optimizers=False)
    extract_vae(workdir, tmp_path / "vae")
    checkpoint = published.read(tmp_path / "whole.pt")
    networks = {name: dict(checkpoint.networks[name]) for name in ("model", "ema")}
    arguments_ = ("--num_samples", "8", "--batch_size", "8", "--vae", str(tmp_path / "vae"))
    frozen = tmp_path / "frozen.pt"
    write_checkpoint(frozen, dataclasses.replace(checkpoint, networks=networks))
    with pytest.raises(ValueError, match="holds no VAE: give --vae"):
        load_model(frozen)
    expected = load(sample.run(arguments(frozen, *arguments_, "--out", str(tmp_path / "frozen"))))
    for arrays in networks.values():
        for name in [name for name in arrays if name.startswith("bn.")]:
            del arrays[name]
    write_checkpoint(tmp_path / "repa.pt", dataclasses.replace(checkpoint, networks=networks))
    samples = load(sample.run(arguments(tmp_path / "repa.pt", *arguments_, "--out", str(tmp_path / "repa"))))
    for actual, array in zip(samples, expected):
        np.testing.assert_array_equal(actual, array)

    with pytest.raises(ValueError, match="holds a VAE of its own"):
        load_model(tmp_path / "whole.pt", vae_path=tmp_path / "vae")
    for arrays in networks.values():
        for name in [name for name in arrays if name.startswith("projectors.")]:
            del arrays[name]
    write_checkpoint(tmp_path / "sit.pt", dataclasses.replace(checkpoint, networks=networks))
    with pytest.raises(ValueError, match="plain SiT, whose t = 0 is noise"):
        load_model(tmp_path / "sit.pt", vae_path=tmp_path / "vae")
