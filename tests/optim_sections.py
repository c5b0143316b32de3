"""Sections of `config.optim` for tests."""

from repae_jax.training.optimizer import AdamW

FIELDS = {
    "learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant", "decay_steps": None, "final_learning_rate": 0.0,
    "b1": 0.9, "b2": 0.999, "eps": 1e-12, "weight_decay": 0.0, "clip_norm": 1e9, "fixed": (),
}  # fmt: skip


def section(**changes):
    """A constant rate of 0.1 without decay and clipping, with changes."""
    return AdamW(**{**FIELDS, **changes})
