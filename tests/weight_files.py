"""Files of weights, written by the writers that all commands use."""

from checkpoints_tools import published, torch_files
from repae_jax import files


def write_torch(path, content, *, overwrite=False):
    """A PyTorch file."""
    files.write_all({path: torch_files.torch_writer(content, path)}, overwrite=overwrite)


def write_checkpoint(path, checkpoint, *, overwrite=False):
    """A published training checkpoint, as .pt or .safetensors."""
    files.write_all({path: published.writer(path, checkpoint)}, overwrite=overwrite)
