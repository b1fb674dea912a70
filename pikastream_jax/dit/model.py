"""The DiT over whole sequences (training, teacher) and over one chunk with the rolling cache (streaming).

Both run the same blocks; only the attention they are given differs. The reference picture is told apart by its RoPE position alone:
its place in time is `reference_distance` latent frames after the last frame of the chunk, where no video token ever stands.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from pallas_kernels import chunked_attention, frame_attention, ring_attention
from pikastream_jax.config import DiTConfig
from pikastream_jax.dit.block import Attention, DiTBlock, OutputHead
from pikastream_jax.dit.layers import run_blocks
from pikastream_jax.nn.layers import MLP
from pikastream_jax.nn.patch import patchify, unpatchify
from pikastream_jax.nn.placement import gather_frames, place_frames
from pikastream_jax.nn.rope import grid_positions, rope_tables, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
    """Keys (after RMSNorm, before RoPE) and values of every layer."""

    k: Float[Array, "layers b *s h e"]
    v: Float[Array, "layers b *s h e"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditions:
    """What a sequence is conditioned on, ready to attend to; computed once per prompt and once per chunk, not per step."""

    text: KeysValues  # [layers, b, s, length, h, e]: s is 1 (one prompt) or the number of latent frames
    text_valid: Int[Array, "b s"]
    audio: KeysValues  # [layers, b, f, audio tokens, h, e]
    motion: Float[Array, "b f m"]  # what is new in every latent frame's motion, see `DiTConfig.motion`


def timestep_embedding(t: Float[Array, "*b"], dim: int) -> Float[Array, "*b d"]:
    """Cosines then sinusoids of 1000 t at `dim` / 2 frequencies from 1 down to 1 / 10,000 (DDPM's; Wan's order).

    Args:
      t: timesteps in [0, 1], 1 is pure noise.
    """
    half = dim // 2
    frequency = jnp.exp(-math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angle = 1000.0 * t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class DiT(nnx.Module):
    """Noisy latents and conditions -> velocity (noise - clean)."""

    def __init__(self, config: DiTConfig, *, impl: str = "auto", rngs: nnx.Rngs):
        """impl: which attention kernels to use, see `pallas_kernels`."""
        self.config, self.impl = config, impl
        d = config.dim
        self.patch_in = nnx.Linear(config.patch**2 * config.latent_channels, d, rngs=rngs)
        self.text_embed = MLP(config.text_dim, d, d, rngs=rngs)
        self.time_embed_in = nnx.Linear(config.frequency_dim, d, rngs=rngs)
        self.time_embed_out = nnx.Linear(d, d, rngs=rngs)
        self.time_projection = nnx.Linear(d, 6 * d, rngs=rngs)
        self.motion_embed = nnx.Linear(config.motion, d, use_bias=False, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)
        self.blocks = nnx.List([DiTBlock(config, rngs=rngs) for _ in range(config.blocks)])
        self.rematerialise = "none"  # see `run_blocks`; training changes both, see `training/training_form.py`
        self.head = OutputHead(config, rngs=rngs)

    # Conditions

    def text_keys_values(self, text: Float[Array, "b s l c"]) -> KeysValues:
        """Every layer's keys and values of the text tokens; once per prompt."""
        context = self.text_embed(text)
        return self._context_keys_values(lambda block: block.text_attention, context)

    def audio_keys_values(self, audio: Float[Array, "b f a c"]) -> KeysValues:
        """Every layer's keys and values of the audio tokens; once per chunk."""
        return self._context_keys_values(lambda block: block.audio_attention, audio)

    def _context_keys_values(self, attention: Callable[[DiTBlock], Attention], context: Float[Array, "b s l c"]) -> KeysValues:
        def project(block, x, layers, layer):
            return x, attention(block).keys_values(context)

        return KeysValues(*run_blocks(self.blocks, project, None, None, self.rematerialise)[1])

    def reference_keys_values(self, reference: Float[Array, "b r c z"]) -> KeysValues:
        """Every layer's keys and values [layers, b, n, h, e] of a reference's latents; once per reference.

        Reference tokens have timestep 0 and no motion, attend only to themselves and take neither text nor audio, so nothing of the stream
        enters here.
        """
        rows, columns = reference.shape[1] // self.config.patch, reference.shape[2] // self.config.patch
        x = self._tokens(reference)[:, None]
        still = jnp.zeros((*x.shape[:2], self.config.motion))
        _, time = self._time(jnp.zeros(x.shape[:2]), still)
        tables = rope_tables(*grid_positions(jnp.zeros(1), rows, columns), self.config.head_dim)

        def through(block, x, layers, layer):
            own = []

            def attend(q, k, v):
                own.extend((k[:, 0], v[:, 0]))
                return frame_attention(rotate(q, tables), rotate(k, tables), v, impl=self.impl)

            return block(place_frames(x), time, attend, None, None), tuple(own)

        return KeysValues(*run_blocks(self.blocks, through, x, None, self.rematerialise)[1])

    # The network

    def forward_sequence(
        self,
        latents: Float[Array, "b cf r c z"],
        t: Float[Array, "b cf"],
        conditions: Conditions,
        reference: KeysValues | None,
        *,
        chunk_ids: Int[Array, "b f"],
        window: int,
        reference_distance: Float[Array, "b"],
        copies: int = 1,
    ) -> Float[Array, "b cf r c z"]:
        """Velocity of a whole sequence at once.

        Args:
          latents: noisy latents; with two copies the context copy comes first.
          t: every latent frame's timestep.
          conditions: for cf latent frames (audio and motion; text where it changes).
          reference: `reference_keys_values`; None for none, as in Wan's text-to-video models.
          chunk_ids: the chunk of every latent frame; all equal is the bidirectional teacher.
          window: latent frames before its chunk that a frame sees.
          reference_distance: from the last latent frame of every chunk to the reference's place.
          copies: see `pallas_kernels.frame_visibility`.
        """
        b, f = chunk_ids.shape
        rows, columns = (size // self.config.patch for size in latents.shape[2:4])
        n, head_dim = rows * columns, self.config.head_dim
        frame = jnp.arange(f, dtype=jnp.float32)
        same = chunk_ids[:, :, None] == chunk_ids[:, None, :]
        last = jnp.max(jnp.where(same, frame, 0.0), axis=2)  # of every frame's chunk
        absolute = rope_tables(*grid_positions(jnp.tile(frame, copies), rows, columns), head_dim)
        to_last = rope_tables(*grid_positions(jnp.tile(frame - last, (1, copies)), rows, columns), head_dim)
        anchor = rope_tables(*grid_positions(reference_distance[:, None], rows, columns), head_dim)
        reference = None if reference is None else KeysValues(rotate(reference.k, anchor), reference.v)

        def attend_self(reference, layer, q, k, v):
            q, k, v = (x.reshape(b, copies * f * n, *x.shape[3:]) for x in (q, gather_frames(k), gather_frames(v)))
            out = chunked_attention(
                rotate(q, absolute),
                rotate(k, absolute),
                v,
                chunk_ids=chunk_ids,
                window=window,
                copies=copies,
                fixed=None if reference is None else (rotate(q, to_last), reference.k[layer], reference.v[layer]),
                impl=self.impl,
            )
            return out.reshape(b, copies * f, n, *out.shape[2:]), None

        return self._run(latents, t, conditions, attend_self, reference)[0]

    def forward_chunk(
        self,
        latents: Float[Array, "b f r c z"],
        t: Float[Array, "b f"],
        conditions: Conditions,
        cache: KeysValues,
        *,
        fixed_slots: int,
        fixed_valid: Int[Array, "b"],
        ring_valid: Int[Array, "b"],
        kept: int,
    ) -> tuple[Float[Array, "b f r c z"], KeysValues]:
        """Velocity of one chunk, and the own keys (before RoPE) and values [layers, b, kept n, h, e] of its first latent frames.

        Args:
          cache: every layer's slots, keys already rotated relative to this chunk's last latent frame; see
            `pallas_kernels.ring_attention` for the lengths.
          kept: latent frames whose keys and values are given back.
        """
        b, f = latents.shape[:2]
        rows, columns = (size // self.config.patch for size in latents.shape[2:4])
        n = rows * columns
        here = rope_tables(*grid_positions(jnp.arange(1.0 - f, 1.0), rows, columns), self.config.head_dim)

        def attend_self(cache, layer, q, k, v):
            q, k, v = (x.reshape(b, f * n, *x.shape[3:]) for x in (q, k, v))
            out = ring_attention(
                rotate(q, here),
                rotate(k, here),
                v,
                cache.k,
                cache.v,
                layer=layer,
                fixed_slots=fixed_slots,
                fixed_valid=fixed_valid,
                ring_valid=ring_valid,
                impl=self.impl,
            )
            return out.reshape(b, f, n, *out.shape[2:]), KeysValues(k[:, : kept * n], v[:, : kept * n])

        return self._run(latents, t, conditions, attend_self, cache)

    def _time(self, t: Float[Array, "b f"], motion: Float[Array, "b f m"]) -> tuple[Float[Array, "b f d"], Float[Array, "b f 6 d"]]:
        """Embedding and projection of every latent frame's timestep and motion.

        In float32, whatever the weights are: every block is scaled and shifted by it. Only the factors of the four products have the weights' dtype.
        """
        embedding = _product(self.time_embed_in, timestep_embedding(t, self.config.frequency_dim))
        embedding = _product(self.time_embed_out, jax.nn.silu(embedding)) + _product(self.motion_embed, motion)
        time = _product(self.time_projection, jax.nn.silu(embedding))
        return embedding, time.reshape(*t.shape, 6, self.config.dim)

    @property
    def dtype(self) -> jnp.dtype:
        """Of weights, tokens, keys and values."""
        return self.patch_in.kernel.dtype

    def _tokens(self, latents: Float[Array, "*b r c z"]) -> Float[Array, "*b n d"]:
        return self.patch_in(patchify(latents.astype(self.dtype), self.config.patch))

    def _run(self, latents, t, conditions: Conditions, attend_self: Callable, own: Any) -> tuple[Float[Array, "b f r c z"], Any]:
        """Velocity, and what the layers' self-attention gave back.

        Args:
          attend_self: (own, layer, q, k, v) -> (attended values, what the layer gives back).
          own: arrays [layers, ...] of which self-attention in every layer reads its own part.
        """
        b, f, height, width, _ = latents.shape
        patch = self.config.patch
        x = self._tokens(latents)
        embedding, time = self._time(t, conditions.motion)
        text_groups = conditions.text_valid.shape[1]

        def through(block, x, layers, layer):
            text, audio, own = layers
            given = []

            def attend(q, k, v):
                out, back = attend_self(own, layer, q, k, v)
                given.append(back)
                return out

            def attend_text(q):
                grouped = q.reshape(b, text_groups, -1, *q.shape[3:])
                out = frame_attention(grouped, text.k[layer], text.v[layer], valid=conditions.text_valid, impl=self.impl)
                return out.reshape(q.shape)

            def attend_audio(q):
                return frame_attention(q, audio.k[layer], audio.v[layer], impl=self.impl)

            return block(place_frames(x), time, attend, attend_text, attend_audio), given[0]

        x, given = run_blocks(self.blocks, through, x, (conditions.text, conditions.audio, own), self.rematerialise)
        velocity = unpatchify(self.head(x, embedding).astype(jnp.float32), patch, height // patch, width // patch)
        return velocity, given


def _product(linear: nnx.Linear, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    kernel = linear.kernel[...]
    out = jnp.matmul(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    return out if linear.bias is None else out + linear.bias[...]
