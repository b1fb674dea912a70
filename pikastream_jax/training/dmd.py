"""Distribution matching distillation (Yin et al. 2024, https://arxiv.org/abs/2405.14867), as Self-Forcing uses it on videos.

Two networks judge what a student made, noised to a random timestep: the real score, a frozen teacher that knows true clips, and the fake
score, a critic that follows what the student makes now. Both say which clean clip they would have expected; the difference is the gradient
of the Kullback-Leibler divergence between what the student makes and true clips, noised alike.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pikastream_jax.diffusion.flow import shift_timestep

TIMESTEPS = (0.02, 0.98)  # outside of them one of the two has nothing to say


def score_timesteps(key: Array, batch: int, shift: float) -> Float[Array, "b"]:
    """Uniform, then shifted towards noise, then clamped to `TIMESTEPS`: where student, teacher and critic are compared."""
    return jnp.clip(shift_timestep(jax.random.uniform(key, (batch,)), shift), *TIMESTEPS)


def matching_gradient(
    generated: Float[Array, "b f r c z"], fake: Float[Array, "b f r c z"], real: Float[Array, "b f r c z"], counts: Bool[Array, "b f"]
) -> Float[Array, "b f r c z"]:
    """(fake - real) / mean |generated - real|, the mean over each row's frames that count; 0 for a row where that mean is 0 or no frame counts.

    What is not finite in `fake` or `real` stays so: a network that fell ill is to stop the run, not to teach nothing.

    Args:
      generated: what the student made, clean.
      fake, real: the clean clips that critic and teacher expect.
    """
    counted = jnp.broadcast_to(counts[:, :, None, None, None], generated.shape)
    total = jnp.sum(jnp.abs(generated - real), axis=(1, 2, 3, 4), keepdims=True, where=counted)
    scale = total / jnp.maximum(1, jnp.sum(counted, axis=(1, 2, 3, 4), keepdims=True))
    return jnp.where(scale == 0, 0.0, (fake - real) / jnp.where(scale == 0, 1.0, scale))


def matching_loss(generated: Float[Array, "b f r c z"], gradient: Float[Array, "b f r c z"], counts: Bool[Array, "b f"]) -> Float[Array, ""]:
    """0.5 mean (x - stop_gradient(x - gradient))^2 over frames that count: its derivative by x is the gradient over their number."""
    target = jax.lax.stop_gradient(generated - gradient)
    return 0.5 * counted_mean((generated - target) ** 2, counts)


def counted_mean(values: Float[Array, "b f r c z"], counts: Bool[Array, "b f"]) -> Float[Array, ""]:
    """Mean over the latent frames that count."""
    return jnp.mean(values, where=jnp.broadcast_to(counts[:, :, None, None, None], values.shape))
