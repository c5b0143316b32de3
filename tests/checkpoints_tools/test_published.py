"""Training checkpoints of the published code, in and out."""

import argparse
import dataclasses
import functools
import json
import operator

import jax
import numpy as np
import optax
import pytest
import reference
import small
from weight_files import write_checkpoint, write_torch

from checkpoints_tools import identify, published, published_args, training_state, weights
from checkpoints_tools.sit import abstract_sit
from checkpoints_tools.training_state import STATE_PATHS, Networks
from repae_jax import files
from repae_jax.job import build
from repae_jax.models.sit import SiT
from repae_jax.training.state import apply_update

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def job():
    return build.build(small.config(), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(job):
    """A state with moments of no special value."""
    base = jax.device_get(small.random_state(job))
    rng = np.random.default_rng(1)

    def noise(tree):
        return jax.tree.map(lambda x: np.abs(rng.standard_normal(x.shape)).astype(np.float32), tree)

    def filled(net):
        moments = {"mu": noise(net.params), "nu": noise(net.params), "count": np.int32(3)}
        return net.replace(opt_state=optax.tree.set(net.opt_state, **moments))

    ema = base.ema.replace(params=noise(base.ema.params))
    nets = {name: filled(getattr(base, name)) for name in ("sit", "vae", "disc")}
    return base.replace(step=np.int32(3), ema=ema, **nets)


@pytest.fixture(scope="module")
def networks(job):
    return Networks(sit=job.nets.sit, vae=job.nets.vae, disc=job.nets.disc)


def plain(value):
    """Nested dicts and lists, as a stored state is read."""
    if hasattr(value, "_asdict"):
        return {name: plain(item) for name, item in value._asdict().items()}
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


GROUP = {"lr": 3e-5, "betas": (0.5, 0.6), "eps": 1e-7, "weight_decay": 0.1}


def exported(job, state, networks, groups=("opt", "opt_vae", "opt_disc")):
    args = published_args.args_from_config(job.config, "SiT-tiny/1", "tiny", "none", 2, job.nets.vae.norm_groups)
    return training_state.from_run(
        lambda place: plain(operator.attrgetter(place)(state)), networks, int(state.step), args, "run",
        {name: GROUP for name in groups},
    )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(job, state, networks):
    return exported(job, state, networks)


@pytest.fixture(params=[".pt", ".safetensors"])
def file(request, checkpoint, tmp_path):
    path = tmp_path / f"0000003{request.param}"
    write_checkpoint(path, checkpoint)
    return path


def targets_of(state):
    def at(place):
        return plain(operator.attrgetter(place)(state))

    return {name: {leaf: at(place) for leaf, place in places.items()} for name, places in STATE_PATHS.items()}


def assert_same_arrays(actual, expected):
    assert set(actual) == set(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and np.array_equal(actual[name], array), name


def test_file_round_trip_is_the_identity(file, checkpoint):
    read = published.read(file)
    assert read.steps == 3 and read.args == json.loads(json.dumps(checkpoint.args))
    assert read.networks.keys() == checkpoint.networks.keys()
    for name, arrays in checkpoint.networks.items():
        assert_same_arrays(read.networks[name], arrays)
    for name, adam in checkpoint.optimizers.items():
        assert read.optimizers[name].steps == adam.steps == 3
        assert {key: read.optimizers[name].group[key] for key in GROUP} | {"betas": GROUP["betas"]} == GROUP
        assert_same_arrays(read.optimizers[name].exp_avg, adam.exp_avg)
        assert_same_arrays(read.optimizers[name].exp_avg_sq, adam.exp_avg_sq)


def test_state_round_trip_is_the_identity(file, state, networks):
    targets = targets_of(state)
    trees, moments = training_state.to_trees(published.read(file), networks, targets)
    for name, tree in targets.items():
        assert small.differing(trees[name], tree) == [], name
    for name, place in training_state.OPT_STATES.items():
        adam = training_state.find_adam(plain(operator.attrgetter(place)(state)))
        updates, mu, nu = moments[name]
        assert updates == 3 and small.differing(mu, adam["mu"]) == [] and small.differing(nu, adam["nu"]) == []


def test_names_shapes_and_order_are_those_of_the_published_code(tmp_path):
    """The golden file lists every entry of the published modules, in registration order."""
    case = json.loads((reference.GOLDEN / "train_repae.json").read_text())
    hyper = case["meta"]["config"]
    sit = SiT(
        num_classes=hyper["num_classes"], latent_channels=hyper["in_channels"], patch_size=hyper["patch_size"],
        hidden_size=hyper["hidden_size"], depth=hyper["depth"], num_heads=hyper["num_heads"],
        encoder_depth=hyper["encoder_depth"], feature_dims=tuple(hyper["z_dims"]), projector_dim=hyper["projector_dim"],
    )  # fmt: skip
    grid = hyper["input_size"] // hyper["patch_size"]
    table = training_state.tables(Networks(sit))["model"]
    weights_of = {name: reference.draw(name, tuple(spec["shape"]), 0, "") for name, spec in case["state_dict"]["sit"].items()}
    tree = training_state.to_flax(table, weights_of, abstract_sit(sit, grid, True))
    again = published.TrainingCheckpoint("x", {}, 0, {"model": training_state.to_torch(table, tree)}, {})
    write_checkpoint(tmp_path / "x.pt", again)
    stored = torch.load(tmp_path / "x.pt", weights_only=False)["model"]
    assert list(stored) == case["meta"]["state_dict_order"]["sit"]
    for name, spec in case["state_dict"]["sit"].items():
        assert list(stored[name].shape) == spec["shape"], name
        assert np.array_equal(stored[name].numpy(), weights_of[name])


def trained(names):
    """Names of what is trained: the statistics of batch norms are not."""
    return [name for name in names if "running_" not in name and "num_batches" not in name]


class Parameters(torch.nn.Module):
    """A module with the parameters of a state dict, in the order of its file."""

    def __init__(self, state_dict, before=0, behind=0):
        super().__init__()
        arrays = [np.zeros(1, np.float32)] * before
        arrays += [state_dict[name] for name in trained(state_dict)]
        arrays += [np.zeros(1, np.float32)] * behind
        self.all = torch.nn.ParameterList([torch.nn.Parameter(torch.from_numpy(np.array(array))) for array in arrays])


@pytest.mark.parametrize(
    "optimizer, place, padding", [("opt", "sit", (0, 0)), ("opt_vae", "vae", (0, 0)), ("opt_disc", "disc", (1, 31))]
)
def test_torch_continues_as_optax_does(job, state, networks, checkpoint, tmp_path, optimizer, place, padding):
    """The exported optimizer state loads strictly into torch's AdamW, and the next update is the same on both sides."""
    write_checkpoint(tmp_path / "x.pt", checkpoint)
    content = torch.load(tmp_path / "x.pt", weights_only=False)
    assert isinstance(content["args"], argparse.Namespace) and content["steps"] == 3
    name = published.OPTIMIZERS[optimizer]
    before, behind = padding
    module = Parameters({key: value.numpy() for key, value in content[name].items()}, before, behind)
    adam = torch.optim.AdamW(module.parameters(), lr=1.0)
    adam.load_state_dict(content[optimizer])
    group = adam.param_groups[0]
    assert {name: group[name] for name in GROUP} == GROUP
    hyper = job.config["optim"][place]
    group.update(lr=hyper["learning_rate"], betas=(hyper["b1"], hyper["b2"]), eps=hyper["eps"], weight_decay=0.0)

    net, rng = getattr(state, place), np.random.default_rng(2)
    grads = jax.tree.map(lambda x: (1e-3 * rng.standard_normal(x.shape) / np.sqrt(x.size)).astype(np.float32), net.params)
    tx = getattr(job.tx, place)  # the gradients' global norm is far below the clipping threshold
    ours = jax.device_get(jax.jit(functools.partial(apply_update, tx=tx))(net, grads))
    table = training_state._moments(training_state.tables(networks)[name])
    torch_grads = training_state.to_torch(table, grads)
    expected = training_state.to_torch(table, ours.params)
    parameters = dict(zip(trained(content[name]), list(module.all)[before:]))
    for key, grad in torch_grads.items():
        parameters[key].grad = torch.from_numpy(np.array(grad))
    adam.step()
    for key, array in expected.items():
        difference = np.abs(parameters[key].detach().numpy() - array).max()
        assert difference <= 2e-6 * max(np.abs(array).max(), 1e-3), key


def test_weights_alone(job, state, networks):
    checkpoint = exported(job, state, networks, groups=())
    assert checkpoint.optimizers == {} and set(checkpoint.networks) == set(published.NETWORKS)


def test_positions_that_are_not_trained_have_no_moments_in_torch(job, state, networks, checkpoint):
    """Training on a frozen VAE does not train them. Where they are trained, as in REPA-E's loop, they have moments."""
    assert networks.sit.learned_positions and "pos_embed" in checkpoint.optimizers["opt"].exp_avg
    fixed = dataclasses.replace(networks, sit=networks.sit.clone(learned_positions=False))
    adam = exported(job, state, fixed, groups=("opt",)).optimizers["opt"]
    assert set(checkpoint.optimizers["opt"].exp_avg) - set(adam.exp_avg) == {"pos_embed"}
    only = dataclasses.replace(checkpoint, optimizers={"opt": adam})
    _, moments = training_state.to_trees(only, fixed, targets_of(state))
    assert not moments["opt"][1]["pos_embed"]["table"].any() and moments["opt"][1]["x_embedder"]["kernel"].any()


def test_a_checkpoint_on_a_frozen_vae(checkpoint, networks, state, tmp_path):
    """sit-ldm-*: model, ema, opt, args and steps."""
    content = {name: dict(checkpoint.networks[name]) for name in ("model", "ema")}
    only = dataclasses.replace(checkpoint, networks=content, optimizers={"opt": checkpoint.optimizers["opt"]})
    write_checkpoint(tmp_path / "x.pt", only)
    trees, moments = training_state.to_trees(published.read(tmp_path / "x.pt"), networks, targets_of(state))
    assert set(trees) == {"model", "ema"} and set(moments) == {"opt"}


def test_newest_of_a_run(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoints/NNNNNNN.pt"):
        published.read(tmp_path)
    for name in ("0000003.pt", "0000020.pt", "notes.pt"):
        write_checkpoint(tmp_path / "checkpoints" / name, checkpoint)
    assert published.checkpoint_file(tmp_path).name == "0000020.pt"
    with pytest.raises(ValueError, match="ends in .pt or .safetensors"):
        write_checkpoint(tmp_path / "x.ckpt", checkpoint)


def test_weights_alone_are_model_and_average(checkpoint, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    files.write_json(tmp_path / "args.json", dict(checkpoint.args))
    for name in ("0000003.pt", "0000003.safetensors"):
        path = tmp_path / "checkpoints" / name
        write = write_torch if path.suffix == ".pt" else weights.write_safetensors
        write(path, dict(checkpoint.networks["ema"]))
        read = published.read(tmp_path)
        assert read.steps is None and read.number("num_heads") == 2 and read.args == json.loads(json.dumps(checkpoint.args))
        for network in ("model", "ema"):
            assert_same_arrays(read.networks[network], checkpoint.networks["ema"])
        path.unlink()


def test_networks_that_were_saved_in_their_wrappers(checkpoint, tmp_path):
    write_checkpoint(tmp_path / "plain.pt", checkpoint)
    content = weights.read_torch(tmp_path / "plain.pt")
    wrapped = {**content, "ema_model": content["ema"]}
    del wrapped["ema"]
    for name, prefix in (("model", "module."), ("ema_model", "module._orig_mod."), ("vae", "_orig_mod.")):
        wrapped[name] = {prefix + key: array for key, array in wrapped[name].items()}
    write_torch(tmp_path / "wrapped.pt", wrapped)
    for read in (published.read(tmp_path / "wrapped.pt"), identify.identify(tmp_path / "wrapped.pt").checkpoint):
        assert read.networks.keys() == checkpoint.networks.keys()
        for name, arrays in checkpoint.networks.items():
            assert_same_arrays(read.networks[name], arrays)
        for name, adam in checkpoint.optimizers.items():
            assert_same_arrays(read.optimizers[name].exp_avg, adam.exp_avg)

    write_torch(tmp_path / "sit.pt", {"model": wrapped["model"]})
    assert_same_arrays(published.read(tmp_path / "sit.pt").networks["model"], checkpoint.networks["model"])
    write_torch(tmp_path / "both.pt", {**wrapped, "ema": content["model"]})
    with pytest.raises(ValueError, match="both.pt holds several averages, ema, ema_model: save it again with one"):
        published.read(tmp_path / "both.pt")
    wrapped["vae"]["more"] = np.ones(1)
    write_torch(tmp_path / "mixed.pt", wrapped)
    with pytest.raises(ValueError, match="mixed.pt: vae: [0-9]+ names begin with _orig_mod., 1 do not"):
        published.read(tmp_path / "mixed.pt")


def test_bad_optimizer_states(checkpoint, tmp_path):
    path = tmp_path / "x.pt"
    write_checkpoint(path, checkpoint)
    content = weights.read_torch(path)
    del content["opt_vae"]["state"][4]
    content["opt_vae"]["state"][0]["exp_avg"] = np.zeros((3, 3), np.float32)
    content["opt_vae"]["state"][1]["step"] = np.asarray(9.0, np.float32)
    write_torch(path, content, overwrite=True)
    with pytest.raises(ValueError, match="x.pt: opt_vae does not fit its network: 3 problems") as error:
        published.read(path)
    for line in ("no state", "exp_avg has shape (3, 3), the parameter", "were updated [3, 9] times"):
        assert line in str(error.value)


def test_not_a_training_checkpoint(checkpoint, tmp_path):
    write_torch(tmp_path / "x.pt", dict(checkpoint.networks["vae"]))
    with pytest.raises(ValueError, match="x.pt is no training checkpoint.*it holds .*conv_in"):
        published.read(tmp_path / "x.pt")
    weights.write_safetensors(tmp_path / "x.safetensors", checkpoint.networks["vae"])
    with pytest.raises(ValueError, match="x.safetensors is no training checkpoint: its header"):
        published.read(tmp_path / "x.safetensors")


def test_args(job):
    args = published_args.args_from_config(job.config, "SiT-tiny/1", "tiny", "none", 2, job.nets.vae.norm_groups)
    assert published_args.check_args(args, job.config, "x.pt") == []
    assert published_args.check_args({**args, "learning_rate": 5.0}, job.config, "x.pt") == [
        "config.optim.sit.learning_rate=0.001, but learning_rate=5.0"
    ]
    with pytest.raises(ValueError, match="x.pt was trained otherwise: config.sit.encoder_depth=1, but encoder_depth=8"):
        published_args.check_args({**args, "encoder_depth": 8}, job.config, "x.pt")


def test_an_optimizer_that_is_not_adam():
    with pytest.raises(ValueError, match="no moments of Adam"):
        training_state.find_adam([None, {"trace": {}}])
