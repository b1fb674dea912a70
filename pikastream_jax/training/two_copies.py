"""Causal training over whole sequences: each is given twice, as what is there already and as what is asked.

The context copy stands at the last timestep of the solver, because the keys and values that inference caches are those of its last denoising
step; the query copy stands at one of the solver's timesteps, one per chunk. A query chunk sees earlier context chunks and itself, a context
chunk earlier context and itself; chunk sizes are random per sequence.

What is asked may be the data with noise (teacher forcing) or a state of a teacher's trajectory (ODE regression). For the second, a state x_t
and the trajectory's end x_0 name the noise (x_t - (1 - t) x_0) / t that a straight line through both would come from; with it everything reads as
for the data: x_t = (1 - t) x_0 + t noise, and the velocity asked for is noise - x_0 = (x_t - x_0) / t. Its squared error is that of x_0 by 1 / t^2.
That weight is chosen because the student's solver is Euler on the velocity: what a step adds to the result is its error times the step's length,
and the lengths (0.14, 0.19, 0.27, 0.4 for four steps shifted by 2) rise as t falls. The error of x_0 itself would ask 6 times less of the last step
than of the first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate, logit_normal_timesteps, solver_timesteps
from pikastream_jax.nn.layers import Functional, Params
from pikastream_jax.training.dit_data import DiTBatch, weighted_velocity_loss
from pikastream_jax.training.latent_reader import LatentReader, misreading
from pikastream_jax.training.sampling import sequence_velocity

MORE_NOISE = 1 / 3  # share of chunks that are moved to pure noise, where a step decides what the chunk will show


def random_chunks(key: Array, batch: int, frames: int, largest: int) -> Int[Array, "b f"]:
    """Chunk of every latent frame: the largest size in two sequences of three, else any size up to it."""
    k_any, k_size = jax.random.split(key)
    size = jax.random.randint(k_size, (batch, 1), 1, largest + 1)
    size = jnp.where(jax.random.uniform(k_any, (batch, 1)) < 2 / 3, largest, size)
    return jnp.arange(frames) // size


def stream_chunks(config: Config, batch: int, frames: int) -> Int[Array, "b f"]:
    """Chunk of every latent frame as in a stream."""
    return jnp.broadcast_to(jnp.arange(frames) // config.stream.chunk, (batch, frames))


def random_steps(config: Config, key: Array, chunk_ids: Int[Array, "b f"]) -> Int[Array, "b f"]:
    """One of the solver's steps for every chunk, on its latent frames; `MORE_NOISE` of the chunks are moved to the first."""
    k_first, k_any = jax.random.split(key)
    step_of_chunk = jax.random.randint(k_any, chunk_ids.shape, 0, config.stream.steps)
    step_of_chunk = jnp.where(jax.random.uniform(k_first, chunk_ids.shape) < MORE_NOISE, 0, step_of_chunk)
    return jnp.take_along_axis(step_of_chunk, chunk_ids, axis=1)


