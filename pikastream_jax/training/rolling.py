"""Training for the rolling schedule: chunks at rising noise levels that move on together, as the engine's rolling mode has them.

StreamDiT (https://arxiv.org/abs/2507.03745) trains with mixed partitions: the latent frames in flight are cut into chunks of a size drawn for
each sequence, each chunk a level noisier than the one before. Here a pass is the engine's own (`streaming.step.chunk_velocity` over a cache and
everything in flight), and so is the cache: the keys and values of the chunk that leaves, as they were in its last pass, beside its noisy
neighbours. Only what the passes show is given, clips with noise, not what the student made of it (teacher forcing), and no gradient goes
through the cache.

Alternative considered: a whole sequence at once with a mask, as in the sequential schedule. It cannot give those keys, because a chunk that is
context to the next chunks has seen neighbours which they don't see.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from pikastream_jax.config import Config, StreamConfig
from pikastream_jax.diffusion.flow import interpolate, shift_timestep
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.state import StreamState, init_state, install_reference
from pikastream_jax.streaming.step import Models, chunk_velocity
from pikastream_jax.training.dit_data import DiTBatch, weighted_velocity_loss
from pikastream_jax.training.latent_reader import LatentReader, misreading


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """What one pass shows of a sequence."""

    rows: DiTBatch  # the latent frames in flight; of its conditions alone those that are told frame by frame
    noise: Float[Array, "b w r c z"]
    t: Float[Array, "b w"]


def chunk_sizes(stream: StreamConfig) -> list[int]:
    """Sizes that the latent frames in flight can be cut into, the stream's own last.

    >>> chunk_sizes(StreamConfig(chunk=3, window=6, steps=4, schedule="rolling"))
    [1, 2, 3]
    """
    return [size for size in range(1, stream.chunk + 1) if stream.in_flight % size == 0 and stream.window % size == 0]


def random_sizes(key: Array, stream: StreamConfig, batch: int) -> Int[Array, "b"]:
    """The stream's own chunk in two sequences of three, else any of `chunk_sizes`."""
    k_any, k_size = jax.random.split(key)
    size = jax.random.choice(k_size, jnp.array(chunk_sizes(stream)), (batch,))
    return jnp.where(jax.random.uniform(k_any, (batch,)) < 2 / 3, stream.chunk, size)


def partition_levels(stream: StreamConfig, size: Int[Array, "b"]) -> Float[Array, "b w"]:
    """The timestep of every latent frame in flight, oldest first: of n chunks the i-th stands at shift(i / n).

    With the stream's own chunk these are the timesteps of `diffusion.flow.passes`.
    """
    chunk = 1 + jnp.arange(stream.in_flight) // size[:, None]
    return shift_timestep(chunk * size[:, None] / stream.in_flight, stream.shift)


def pass_count(stream: StreamConfig, frames: int) -> int:
    """Passes over a sequence, each a chunk further than the one before.

    Raises:
      ValueError: the sequence ends before a pass sees the whole window, as all passes of a stream do but the first.
    """
    if frames < stream.in_flight + stream.window:
        raise ValueError(
            f"sequences of {frames} latent frames are shorter than the {stream.in_flight} in flight (steps {stream.steps} x chunk "
            f"{stream.chunk}) behind a window of {stream.window}: use --latent-frames {stream.in_flight + stream.window} or more"
        )
    return 1 + (frames - stream.in_flight) // stream.chunk


