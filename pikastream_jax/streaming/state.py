"""Everything that changes while a stream runs, as one pytree whose shapes never change.

All of it starts as zeros plus counts, so the first chunk and the millionth are the same program. Counters and random keys are per
batch row: rows may belong to different sessions.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate, passes
from pikastream_jax.dit.model import KeysValues
from pikastream_jax.flash_vae import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RollingBuffer:
    """Chunks between noise and clean that wait for the next pass, oldest and cleanest first; nothing (w = 0) in the sequential schedule."""

    latents: Float[Array, "b w r c z"]
    audio: Float[Array, "b w a d"]  # audio tokens of those latent frames
    motion: Float[Array, "b w m"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """State of `b` streams. Slots of the DiT's cache: reference | sink | ring, whole latent frames of n tokens each."""

    dit_k: Float[Array, "layers b slots h e"]  # slots = (1 + sink + W) n; keys before RoPE
    dit_v: Float[Array, "layers b slots h e"]
    text: KeysValues  # [layers, b, 1, length, h, e]
    text_valid: Int[Array, "b 1"]
    vae: KVCache  # FlashVAE decoder's window
    buffer: RollingBuffer
    audio: Float[Array, "b context"]  # the last samples heard
    sink_count: Int[Array, "b"]  # latent frames in the sink
    ring_count: Int[Array, "b"]  # latent frames ever written to the ring
    chunk_count: Int[Array, "b"]  # chunks generated
    rng: UInt32[Array, "b 2"]  # key data; a chunk's noise and motion are folded from it and chunk_count


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a chunk needs from outside."""

    audio: Float[Array, "b m"]  # the chunk's new samples, padded at the end
    samples: Int[Array, "b f"]  # how many of them each latent frame adds


def init_state(config: Config, batch: int) -> StreamState:
    """The start of a stream, before a reference and a prompt are installed."""
    dit, text, stream = config.dit, config.text, config.stream
    dtype, waiting = jnp.dtype(stream.dtype), stream.in_flight - stream.chunk
    n = config.tokens_per_frame
    slots = (1 + stream.sink + stream.window) * n
    cache = (dit.blocks, batch, slots, dit.heads, dit.head_dim)
    prompt = (dit.blocks, batch, 1, text.length, dit.heads, dit.head_dim)
    rows, columns = config.latent_grid
    vae = config.flash_vae
    decoder = (
        vae.decoder_blocks,
        batch,
        vae.window * rows * columns,
        vae.decoder_kv_heads,
        vae.decoder_dim // vae.decoder_heads,
    )

    def count():  # separate buffers: one buffer can't be donated twice
        return jnp.zeros(batch, jnp.int32)

    return StreamState(
        dit_k=jnp.zeros(cache, dtype),
        dit_v=jnp.zeros(cache, dtype),
        text=KeysValues(jnp.zeros(prompt, dtype), jnp.zeros(prompt, dtype)),
        text_valid=jnp.ones((batch, 1), jnp.int32),
        vae=KVCache(jnp.zeros(decoder, dtype), jnp.zeros(decoder, dtype), count()),
        buffer=RollingBuffer(
            jnp.zeros((batch, waiting, rows, columns, vae.latent_channels)),
            jnp.zeros((batch, waiting, config.audio.tokens, config.audio.dim), dtype),
            jnp.zeros((batch, waiting, dit.motion)),
        ),
        audio=jnp.zeros((batch, config.audio.context_samples)),
        sink_count=count(),
        ring_count=count(),
        chunk_count=count(),
        rng=jnp.zeros((batch, 2), jnp.uint32),
    )


_LAYERS_FIRST = ("dit_k", "dit_v", "text", "vae")  # fields whose arrays are [layers, b, ...]; their counts are [b]


def _row_axis(field: str, leaf: Array) -> int:
    return 1 if field in _LAYERS_FIRST and leaf.ndim > 2 else 0


def join_rows(states: Sequence[StreamState]) -> StreamState:
    """Streams as the rows of one state, in their order."""
    return StreamState(
        **{
            field.name: jax.tree.map(
                lambda *leaves, name=field.name: jnp.concatenate(leaves, axis=_row_axis(name, leaves[0])),
                *[getattr(state, field.name) for state in states],
            )
            for field in dataclasses.fields(StreamState)
        }
    )


def split_rows(state: StreamState) -> tuple[StreamState, ...]:
    """The streams of a state, one row each: what `join_rows` joined."""

    def row(index: int) -> StreamState:
        return StreamState(
            **{
                field.name: jax.tree.map(
                    lambda leaf, name=field.name: jax.lax.slice_in_dim(leaf, index, index + 1, axis=_row_axis(name, leaf)),
                    getattr(state, field.name),
                )
                for field in dataclasses.fields(StreamState)
            }
        )

    return tuple(row(index) for index in range(state.chunk_count.shape[0]))


def install_reference(state: StreamState, reference: KeysValues) -> StreamState:
    """Overwrites the reference's rows [layers, b, n, h, e] and empties the sink, which still shows the old face."""
    n = reference.k.shape[2]
    return dataclasses.replace(
        state,
        dit_k=state.dit_k.at[:, :, :n].set(reference.k),
        dit_v=state.dit_v.at[:, :, :n].set(reference.v),
        sink_count=jnp.zeros_like(state.sink_count),
    )


def install_prompt(state: StreamState, text: KeysValues, valid: Int[Array, "b 1"]) -> StreamState:
    """Puts the prompt's keys and values in the place of the present ones; they are the state's from then on, and donated with it."""
    return dataclasses.replace(state, text=text, text_valid=valid)


def fill_buffer(config: Config, state: StreamState, reference: Float[Array, "b r c z"], silence: Float[Array, "a d"]) -> StreamState:
    """The start of a rolling stream: what is in flight before the first sound is the reference, still and silent.

    Those chunks leave first and are not shown; they give the first real one neighbours such as the model knows. Without effect in the
    sequential schedule.

    Args:
      reference: normalised latents of the reference.
      silence: audio tokens of a silent slice.
    """
    buffer = state.buffer
    b, waiting = buffer.latents.shape[:2]
    t = jnp.asarray(passes(config.stream)[0][0, :waiting])  # what the buffer's frames have at the start of a pass
    def draw(rng):  # the chunks' keys are folded with their numbers; this is none of them
        return jax.random.normal(jax.random.fold_in(jax.random.wrap_key_data(rng), 2**32 - 1), buffer.latents.shape[1:])

    noise = jax.vmap(draw)(state.rng)
    still = jnp.broadcast_to(reference[:, None], noise.shape)
    latents = interpolate(still, noise, jnp.broadcast_to(t, (b, waiting)))
    audio = jnp.broadcast_to(silence, buffer.audio.shape).astype(buffer.audio.dtype)
    return dataclasses.replace(state, buffer=RollingBuffer(latents, audio, buffer.motion))
