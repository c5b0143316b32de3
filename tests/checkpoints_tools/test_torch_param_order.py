import json

import numpy as np
import pytest
import reference
from golden_networks import abstract_tree, draw, golden_sit

from checkpoints_tools import mapping
from checkpoints_tools.discriminator import discriminator_table
from checkpoints_tools.sit import sit_table
from checkpoints_tools.torch_param_order import parameter_order, registration_order, to_ordered_torch
from checkpoints_tools.vae_layouts import vae_table
from repae_jax.models.autoencoder import AutoencoderKL
from repae_jax.models.discriminator import PatchDiscriminator

ORDERS = json.loads((reference.GOLDEN / "train_repae.json").read_text())["meta"]["state_dict_order"]


@pytest.mark.parametrize("module", ORDERS)
def test_state_dicts_are_in_the_published_order(module):
    assert registration_order(sorted(ORDERS[module])) == ORDERS[module]


@pytest.mark.parametrize("name", [*reference.cases("sit_"), *reference.cases("vae_f")])
def test_every_published_network_is_in_order(name):
    """The files list names as PyTorch does: two projectors, qk_norm, attention in the VAE."""
    names = list(json.loads((reference.GOLDEN / f"{name}.json").read_text())["state_dict"])
    assert registration_order(reversed(names)) == names


def test_parameters_are_those_of_pytorch():
    config = json.loads((reference.GOLDEN / "train_repae.json").read_text())["meta"]["config"]
    sit = golden_sit(config)
    vae = AutoencoderKL(latent_channels=4, channel_multipliers=(1, 1, 1, 1), channels=32)
    tables = {
        "sit": sit_table(sit),
        "vae": vae_table(vae),
        "discriminator": discriminator_table(PatchDiscriminator(channels=64, num_layers=3)),
    }
    for module, table in tables.items():
        names = {name for entry in table.entries for name in entry.torch} | set(table.constants or {})
        expected = [name for name in ORDERS[module] if "running_" not in name and "num_batches" not in name]
        assert parameter_order(names) == expected, module

    tree = draw(abstract_tree(sit, config["input_size"]))
    state_dict = to_ordered_torch(tables["sit"], tree)
    assert list(state_dict) == ORDERS["sit"]
    for key, array in mapping.to_torch(tables["sit"], tree).items():
        np.testing.assert_array_equal(state_dict[key], array)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="order is unknown: blocks.0.router.weight, cls_token$"):
        registration_order(["pos_embed", "cls_token", "blocks.0.router.weight"])
