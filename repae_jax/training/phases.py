"""Folders of a run of two phases, see `repae_jax/job/two_phases.py`; without JAX, for commands that only read."""

from etils import epath

PHASES = ("joint", "frozen")  # folders in the workdir


def phases_of(workdir: epath.PathLike) -> list[epath.Path]:
    """Returns the folders of the phases that a run of two phases has begun, in order; [] of any other folder."""
    folders = [epath.Path(workdir) / name for name in PHASES]
    return [folder for folder in folders if (folder / "checkpoints").is_dir() or (folder / "metrics.jsonl").exists()]