def any_timesteps(config: Config, key: Array, chunk_ids: Int[Array, "b f"]) -> Float[Array, "b f"]:
    """Any timestep for every chunk, logit-normal and shifted as the solver's are; `MORE_NOISE` of the chunks are moved to 1."""
    k_first, k_any = jax.random.split(key)
    t = logit_normal_timesteps(k_any, chunk_ids.shape, config.stream.shift)
    t = jnp.where(jax.random.uniform(k_first, chunk_ids.shape) < MORE_NOISE, 1.0, t)
    return jnp.take_along_axis(t, chunk_ids, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A teacher's way from noise to clean latents."""

    states: Float[Array, "s b f r c z"]  # at the solver's timesteps; the last is the end, at 0
    context: Float[Array, "b f r c z"]  # what the context copy shows, at the solver's last timestep


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoCopies:
    """What the two copies of a batch show: the network's question, and what its answer is held against."""

    x: Float[Array, "b 2f r c z"]  # context copy, query copy
    t: Float[Array, "b 2f"]
    query_noise: Float[Array, "b f r c z"]
    chunk_ids: Int[Array, "b f"]
    reference_distance: Float[Array, "b"]

    @property
    def t_query(self) -> Float[Array, "b f"]:
        return self.t[:, self.chunk_ids.shape[1] :]


def two_copies(
    config: Config,
    batch: DiTBatch,
    key: Array,
    chunk_ids: Int[Array, "b f"],
    trajectory: Trajectory | None = None,
    *,
    all_timesteps: bool = False,
) -> TwoCopies:
    """Draws the query copy's timesteps, the reference's place, and noise where no trajectory tells it.

    Args:
      batch: its latents are the trajectory's end where there is one.
      all_timesteps: the query copy's are any, not the solver's: for a teacher whose trajectories shall be solved finely.

    Raises:
      ValueError: a trajectory at timesteps that it does not hold.
    """
    if trajectory is not None and all_timesteps:
        raise ValueError("a trajectory holds the solver's timesteps alone: ask for all timesteps of the data")
    k_step, k_context, k_query, k_distance = jax.random.split(key, 4)
    b, f = chunk_ids.shape
    times = jnp.asarray(solver_timesteps(config.stream.steps, config.stream.shift))
    step = random_steps(config, k_step, chunk_ids)
    t_query = any_timesteps(config, k_step, chunk_ids) if all_timesteps else times[step]
    t_context = jnp.full((b, f), times[config.stream.steps - 1])
    if trajectory is None:
        context = interpolate(batch.latents, jax.random.normal(k_context, batch.latents.shape), t_context)
        query_noise = jax.random.normal(k_query, batch.latents.shape)
        query = interpolate(batch.latents, query_noise, t_query)
    else:
        context = trajectory.context
        query = jnp.take_along_axis(trajectory.states, step[None, :, :, None, None, None], axis=0)[0]
        t = t_query[:, :, None, None, None]
        query_noise = (query - (1.0 - t) * batch.latents) / t
    distance = jax.random.randint(k_distance, (b,), 4, 31).astype(jnp.float32)
    both = jnp.concatenate([context, query], axis=1), jnp.concatenate([t_context, t_query], axis=1)
    return TwoCopies(*both, query_noise, chunk_ids, distance)


def causal_velocity(config: Config, model: Functional, params: Params, batch: DiTBatch, copies: TwoCopies) -> Float[Array, "b f r c z"]:
    """The student's velocity of the query copy."""
    velocity = sequence_velocity(
        model,
        params,
        batch,
        copies.x,
        copies.t,
        copies.reference_distance,
        chunk_ids=copies.chunk_ids,
        window=config.stream.window,
        copies=2,
    )
    return velocity[:, copies.chunk_ids.shape[1] :]


def causal_losses(
    config: Config, model: Functional, params: Params, batch: DiTBatch, copies: TwoCopies, reader: LatentReader
) -> dict[str, Float[Array, ""]]:
    """Of the query copy: `loss`, the velocity error, and what `misreading` gives."""
    velocity = causal_velocity(config, model, params, batch, copies)
    value = weighted_velocity_loss(velocity, copies.query_noise - batch.latents, batch.weight)
    return {"loss": value} | misreading(reader, batch, velocity, copies.query_noise, copies.t_query)


def diffusion_forcing_losses(
    config: Config, model: Functional, params: Params, batch: DiTBatch, key: Array, chunk_ids: Int[Array, "b f"], reader: LatentReader
) -> dict[str, Float[Array, ""]]:
    """The same of a single copy in which every chunk stands at a timestep of its own and is context to the later ones as it is.

    Diffusion Forcing (Chen et al. 2024, https://arxiv.org/abs/2407.01392), with the solver's timesteps for levels as CausVid has them.
    Half the tokens of two copies, but the context is mostly noisier than a stream's.
    """
    k_step, k_noise, k_distance = jax.random.split(key, 3)
    times = jnp.asarray(solver_timesteps(config.stream.steps, config.stream.shift))
    t = times[random_steps(config, k_step, chunk_ids)]
    noise = jax.random.normal(k_noise, batch.latents.shape)
    distance = jax.random.randint(k_distance, t.shape[:1], 4, 31).astype(jnp.float32)
    x = interpolate(batch.latents, noise, t)
    velocity = sequence_velocity(model, params, batch, x, t, distance, chunk_ids=chunk_ids, window=config.stream.window)
    value = weighted_velocity_loss(velocity, noise - batch.latents, batch.weight)
    return {"loss": value} | misreading(reader, batch, velocity, noise, t)
