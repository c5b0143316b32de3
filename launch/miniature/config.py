"""The config of one setting of the miniature paper, for every command that takes a config.

    python -m repae_jax.plan --config launch/miniature/config.py:medium,repa-e --topology h200:1

After the colon are a scale of `launch/miniature/scales.py`, a setting of `launch/miniature/tables.py`, and perhaps `seed=1`.
Pictures, encoder and VAE are those in runs/miniature/SCALE, where `launch/miniature.sh` leaves them.
"""

from ml_collections import ConfigDict

from configs import common
from launch.miniature import experiments
from launch.miniature.scales import SCALES


def get_config(arg: str = "") -> ConfigDict:
    """Returns the config of 'SCALE,SETTING' or 'SCALE,SETTING,seed=N'."""
    scale, setting, args = common.parse_arg(arg, SCALES, experiments.SETTINGS, seed=0)
    if not scale or not setting:
        names = f"SCALE is one of {', '.join(SCALES)}; SETTING one of {', '.join(experiments.SETTINGS)}"
        raise ValueError(f"expected SCALE,SETTING after the colon, such as medium,repa-e: {names}")
    workdir = experiments.default_workdir(SCALES[scale])
    return experiments.config_of(
        SCALES[scale], experiments.Run(setting, args["seed"]), workdir, experiments.pictures_folder(SCALES[scale], workdir)
    )
