"""The loss on clips, kept beside an objective that says nothing of most of what a clip holds.

Rewards look at likeness, lips, motion and damage. What none of them asks for is unlearned as soon as it costs one of them a little: blinks,
an eyebrow. ReFL trains on its pre-training loss in turn with the reward loss (Xu et al. 2023, https://arxiv.org/abs/2304.05977, algorithm 1);
here both are one sum. The anchor of the stages that climb rewards does not do the same: it keeps velocities near to what they were on the model's
own samples, and a blink is a small part of a velocity.
"""

import jax
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.nn.layers import Functional, Params
from pikastream_jax.training import dit_causal, dit_pretrain
from pikastream_jax.training.dit_data import ClipWindows, DiTBatch, prepare_batch, text_kept
from pikastream_jax.training.latent_reader import reader_model
from pikastream_jax.training.loop import Metrics
from pikastream_jax.training.mesh import split_batch


def teachers_loss(config: Config, model: Functional, params: Params, data: dict, rows: DiTBatch, key: Array) -> tuple[Float[Array, ""], Metrics]:
    """The loss of `dit_pretrain` with that stage's own settings, and what is reported of it.

    Args:
      data: has the `reader`'s parameters.

    Returns:
      The loss; itself as `data`, and as `data_identity`, `data_expression` and `data_closures` what the reader misreads.
    """
    reader = reader_model(config).bind(data["reader"])
    return _reported(*dit_pretrain.flow_matching_loss(model, text_kept(params), rows, key, reader, dit_pretrain.Settings()))


def students_loss(
    config: Config, model: Functional, params: Params, data: dict, rows: DiTBatch, key: Array, *, train: bool = True
) -> tuple[Float[Array, ""], Metrics]:
    """The same of `dit_causal --objective data`.

    Args:
      train: chunks are drawn at random as in that stage, and not those of a stream.
    """
    reader, settings = reader_model(config).bind(data["reader"]), dit_causal.Settings(objective="data")
    return _reported(*dit_causal.teacher_forcing_loss(config, model, text_kept(params), rows, key, reader, settings, train=train))


def training_rows(config: Config, data: dict, batch: ClipWindows, key: Array) -> tuple[DiTBatch, Array]:
    """Windows as those stages see them, augmented and with conditions dropped; and a key for what else their losses draw."""
    k_rows, k_loss = jax.random.split(key)
    return split_batch(prepare_batch(config, data, batch, k_rows)), k_loss


def _reported(value: Float[Array, ""], parts: Metrics) -> tuple[Float[Array, ""], Metrics]:
    return value, {"data": value} | {f"data_{name}": parts[name] for name in ("identity", "expression", "closures")}
