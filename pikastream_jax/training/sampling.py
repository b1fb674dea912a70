"""Sampling from a teacher: Euler over any grid of timesteps, each condition guided on its own, states on the way kept.

Classifier-free guidance (Ho and Salimans 2022) with a scale for every condition: the velocity with all of them, plus (scale - 1) times what
each one changes in it.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pikastream_jax.config import StreamConfig
from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.dit.model import Conditions
from pikastream_jax.nn.layers import Functional, Params
from pikastream_jax.training.dit_data import DiTBatch, without_audio, without_reference, without_text


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How far a velocity goes beyond what each condition changes in it. A scale of 1 is no guidance and costs no forward pass."""

    text: float = 1.0
    audio: float = 1.0
    reference: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            scale = getattr(self, field.name)
            if not (math.isfinite(scale) and scale >= 0):
                raise ValueError(f"guidance: the scale {scale} of {field.name} must be finite and at least 0; 1 is no guidance")


def guided(
    velocity: Callable[[DiTBatch], Float[Array, "b f r c z"]], batch: DiTBatch, scales: Guidance
) -> Float[Array, "b f r c z"]:
    """told + sum over conditions of (scale - 1) (told - told without it).

    Args:
      velocity: the network's answer to the conditions in a batch; everything else about the question is its own.
    """
    told = velocity(batch)
    answer = told
    for scale, without in ((scales.text, without_text), (scales.audio, without_audio), (scales.reference, without_reference)):
        if scale != 1.0:
            answer = answer + (scale - 1.0) * (told - velocity(without(batch)))
    return answer


def sequence_velocity(
    model: Functional,
    params: Params,
    batch: DiTBatch,
    x: Float[Array, "b cf r c z"],
    t: Float[Array, "b cf"],
    distance: Float[Array, "b"],
    *,
    chunk_ids: Int[Array, "b f"],
    window: int,
    copies: int = 1,
) -> Float[Array, "b cf r c z"]:
    """The velocity of whole sequences under a batch's conditions; with two copies each has the same conditions.

    Args:
      distance, chunk_ids, window, copies: see `DiT.forward_sequence`.
    """
    denoiser = model.bind(params)
    text, valid = denoiser.text_conditions(batch.tokens, batch.valid, batch.frame_prompt)
    once = denoiser.conditions(text, valid, batch.mel, batch.motion, batch.keep_audio)

    def repeated(leaf, axis):
        return jnp.concatenate([leaf] * copies, axis=axis)

    conditions = Conditions(
        text=jax.tree.map(lambda leaf: repeated(leaf, 2), once.text),
        text_valid=repeated(once.text_valid, 1),
        audio=jax.tree.map(lambda leaf: repeated(leaf, 2), once.audio),
        motion=repeated(once.motion, 1),
    )
    reference = denoiser.dit.reference_keys_values(batch.reference)
    return denoiser.dit.forward_sequence(
        x, t, conditions, reference, chunk_ids=chunk_ids, window=window, reference_distance=distance, copies=copies
    )


def bidirectional_velocity(
    model: Functional,
    params: Params,
    batch: DiTBatch,
    x: Float[Array, "b f r c z"],
    t: Float[Array, "b f"],
    distance: Float[Array, "b"],
) -> Float[Array, "b f r c z"]:
    """The teacher's velocity: every latent frame sees every other.

    Args:
      distance: latent frames from the clip's last one to the reference's place.
    """
    together = jnp.zeros(t.shape, jnp.int32)
    return sequence_velocity(model, params, batch, x, t, distance, chunk_ids=together, window=t.shape[1])


def refined_timesteps(stream: StreamConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A fine solver's timesteps from 1 to 0 that hold the student's exactly, and where they stand.

    Every interval of the student's is cut into equal parts of unshifted time, as many as make at least `steps` in all.

    Returns:
      The timesteps [n + 1] and the indices [student's steps + 1] with timesteps[indices] = `solver_timesteps(stream.steps, stream.shift)`.

    >>> times, anchors = refined_timesteps(StreamConfig(steps=4, shift=2.0), 48)
    >>> len(times), anchors.tolist(), times[anchors].round(3).tolist()
    (49, [0, 12, 24, 36, 48], [1.0, 0.857, 0.667, 0.4, 0.0])
    """
    if steps < 1:
        raise ValueError(f"steps {steps} must be at least 1")
    parts = -(-steps // stream.steps)
    return solver_timesteps(parts * stream.steps, stream.shift), parts * np.arange(stream.steps + 1)


def euler(
    velocity: Callable[[Float[Array, "b *x"], Float[Array, ""]], Float[Array, "b *x"]],
    start: Float[Array, "b *x"],
    times: Float[np.ndarray, "n"],
    kept: tuple[int, ...] = (),
) -> tuple[Float[Array, "b *x"], Float[Array, "k b *x"]]:
    """Euler's method on dx/dt = velocity(x, t).

    Args:
      start: the state at times[0].
      times: falling timesteps; the network is evaluated at all but the last.
      kept: indices into `times` whose states are given back, rising.

    Returns:
      The state at times[-1], and the kept states.

    Raises:
      ValueError: an index that is outside `times`, or not above the one before it.
    """
    kept = tuple(int(index) for index in kept)
    if any(not 0 <= index < len(times) for index in kept) or any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
        raise ValueError(f"kept {kept} must be rising indices into the {len(times)} timesteps")
    # Where the state before each evaluation goes: to its place, or to one more that is given up at the end.
    slot = np.full(len(times), len(kept), np.int32)
    slot[list(kept)] = np.arange(len(kept))
    states = jnp.zeros((len(kept) + 1, *start.shape), start.dtype)

    def step(carry, now):
        x, states = carry
        t, t_next, slot = now
        return (x + (t_next - t) * velocity(x, t), states.at[slot].set(x)), None

    times = jnp.asarray(times, jnp.float32)
    (end, states), _ = jax.lax.scan(step, (start, states), (times[:-1], times[1:], jnp.asarray(slot[:-1])))
    return end, states.at[slot[-1]].set(end)[:-1]


def sample_teacher(
    model: Functional,
    params: Params,
    batch: DiTBatch,
    start: Float[Array, "b f r c z"],
    times: Float[np.ndarray, "n"],
    distance: Float[Array, "b"],
    guidance: Guidance = Guidance(),
    kept: tuple[int, ...] = (),
) -> tuple[Float[Array, "b f r c z"], Float[Array, "k b f r c z"]]:
    """Whole clips from noise by the bidirectional teacher.

    Args:
      batch: of it the conditions alone are looked at.
      start: noise at times[0] = 1, or a state at a lower timestep to go on from.
      times, kept: see `euler`.
      distance: see `bidirectional_velocity`.

    Returns:
      The latents at times[-1], and the states at the kept timesteps.
    """
    b, f = start.shape[:2]

    def velocity(x, t):
        return guided(lambda told: bidirectional_velocity(model, params, told, x, jnp.full((b, f), t), distance), batch, guidance)

    return euler(velocity, start, times, kept)
