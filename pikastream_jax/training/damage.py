"""Damage of known strength to a clip's pictures: what autoencoders and few-step generators do to them, one kind at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Video = Float[Array, "t h w 3"]


def _blur(key: Array, strength: Array, video: Video) -> Video:
    """Up to a binomial filter of 9 pixels each way."""
    weights = jnp.asarray([1.0, 8.0, 28.0, 56.0, 70.0, 56.0, 28.0, 8.0, 1.0]) / 256
    soft = video
    for axis in (1, 2):
        pad = [(4, 4) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(soft, pad, mode="edge")
        soft = sum(w * jax.lax.slice_in_dim(padded, i, i + video.shape[axis], axis=axis) for i, w in enumerate(weights))
    return video + strength * (soft - video)


def _blocks(key: Array, strength: Array, video: Video) -> Video:
    """An offset per patch of 8x8 or per token of 16x16, another one in every frame or the same in all."""
    t, h, w, c = video.shape
    k_offset, k_side, k_still = jax.random.split(key, 3)

    def offset(side):
        each = jax.random.normal(k_offset, (t, -(-h // side), -(-w // side), c))
        return each.repeat(side, axis=1).repeat(side, axis=2)[:, :h, :w]

    moving = jnp.where(jax.random.bernoulli(k_side), offset(8), offset(16))
    return video + 0.15 * strength * jnp.where(jax.random.bernoulli(k_still), moving[:1], moving)


def _tint(key: Array, strength: Array, video: Video) -> Video:
    """Another color of everything, the same in all frames."""
    direction = jax.random.normal(key, (3,))
    return video + 0.3 * strength * direction / jnp.linalg.norm(direction)


def _noise(key: Array, strength: Array, video: Video) -> Video:
    return video + 0.25 * strength * jax.random.normal(key, video.shape)


def _ghost(key: Array, strength: Array, video: Video) -> Video:
    """The frame before, a few pixels away, shines through."""
    before = jnp.concatenate([video[:1], video[:-1]])
    k_y, k_x = jax.random.split(key)
    y = jax.random.randint(k_y, (), 2, 5) * jnp.where(jax.random.bernoulli(k_x), 1, -1)
    x = jax.random.randint(k_x, (), -4, 5)
    return video + 0.5 * strength * (jnp.roll(before, (y, x), axis=(1, 2)) - video)


def _warp(key: Array, strength: Array, video: Video) -> Video:
    """Edges waver: rows and columns swing by up to 3 pixels, differently in every frame."""
    t, h, w, _ = video.shape
    k_phase, k_wave = jax.random.split(key)
    phase = jax.random.uniform(k_phase, (t, 2), maxval=2 * np.pi)
    wave = 2 * np.pi / jax.random.uniform(k_wave, (2,), minval=8.0, maxval=24.0)
    y, x = jnp.arange(h, dtype=jnp.float32), jnp.arange(w, dtype=jnp.float32)

    def one(picture, phase):
        at_y = y[:, None] + 3 * strength * jnp.sin(wave[0] * x + phase[0])[None, :]
        at_x = x[None, :] + 3 * strength * jnp.sin(wave[1] * y + phase[1])[:, None]
        sample = lambda plane: jax.scipy.ndimage.map_coordinates(plane, [at_y, at_x], order=1, mode="nearest")  # noqa: E731
        return jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)

    return jax.vmap(one)(video, phase)


def _grid(key: Array, strength: Array, video: Video) -> Video:
    """One pattern in every patch or token, with a period of 4, 8 or 16 pixels, as badly trained upsampling leaves it, and a DiT that climbs a reward."""
    k_period, k_shares, k_phase, k_color = jax.random.split(key, 4)
    period = jax.random.choice(k_period, jnp.array([4.0, 8.0, 16.0]))
    # Standing waves of up to two periods each way; a mean square of 1/4 whatever was drawn.
    phase = jax.random.uniform(k_phase, (2, 3, 1), maxval=2 * np.pi)
    rows, columns = (
        jnp.cos(2 * np.pi * jnp.arange(3)[:, None] * jnp.arange(side) / period + at)
        for side, at in zip(video.shape[1:3], phase, strict=True)
    )
    pattern = rows.T @ jax.random.normal(k_shares, (3, 3)) @ columns
    pattern = pattern - pattern.mean()
    pattern = 0.5 * pattern / jnp.sqrt(jnp.mean(pattern**2))
    color = 1 + 0.3 * jax.random.normal(k_color, (3,))
    return video + 0.2 * strength * pattern[..., None] * color


def _flicker(key: Array, strength: Array, video: Video) -> Video:
    """Brightness and color jump from frame to frame."""
    k_light, k_color = jax.random.split(key)
    light = jax.random.normal(k_light, (len(video), 1, 1, 1)) + 0.3 * jax.random.normal(k_color, (len(video), 1, 1, 3))
    return video + 0.2 * strength * light


DAMAGES: dict[str, Callable[[Array, Array, Video], Video]] = {
    "blur": _blur, "blocks": _blocks, "tint": _tint, "noise": _noise, "ghost": _ghost, "warp": _warp, "grid": _grid, "flicker": _flicker,
}  # fmt: skip


def damage(key: Array, kind: Int[Array, ""] | int, strength: Float[Array, ""] | float, video: Video) -> Video:
    """A clip with one kind of damage.

    Args:
      key: of what is random in it; the same key gives the same damage at every strength.
      kind: number in the order of `DAMAGES`; may be traced. Under `vmap` all kinds are computed: use `lax.map` over clips.
      strength: 0 leaves the clip as it is, 1 is what nobody would show.

    Returns:
      The clip, in [-1, 1].
    """
    strength = jnp.asarray(strength, jnp.float32)
    return jnp.clip(jax.lax.switch(kind, tuple(DAMAGES.values()), key, strength, video), -1.0, 1.0)