def remember(config: Config, state: StreamState, own: KeysValues, size: Int[Array, "b"]) -> StreamState:
    """`streaming.step.write_chunk` for chunks of a size of each row's own, which divides the window; to the ring alone."""
    stream, n = config.stream, config.tokens_per_frame
    first = (1 + stream.sink) * n
    frame = (jnp.arange(stream.window) - state.ring_count[:, None]) % stream.window  # of the chunk, that a slot would take
    taken = (frame < size[:, None])[None, :, :, None, None, None]
    index = jnp.minimum(frame, stream.chunk - 1)[None, :, :, None, None, None]

    def written(cache, new):
        layers, b, _, heads, width = cache.shape
        new = new.reshape(layers, b, stream.chunk, n, heads, width).astype(cache.dtype)
        ring = cache[:, :, first:].reshape(layers, b, stream.window, n, heads, width)
        ring = jnp.where(taken, jnp.take_along_axis(new, index, axis=2), ring)
        return cache.at[:, :, first:].set(ring.reshape(layers, b, -1, heads, width))

    return dataclasses.replace(
        state, dit_k=written(state.dit_k, own.k), dit_v=written(state.dit_v, own.v), ring_count=state.ring_count + size
    )


def rolling_passes(
    models: Models,
    params: Params,
    batch: DiTBatch,
    noise: Float[Array, "b f r c z"],
    size: Int[Array, "b"],
    judge: Callable[[Pass, Float[Array, "b w r c z"]], PyTree],
) -> PyTree:
    """All passes of whole sequences, from an empty window on.

    Args:
      models: as they are trained, on the picture's part that the batch shows, with the rolling schedule.
      size: each row's chunk, one of `chunk_sizes`.
      judge: (what a pass shows, the velocity there) -> what is kept of it.

    Returns:
      What `judge` kept, passes along a new first axis.
    """
    config, stream = models.config, models.config.stream
    denoiser = models.denoiser.bind(params)
    text, valid = denoiser.text_conditions(batch.tokens, batch.valid, batch.frame_prompt)
    conditions = denoiser.conditions(text, valid, batch.mel, batch.motion, batch.keep_audio)
    state = install_reference(init_state(config, size.shape[0]), denoiser.dit.reference_keys_values(batch.reference))
    t = partition_levels(stream, size)

    def one(state, number):
        first = number * size

        def now(leaf, rows=0):  # rows: their axis, before that of time
            def cut(leaf, first):
                return jax.lax.dynamic_slice_in_dim(leaf, first, stream.in_flight, axis=rows)

            return jax.vmap(cut, in_axes=(rows, 0), out_axes=rows)(leaf, first)

        told = dataclasses.replace(
            conditions,
            text=jax.tree.map(lambda leaf: now(leaf, rows=1), conditions.text),
            text_valid=now(conditions.text_valid),
            audio=jax.tree.map(lambda leaf: now(leaf, rows=1), conditions.audio),
            motion=now(conditions.motion),
        )
        framed = ("latents", "mel", "frame_prompt", "weight", "boxes", "truth", "opening", "motion")
        rows = dataclasses.replace(batch, **{field: now(getattr(batch, field)) for field in framed})
        shown = Pass(rows, now(noise), t)
        velocity, own = chunk_velocity(models, params, state, told)(interpolate(rows.latents, shown.noise, t), t)
        return remember(config, state, jax.lax.stop_gradient(own), size), judge(shown, velocity)

    # What a pass computed is computed again for its gradient: kept for all passes it would take as much memory as they are many.
    return jax.lax.scan(jax.checkpoint(one), state, jnp.arange(pass_count(stream, batch.latents.shape[1])))[1]


def rolling_losses(
    models: Models, params: Params, batch: DiTBatch, key: Array, size: Int[Array, "b"], reader: LatentReader
) -> dict[str, Float[Array, ""]]:
    """Of all that is in flight in all passes: `loss`, the velocity error of flow matching, and what `misreading` gives."""
    noise = jax.random.normal(key, batch.latents.shape)

    def judge(shown: Pass, velocity: Float[Array, "b w r c z"]) -> dict[str, Float[Array, ""]]:
        rows = shown.rows
        value = weighted_velocity_loss(velocity, shown.noise - rows.latents, rows.weight)
        return {"loss": value} | misreading(reader, rows, velocity, shown.noise, shown.t)

    return jax.tree.map(jnp.mean, rolling_passes(models, params, batch, noise, size, judge))
