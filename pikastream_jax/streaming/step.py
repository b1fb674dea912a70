"""One chunk: sound in, video frames out. `step` is the only program that runs while a stream is live."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pikastream_jax.audio.slices import chunk_slices
from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import passes
from pikastream_jax.dit import Denoiser
from pikastream_jax.dit.model import Conditions, KeysValues
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.nn.ring import ring_ages, write_rows
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate
from pikastream_jax.streaming.state import StepInputs, StreamState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelParams:
    """All weights that a stream needs."""

    denoiser: Params
    flash_vae: Params
    statistics: LatentStatistics


@dataclasses.dataclass(frozen=True)
class Models:
    """The graphs of both models, apart from their weights."""

    config: Config
    denoiser: Functional
    flash_vae: Functional

    @classmethod
    def of(cls, config: Config) -> "Models":
        return cls(
            config,
            functional(lambda rngs: Denoiser(config, rngs=rngs)),
            functional(lambda rngs: FlashVAE(config.flash_vae, impl=config.stream.attention, rngs=rngs)),
        )


def slot_times(config: Config, ring_count: Int[Array, "b"]) -> Float[Array, "b g"]:
    """Place in time of every cached latent frame (reference | sink | ring), relative to the last latent frame in flight.

    Relative places never grow, so a stream may last for ever.
    """
    stream = config.stream
    first = 1 - stream.in_flight  # of the chunk, or of the first chunk in flight
    reference = jnp.full((ring_count.shape[0], 1), stream.reference_distance)
    sink = first - stream.window - stream.sink + jnp.arange(stream.sink)  # right before the window
    sink = jnp.broadcast_to(sink, (ring_count.shape[0], stream.sink))
    return jnp.concatenate([reference, sink, first - ring_ages(ring_count, stream.window)], axis=1).astype(jnp.float32)


def write_chunk(config: Config, state: StreamState, chunk: KeysValues) -> StreamState:
    """Stores a chunk's keys and values: in the sink while that has room, else over the ring's oldest.

    What was in flight before a rolling stream's first sound is nothing to keep for ever: it goes to the ring.
    """
    stream, n = config.stream, config.tokens_per_frame
    to_sink = (state.sink_count < stream.sink) & (state.chunk_count >= stream.delay)
    slot = 1 + jnp.where(to_sink, state.sink_count, stream.sink + state.ring_count % stream.window)

    return dataclasses.replace(
        state,
        dit_k=write_rows(state.dit_k, chunk.k, slot * n),
        dit_v=write_rows(state.dit_v, chunk.v, slot * n),
        sink_count=state.sink_count + jnp.where(to_sink, stream.chunk, 0),
        ring_count=state.ring_count + jnp.where(to_sink, 0, stream.chunk),
    )


def chunk_velocity(
    models: Models, params: Params, state: StreamState, conditions: Conditions
) -> Callable[[Float[Array, "b f r c z"], Float[Array, "b f"]], tuple[Float[Array, "b f r c z"], KeysValues]]:
    """The network as one denoising step of this chunk sees it: (x_t, t) -> velocity, and the keys and values that the cache would take.

    The cached keys are turned to their places relative to this chunk once; all denoising steps read the turned copy.
    """
    config = models.config
    stream, n = config.stream, config.tokens_per_frame
    denoiser = models.denoiser.bind(params)
    places = grid_positions(slot_times(config, state.ring_count), *config.token_grid)
    cache = KeysValues(rotate(state.dit_k, rope_tables(*places, config.dit.head_dim)), state.dit_v)

    def velocity(x, t):
        return denoiser.dit.forward_chunk(
            x,
            t,
            conditions,
            cache,
            fixed_slots=(1 + stream.sink) * n,
            fixed_valid=(1 + state.sink_count) * n,
            ring_valid=jnp.minimum(state.ring_count, stream.window) * n,
            kept=stream.chunk,
        )

    return velocity


def denoise_chunk(
    models: Models, params: Params, state: StreamState, conditions: Conditions, noise: Float[Array, "b f r c z"]
) -> tuple[StreamState, Float[Array, "b f r c z"]]:
    """Few-step Euler from noise to the normalised latents of a chunk, then the cache takes its keys and values of the last step.

    In the rolling schedule the noise joins the chunks in flight, and the oldest of them leaves.

    Args:
      conditions: of all latent frames in flight.
      noise: a new chunk at t = 1.
    """
    state, latents, _ = denoise_trajectory(models, params, state, conditions, noise)
    return state, latents


def denoise_trajectory(
    models: Models, params: Params, state: StreamState, conditions: Conditions, noise: Float[Array, "b f r c z"]
) -> tuple[StreamState, Float[Array, "b f r c z"], Float[Array, "passes b w r c z"]]:
    """`denoise_chunk`, and what every pass started from: all latent frames in flight at the timesteps of `passes`.

    Training asks one of those passes again, with gradient (`training.roll_out`). A stream leaves them unused, and a compiled step does
    not keep what is unused.
    """
    config = models.config
    stream = config.stream
    velocity_of = chunk_velocity(models, params, state, conditions)

    def euler(carry, times):
        x, _ = carry
        t, t_next = (jnp.broadcast_to(time, x.shape[:2]) for time in times)
        velocity, own = velocity_of(x, t)
        return (x + (t_next - t)[..., None, None, None] * velocity, own), x

    start = jnp.concatenate([state.buffer.latents, noise], axis=1)
    own = jax.eval_shape(lambda x: velocity_of(x, jnp.ones(x.shape[:2]))[1], start)
    own = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), own)
    (x, own), trajectory = jax.lax.scan(euler, (start, own), passes(stream), unroll=stream.unroll_steps)
    latents = x[:, : stream.chunk]
    if stream.clean_pass:
        _, own = velocity_of(latents, jnp.zeros(latents.shape[:2]))
    state = write_chunk(config, state, own)
    state = dataclasses.replace(state, buffer=dataclasses.replace(state.buffer, latents=x[:, stream.chunk :]))
    return state, latents, trajectory


def generate_step(
    models: Models, params: ModelParams, state: StreamState, inputs: StepInputs
) -> tuple[StreamState, UInt8[Array, "b t h w 3"]]:
    """One chunk of every stream: its new samples in; its video frames out, or in the rolling schedule those of `delay` chunks ago."""
    config = models.config
    stream = config.stream
    denoiser = models.denoiser.bind(params.denoiser)
    samples, slices = chunk_slices(state.audio, inputs.audio, inputs.samples, config.audio.context_samples)
    rows, columns = config.latent_grid
    shape = (stream.chunk, rows, columns, config.flash_vae.latent_channels)

    def draw(rng, count):
        key = jax.random.fold_in(jax.random.wrap_key_data(rng), count)
        motion = jax.random.normal(jax.random.fold_in(key, 1), (stream.chunk, config.dit.motion))
        return jax.random.normal(key, shape), motion

    noise, motion = jax.vmap(draw)(state.rng, state.chunk_count)
    audio = jnp.concatenate([state.buffer.audio, denoiser.audio.from_samples(slices)], axis=1)
    motion = jnp.concatenate([state.buffer.motion, motion], axis=1)
    conditions = Conditions(state.text, state.text_valid, denoiser.dit.audio_keys_values(audio), motion)
    state, latents = denoise_chunk(models, params.denoiser, state, conditions, noise)
    buffer = dataclasses.replace(state.buffer, audio=audio[:, stream.chunk :], motion=motion[:, stream.chunk :])

    vae = models.flash_vae.bind(params.flash_vae)
    cache, pixels = state.vae, []
    for frame in range(stream.chunk):
        cache, frames = vae.decode_step(cache, params.statistics.restore(latents[:, frame]))
        pixels.append(jnp.round((jnp.clip(frames, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8))
        # One after another: XLA would join the products of all frames, which share their weights, and copy every factor and result for it.
        latents, pixels[-1] = jax.lax.optimization_barrier((latents, pixels[-1]))
    state = dataclasses.replace(state, vae=cache, buffer=buffer, audio=samples, chunk_count=state.chunk_count + 1)
    return state, jnp.concatenate(pixels, axis=1)


def generate_clip(
    models: Models, params: ModelParams, state: StreamState, inputs: StepInputs
) -> tuple[StreamState, UInt8[Array, "b t h w 3"]]:
    """A long clip offline: `lax.scan` of the same step; every leaf of `inputs` has the chunks as its leading axis."""
    state, frames = jax.lax.scan(lambda state, one: generate_step(models, params, state, one), state, inputs)
    frames = frames.swapaxes(0, 1)
    return state, frames.reshape(frames.shape[0], -1, *frames.shape[3:])
