"""The attention kernels' inputs: shapes of the presets, and small odd ones; what each query sees, by the definition; operations and bytes.

A case draws its arrays, calls the kernel's front door, and says in plain terms (`parts`) what the result must be; `dense` computes that.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels import chunked_attention, frame_attention, ring_attention

Part = tuple[Array, Array, Array, np.ndarray | None]  # queries [b, t, h, d], keys and values [b, s, g, d], what is seen [b, t, s] or all


@dataclasses.dataclass(frozen=True)
class Ring:
    """`ring_attention`: batch rows differ in how full their cache is."""

    kernel = "ring"
    differentiated = 3  # of the arrays: queries, own keys, own values

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    slots: int
    fixed_slots: int
    fixed_valid: tuple[int, ...]  # of every batch row
    ring_valid: tuple[int, ...]

    def draw(self, key: Array) -> tuple[Array, ...]:
        b = len(self.fixed_valid)
        own = (b, self.tokens, self.kv_heads, self.head_dim)
        cache = (self.layers, b, self.slots, self.kv_heads, self.head_dim)
        return _normals(key, (b, self.tokens, self.heads, self.head_dim), own, own, cache, cache)

    def attend(self, arrays: tuple[Array, ...], impl: str, layer: int = 0) -> Array:
        return ring_attention(
            *arrays,
            layer=layer,
            fixed_slots=self.fixed_slots,
            fixed_valid=jnp.array(self.fixed_valid, jnp.int32),
            ring_valid=jnp.array(self.ring_valid, jnp.int32),
            impl=impl,
        )

    def parts(self, arrays: tuple[Array, ...]) -> list[Part]:
        q, k, v, cache_k, cache_v = arrays
        seen = np.zeros((q.shape[0], 1, self.slots), bool)
        for row, (fixed, ring) in enumerate(zip(self.fixed_valid, self.ring_valid, strict=True)):
            seen[row, :, :fixed] = True
            seen[row, :, self.fixed_slots : self.fixed_slots + ring] = True
        return [(q, k, v, None), (q, cache_k[0], cache_v[0], np.repeat(seen, self.tokens, axis=1))]

    def gradients(self, parts: list[tuple[Array, Array, Array]]) -> tuple[Array, ...]:
        """Of the first `differentiated` arrays, from those of the parts."""
        (dq, dk, dv), (dq_cache, _, _) = parts
        return dq + dq_cache, dk, dv

    @property
    def pairs(self) -> int:
        """Queries times the keys that each sees, all heads."""
        keys = sum(self.fixed_valid) + sum(self.ring_valid) + len(self.ring_valid) * self.tokens
        return self.heads * self.tokens * keys

    @property
    def bytes(self) -> int:
        """Every array that counts read or written once."""
        rows = len(self.ring_valid) * self.tokens
        keys = sum(self.fixed_valid) + sum(self.ring_valid) + rows
        return 2 * self.head_dim * (2 * rows * self.heads + 2 * keys * self.kv_heads)


@dataclasses.dataclass(frozen=True)
class Frame:
    """`frame_attention`: `frames` groups, each with its own keys."""

    kernel = "frame"
    differentiated = 3

    batch: int
    frames: int
    tokens: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    valid: tuple[int, ...] | None = None  # of every group, row by row

    def draw(self, key: Array) -> tuple[Array, ...]:
        groups = (self.batch, self.frames)
        keys = (*groups, self.keys, self.kv_heads, self.head_dim)
        return _normals(key, (*groups, self.tokens, self.heads, self.head_dim), keys, keys)

    def attend(self, arrays: tuple[Array, ...], impl: str) -> Array:
        valid = None if self.valid is None else jnp.array(self.valid, jnp.int32).reshape(self.batch, self.frames)
        return frame_attention(*arrays, valid=valid, impl=impl)

    def parts(self, arrays: tuple[Array, ...]) -> list[Part]:
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in arrays)
        seen = None
        if self.valid is not None:
            counts = np.array(self.valid)[:, None, None]
            seen = np.broadcast_to(np.arange(self.keys) < counts, (len(self.valid), self.tokens, self.keys))
        return [(q, k, v, seen)]

    def gradients(self, parts: list[tuple[Array, Array, Array]]) -> tuple[Array, ...]:
        return tuple(x.reshape(self.batch, self.frames, *x.shape[1:]) for x in parts[0])

    @property
    def pairs(self) -> int:
        keys = self.batch * self.frames * self.keys if self.valid is None else sum(self.valid)
        return self.heads * self.tokens * keys

    @property
    def bytes(self) -> int:
        groups = self.batch * self.frames
        return 2 * self.head_dim * groups * (2 * self.tokens * self.heads + 2 * self.keys * self.kv_heads)


@dataclasses.dataclass(frozen=True)
class Chunked:
    """`chunked_attention`: a training sequence, with a reference of `fixed` tokens (0: none)."""

    kernel = "chunked"

    chunk_ids: tuple[tuple[int, ...], ...]  # of every batch row
    tokens: int  # of a latent frame
    window: int
    copies: int
    fixed: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def differentiated(self) -> int:
        return 6 if self.fixed else 3

    @property
    def length(self) -> int:
        return self.copies * len(self.chunk_ids[0]) * self.tokens

    def draw(self, key: Array) -> tuple[Array, ...]:
        b = len(self.chunk_ids)
        q, keys = (b, self.length, self.heads, self.head_dim), (b, self.length, self.kv_heads, self.head_dim)
        reference = (b, self.fixed, self.kv_heads, self.head_dim)
        return _normals(key, q, keys, keys, *((q, reference, reference) if self.fixed else ()))

    def attend(self, arrays: tuple[Array, ...], impl: str) -> Array:
        return chunked_attention(
            *arrays[:3],
            chunk_ids=jnp.array(self.chunk_ids, jnp.int32),
            window=self.window,
            copies=self.copies,
            fixed=arrays[3:] or None,
            impl=impl,
        )

    @functools.cached_property
    def seen_frames(self) -> np.ndarray:
        """[b, frames of all copies, likewise]: a frame sees its own chunk of its own copy, and in the first copy the window before the chunk."""
        f = len(self.chunk_ids[0])
        seen = np.zeros((len(self.chunk_ids), self.copies * f, self.copies * f), bool)
        for row, ids in enumerate(self.chunk_ids):
            for query in range(self.copies * f):
                copy, frame = divmod(query, f)
                first = ids.index(ids[frame])
                seen[row, query, max(0, first - self.window) : first] = True
                for other in range(f):
                    if ids[other] == ids[frame]:
                        seen[row, query, copy * f + other] = True
        return seen

    def parts(self, arrays: tuple[Array, ...]) -> list[Part]:
        seen = np.repeat(np.repeat(self.seen_frames, self.tokens, axis=1), self.tokens, axis=2)
        parts = [(*arrays[:3], seen)]
        return [*parts, (*arrays[3:], None)] if self.fixed else parts

    def gradients(self, parts: list[tuple[Array, Array, Array]]) -> tuple[Array, ...]:
        return tuple(gradient for part in parts for gradient in part)

    @property
    def pairs(self) -> int:
        seen = int(self.seen_frames.sum()) * self.tokens**2
        return self.heads * (seen + len(self.chunk_ids) * self.length * self.fixed)

    @property
    def bytes(self) -> int:
        queries = (3 if self.fixed else 2) * self.length * self.heads
        return 2 * self.head_dim * len(self.chunk_ids) * (queries + 2 * (self.length + self.fixed) * self.kv_heads)


Case = Ring | Frame | Chunked


def _normals(key: Array, *shapes: tuple[int, ...]) -> tuple[Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


@functools.partial(jax.jit, static_argnames="backward")
def dense(parts: list[Part], d_out: Array, *, backward: bool) -> tuple[Array, list[tuple[Array, Array, Array]]]:
    """One softmax over all parts in float32, head by head, every weight in memory, gradients by their formulas: slow, plain, and not the kernels' own code.

    Args:
      d_out: gradient of the result.

    Returns:
      The result [b, t, h, d], and of every part the gradients of its queries, keys and values (none unless `backward`).
    """
    heads, d = parts[0][0].shape[2:]
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def one_head(i: Array):
        parts32, logits = [], []
        for q, k, v, seen in parts:
            group = i // (heads // k.shape[2])
            q, k, v = q[:, :, i].astype(jnp.float32), k[:, :, group].astype(jnp.float32), v[:, :, group].astype(jnp.float32)
            part = product("btd,bsd->bts", q, k) * d**-0.5
            logits.append(part if seen is None else jnp.where(seen, part, -1e30))  # equal where nothing is seen: the mean of all
            parts32.append((q, k, v))
        weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
        values = jnp.concatenate([v for _, _, v in parts32], axis=1)
        out = product("bts,bsd->btd", weights, values)
        if not backward:
            return out, []
        given = d_out[:, :, i].astype(jnp.float32)
        d_weights = product("btd,bsd->bts", given, values)
        d_logits = weights * (d_weights - jnp.sum(given * out, axis=-1, keepdims=True))
        d_values = product("bts,btd->bsd", weights, given)
        found, first = [], 0
        for (q, k, _), (*_, seen) in zip(parts32, parts, strict=True):
            last = first + k.shape[1]
            part = d_logits[..., first:last] * d**-0.5
            part = part if seen is None else jnp.where(seen, part, 0.0)
            found.append((product("bts,bsd->btd", part, k), product("bts,btd->bsd", part, q), d_values[:, first:last]))
            first = last
        return out, found

    out, found = jax.lax.map(one_head, jnp.arange(heads))
    gradients = []
    for (_, k, _, _), (dq, dk, dv) in zip(parts, found, strict=bool(found)):
        groups = (k.shape[2], heads // k.shape[2])
        dk, dv = (x.reshape(*groups, *x.shape[1:]).sum(axis=1) for x in (dk, dv))
        gradients.append(tuple(jnp.moveaxis(x, 0, 2) for x in (dq, dk, dv)))
    return jnp.moveaxis(out, 0, 2), gradients


def nine_b_ring(chunk: int = 3) -> Ring:
    """Self-attention of the 9B preset, window full."""
    return Ring(chunk * 390, 32, 32, 128, 30, 13 * 390, 390, (390,), (12 * 390,))


def base_ring(window: int) -> Ring:
    """Self-attention of base_1_3b."""
    return Ring(3 * 1560, 12, 12, 128, 30, (1 + window) * 1560, 1560, (1560,), (window * 1560,))


FLASH_VAE_RING = Ring(1560, 16, 4, 64, 12, 2 * 1560, 0, (0,), (2 * 1560,))
REFINEMENT = Frame(1, 1, 4 * 1560, 4 * 1560, 8, 8, 64)
AUDIO_9B = Frame(1, 3, 390, 32, 32, 32, 128)
TEXT_9B = Frame(1, 1, 3 * 390, 128, 32, 32, 128)
TEXT_1_3B = Frame(1, 1, 3 * 1560, 512, 12, 12, 128)


def training(heads: int, tokens: int) -> Chunked:
    """12 latent frames in chunks of 3, context and query copy, with a reference: causal adaptation at full size."""
    return Chunked((tuple(frame // 3 for frame in range(12)),), tokens, 12, 2, tokens, heads, heads, 128)
