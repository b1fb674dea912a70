"""Roll-outs for training: the student streams, chunk by chunk, with the inference step itself.

Self-Forcing (Huang et al. 2025, https://arxiv.org/abs/2506.08009) trains a student on what it does by itself instead of on given
context. `streaming.step.denoise_trajectory` makes every chunk without gradient, and the cache takes the keys and values of the last
denoising step, as in a stream. One step, the exit step, is drawn for each roll-out and shared by its chunks: there the network is
asked once more, with gradient, for the clean latents. Nothing else carries gradient, so memory does not grow with steps or chunks seen.

Alternatives considered: to let the gradient enter the exit step inside the solver's loop saves one forward pass in seven, but needs a
branch per step and a second solver; to stop at the exit step, as Self-Forcing does, and then cache a clean re-pass is not what a
stream without `clean_pass` does.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import passes
from pikastream_jax.dit import Denoiser
from pikastream_jax.dit.model import Conditions, KeysValues
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.state import StreamState, init_state, install_prompt, install_reference
from pikastream_jax.streaming.step import Models, chunk_velocity, denoise_trajectory
from pikastream_jax.training.dit_data import DiTBatch

SWAPPED = 0.5  # share of training roll-outs in whose middle the prompt or the reference is swapped


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Script:
    """All that streams of f latent frames, c chunks, hear and are told; prompt and reference change between chunks."""

    mel: Float[Array, "b f m k"]
    motion: Float[Array, "b f n"]
    tokens: Int[Array, "b s l"]
    valid: Int[Array, "b s"]
    prompt: Int[Array, "b c"]  # which of the s prompts every chunk follows
    reference: Float[Array, "b p r c z"]  # normalised latents
    face: Int[Array, "b c"]  # which of the p references every chunk shows

    @classmethod
    def of(cls, batch: DiTBatch, chunk: int) -> "Script":
        """A batch as streams of chunks of `chunk` latent frames. What it leaves out for guidance stays out, but every stream hears.

        A prompt that changes within a chunk is taken up by the next one, as in a stream.
        """
        prompt = batch.frame_prompt[:, ::chunk]
        return cls(batch.mel, batch.motion, batch.tokens, batch.valid, prompt, batch.reference[:, None], jnp.zeros_like(prompt))

    def last(self, frames: int, batch: DiTBatch) -> tuple[DiTBatch, Bool[Array, "b k"]]:
        """The conditions of the last latent frames, with the face that the stream shows at its end; and which frames show that one.

        Args:
          batch: what the script was made of.
        """
        size = self.mel.shape[1] // self.prompt.shape[1]
        prompt, face = (jnp.repeat(leaf, size, axis=1)[:, -frames:] for leaf in (self.prompt, self.face))
        stretch = {
            field: getattr(batch, field)[:, -frames:]
            for field in ("latents", "mel", "weight", "boxes", "truth", "opening", "motion")
        }
        shown = jnp.take_along_axis(self.reference, face[:, -1, None, None, None, None], axis=1)[:, 0]
        told = dict(reference=shown, tokens=self.tokens, valid=self.valid, frame_prompt=prompt, keep_audio=jnp.ones_like(batch.keep_audio))
        return dataclasses.replace(batch, **stretch, **told), face == face[:, -1:]


def with_swaps(script: Script, reference: Float[Array, "b r c z"], key: Array, last: int) -> Script:
    """The same with a swap in mid-stream in about half of the rows: of the reference, or of the prompt for the one that the row before begins with.

    Args:
      reference: whom each row may be swapped for.
      last: swaps happen at chunks 1 to `last`.

    Raises:
      ValueError: there is no other row to take a prompt from, or no chunk to swap at.
    """
    rows, chunks = script.prompt.shape
    if rows < 2:
        raise ValueError(f"batch {rows} is too small for swaps: the new prompt is another row's, use 2 or more")
    if not 1 <= last < chunks:
        raise ValueError(f"a swap at chunk 1 to {last} of {chunks}: the first chunk has nothing to swap, roll out more latent frames")
    k_swap, k_which, k_when = jax.random.split(key, 3)
    swapped = jax.random.uniform(k_swap, (rows, 1)) < SWAPPED
    of_prompt = jax.random.bernoulli(k_which, shape=(rows, 1))
    after = jnp.arange(chunks) >= jax.random.randint(k_when, (rows, 1), 1, last + 1)

    def with_the_others(leaf):
        return jnp.concatenate([leaf, jnp.roll(leaf[:, :1], 1, axis=0)], axis=1)

    return dataclasses.replace(
        script,
        tokens=with_the_others(script.tokens),
        valid=with_the_others(script.valid),
        prompt=jnp.where(swapped & of_prompt & after, script.valid.shape[1], script.prompt),
        reference=jnp.concatenate([script.reference, reference[:, None]], axis=1),
        face=jnp.where(swapped & ~of_prompt & after, script.reference.shape[1], script.face),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """Keys and values of all prompts and references of a script; computed once per roll-out."""

    text: KeysValues  # [layers, b, s, length, h, e]
    valid: Int[Array, "b s"]
    reference: KeysValues  # [layers, b, p, n, h, e]


def learn(denoiser: Denoiser, script: Script) -> Known:
    """Encodes what a script names."""
    text, valid = denoiser.text_conditions(script.tokens, script.valid)
    b, p, *grid = script.reference.shape
    reference = denoiser.dit.reference_keys_values(script.reference.reshape(b * p, *grid))
    return Known(text, valid, jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], b, p, *leaf.shape[2:]), reference))


def tell(
    config: Config, denoiser: Denoiser, known: Known, state: StreamState, script: Script, chunk: Int[Array, ""]
) -> tuple[StreamState, Conditions]:
    """What happens before a chunk is made: its prompt and reference are installed, its sound is encoded.

    To install again what is there changes nothing, so there is one program for all chunks; only a row whose reference changes now
    loses its sink.
    """
    size = config.stream.chunk
    mel, motion = (jax.lax.dynamic_slice_in_dim(leaf, chunk * size, size, axis=1) for leaf in (script.mel, script.motion))
    rows = jnp.arange(script.prompt.shape[0])
    prompt, face, before = script.prompt[:, chunk], script.face[:, chunk], script.face[:, jnp.maximum(chunk - 1, 0)]
    text = jax.tree.map(lambda new, old: new[:, rows, prompt][:, :, None].astype(old.dtype), known.text, state.text)
    told = install_prompt(state, text, known.valid[rows, prompt][:, None])
    told = install_reference(told, jax.tree.map(lambda leaf: leaf[:, rows, face], known.reference))
    told = dataclasses.replace(told, sink_count=jnp.where(face == before, state.sink_count, told.sink_count))
    return told, denoiser.conditions(told.text, told.text_valid, mel, motion)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exit:
    """The exit step of one chunk: what the network is asked there."""

    noisy: Float[Array, "b f r c z"]
    t: Float[Array, "b f"]
    chunk: Int[Array, ""]
    state: StreamState  # before the chunk

    def clean(self, velocity: Float[Array, "b f r c z"]) -> Float[Array, "b f r c z"]:
        """The clean latents that a velocity points to."""
        return self.noisy - self.t[:, :, None, None, None] * velocity


def ask(models: Models, params: Params, known: Known, script: Script, exit: Exit) -> Float[Array, "b f r c z"]:
    """The velocity of any denoiser at an exit step. `known` is its own view of the script; the cache is that of the roll-out."""
    state, conditions = tell(models.config, models.denoiser.bind(params), known, exit.state, script, exit.chunk)
    return chunk_velocity(models, params, state, conditions)(exit.noisy, exit.t)[0]


def roll_out(
    models: Models,
    params: Params,
    script: Script,
    noise: Float[Array, "b f r c z"],
    exit_step: Int[Array, "b"] | None = None,
    judged: int = 0,
    judge: Callable[[Exit, Float[Array, "b f r c z"]], PyTree] = Exit.clean,
) -> tuple[StreamState, Float[Array, "b f r c z"], PyTree]:
    """Streams of a whole script from noise, in scans over chunks.

    Args:
      params: the denoiser's; gradient reaches them through the exit steps alone.
      noise: of all latent frames at t = 1; whole chunks, as many latent frames as the script tells of.
      exit_step: of each row, from 0; needed where anything is judged.
      judged: the last so many latent frames, whole chunks, have exit steps.
      judge: (exit, velocity there) -> what is kept of a judged chunk.

    Returns:
      The state at the end, the latents as the stream shows them (no gradient), and what `judge` kept, stacked over the judged chunks.

    Raises:
      ValueError: frames that are not whole chunks or not those of the script, or a rolling schedule, whose chunks have no exit step.
    """
    config = models.config
    size, frames = config.stream.chunk, noise.shape[1]
    check_lengths(config, frames, judged)
    if frames != script.mel.shape[1]:
        raise ValueError(f"the script tells of {script.mel.shape[1]} latent frames, the noise has {frames}: they must agree")
    batch, chunks, unjudged = noise.shape[0], frames // size, (frames - judged) // size
    noises = noise.reshape(batch, chunks, size, *noise.shape[2:]).swapaxes(0, 1)
    known = learn(models.denoiser.bind(params), script)
    frozen, frozen_known = jax.lax.stop_gradient((params, known))

    def stream(state, now):
        chunk, noise = now
        told, conditions = tell(config, models.denoiser.bind(frozen), frozen_known, state, script, chunk)
        return denoise_trajectory(models, frozen, told, conditions, noise)

    def judged_chunk(state, now):
        after, latents, trajectory = stream(state, now)
        t = jnp.asarray(passes(config.stream)[0])[exit_step]
        exit = Exit(trajectory[exit_step, jnp.arange(batch)], t, now[0], state)
        return after, (latents, judge(exit, ask(models, params, known, script, exit)))

    order, parts, kept = jnp.arange(chunks), [], None
    state = init_state(config, batch)
    if unjudged:
        state, latents = jax.lax.scan(lambda state, now: stream(state, now)[:2], state, (order[:unjudged], noises[:unjudged]))
        parts.append(latents)
    if judged:
        state, (latents, kept) = jax.lax.scan(judged_chunk, state, (order[unjudged:], noises[unjudged:]))
        parts.append(latents)
    return state, in_sequence(jnp.concatenate(parts)), kept


def check_lengths(config: Config, frames: int, judged: int) -> None:
    """Raises ValueError unless `frames` latent frames, of which the last are judged, can be rolled out."""
    size = config.stream.chunk
    if config.stream.rolling:
        raise ValueError("stream.schedule 'rolling' has no exit step that is a chunk's own: roll out with 'sequential'")
    if frames % size or judged % size or not 0 <= judged <= frames:
        raise ValueError(f"a roll-out of {frames} latent frames, {judged} of them judged, is not made of whole chunks of {size}: use multiples")


def in_sequence(chunks: Float[Array, "n b f *x"]) -> Float[Array, "b nf *x"]:
    """Chunks one behind the other in time."""
    n, b, f = chunks.shape[:3]
    return chunks.swapaxes(0, 1).reshape(b, n * f, *chunks.shape[3:])


def check_evictions(config: Config, frames: int, judged: int) -> None:
    """Raises ValueError unless a roll-out is one (`check_lengths`) and the cache lets go of something before its last chunk."""
    check_lengths(config, frames, judged)
    stream = config.stream
    needed = stream.sink + stream.window + 2 * stream.chunk
    if judged < stream.chunk or frames < needed:
        raise ValueError(
            f"a roll-out of {frames} latent frames, {judged} of them judged, with a window of {stream.window} and a sink of {stream.sink}: "
            f"use {needed} or more, so that eviction is trained, and judge {stream.chunk} or more"
        )
