"""Self-forcing with distribution matching: the student streams by itself, and what it makes is made to look like the teacher's.

Self-Forcing (Huang et al. 2025, https://arxiv.org/abs/2506.08009): roll-outs by the inference step itself (`roll_out`), longer than the
window, so that what leaves the cache is trained as it is run; the loss is distribution matching (`dmd`) over their last latent frames. In
half of the roll-outs prompt or reference is swapped on the way, and the teacher's conditions switch with it.

The critic is updated several times per generator update, here on one roll-out's latents with noise and timesteps of its own each time:
a roll-out costs as much as three updates of the critic, so fresh ones would nearly halve the number of generator updates that a budget allows.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from configs import preset
from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import interpolate
from pikastream_jax.dit import Denoiser
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.streaming.step import Models
from pikastream_jax.training import dit_causal
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clip_loss import students_loss, training_rows
from pikastream_jax.training.dit_data import DiTBatch, clip_constants, prepare_batch, text_kept, windows
from pikastream_jax.training.dmd import counted_mean, matching_gradient, matching_loss, score_timesteps
from pikastream_jax.training.held_out_streams import HeldOutStreams
from pikastream_jax.training.latent_reader import load_reader, reader_model, reading_error
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.processes import on_the_host
from pikastream_jax.training.roll_out import Script, check_evictions, in_sequence, roll_out, with_swaps
from pikastream_jax.training.sampling import Guidance, bidirectional_velocity, guided
from pikastream_jax.training.settings import Optimiser, RemindedSettings
from pikastream_jax.training.training_form import training_form, training_models
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT = 16  # clips that are rolled out to be measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RemindedSettings):
    """Settings of the stage; a row of a batch is a roll-out."""

    updates: int = 400
    batch: int = 8
    latent_frames: int = 12
    """Length of a roll-out."""
    judged: int = 6
    """Its last latent frames, which teacher and critic see."""
    shift: float = 3.0
    """Of the timesteps at which teacher and critic are compared."""
    guidance: Guidance = Guidance(text=3.0, audio=2.0, reference=2.0)
    """Of the teacher; the published recipe has one scale of 4 for everything."""
    critic_updates: int = 5
    """For each update of the student."""
    critic_optimiser: OptimiserConfig = OptimiserConfig(
        learning_rate=1e-4, warmup_steps=5, decay="linear", clip_norm=10.0, betas=(0.0, 0.999), muon=False
    )
    teacher: str | None = None
    """Preset whose DiT the teacher is; the student's own by default."""
    critic: str | None = None
    """Preset whose DiT the critic is; the teacher's by default, of which it then starts as a copy."""
    teacher_precision: Literal["float32", "bfloat16"] = "float32"
    optimiser: Optimiser = OptimiserConfig(
        learning_rate=5e-5, warmup_steps=5, decay="linear", clip_norm=10.0, betas=(0.0, 0.999), muon=False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.critic_updates < 1:
            raise ValueError(f"critic_updates {self.critic_updates} must be at least 1: a critic that stands still has no gradient to give")
        if not self.shift > 0:
            raise ValueError(f"shift {self.shift} must be above 0")


def score_model(config: Config, name: str | None) -> Functional:
    """The denoiser of the preset `name`, to judge what a student of `config` makes.

    Raises:
      ValueError: it takes other latents or conditions than the student's.
    """
    other = config if name is None else preset(name)
    for what, of in {
        "flash_vae": lambda c: c.flash_vae,
        "prompt (length, vocabulary)": lambda c: (c.text.length, c.text.vocabulary),
        "mel (rate, hop, bands, frames)": lambda c: (c.audio.sample_rate, c.audio.hop, c.audio.mels, c.audio.mel_frames),
        "dit.motion": lambda c: c.dit.motion,
    }.items():
        if of(other) != of(config):
            raise ValueError(f"preset {name} cannot judge preset {config.name}: its {what} is {of(other)}, the student's {of(config)}")
    return functional(lambda rngs: Denoiser(other, rngs=rngs))


def expected_clean(
    model: Functional, params: Params, batch: DiTBatch, x: Float[Array, "b f r c z"], t: Float[Array, "b"], scales: Guidance, distance: float
) -> Float[Array, "b f r c z"]:
    """The clean clip that a bidirectional network expects behind x at timestep t: x - t velocity."""
    b, f = x.shape[:2]
    times = jnp.broadcast_to(t[:, None], (b, f))
    velocity = guided(lambda told: bidirectional_velocity(model, params, told, x, times, jnp.full(b, distance)), batch, scales)
    return x - t[:, None, None, None, None] * velocity


def critic_loss(
    model: Functional,
    params: Params,
    batch: DiTBatch,
    clean: Float[Array, "b f r c z"],
    counts: Bool[Array, "b f"],
    key: Array,
    shift: float,
    distance: float,
) -> Float[Array, ""]:
    """Flow matching on what the student made: mean (velocity - (noise - clean))^2 over frames that count."""
    k_t, k_noise = jax.random.split(key)
    b, f = clean.shape[:2]
    t = jnp.broadcast_to(score_timesteps(k_t, b, shift)[:, None], (b, f))
    noise = jax.random.normal(k_noise, clean.shape)
    velocity = bidirectional_velocity(model, params, batch, interpolate(clean, noise, t), t, jnp.full(b, distance))
    return counted_mean((velocity - (noise - clean)) ** 2, counts)


def distance_of_statistics(generated: Float[Array, "b f r c z"], truth: Float[Array, "b f r c z"]) -> Float[Array, ""]:
    """Squared differences of mean and standard deviation, mean over the channels: 0 where colours, contrast and detail are those of true clips."""
    axes = (0, 1, 2, 3)
    means, deviations = (jnp.stack([f(x, axis=axes) for x in (generated, truth)]) for f in (jnp.mean, jnp.std))
    return jnp.mean((means[0] - means[1]) ** 2 + (deviations[0] - deviations[1]) ** 2)


def health(latents: Float[Array, "b f r c z"]) -> Metrics:
    """What shows collapse and flicker early: size of the latents, their spread over time, and their change from frame to frame."""
    return {
        "size": jnp.mean(jnp.abs(latents)),
        "spread": jnp.mean(jnp.std(latents, axis=1)),
        "change": jnp.mean(jnp.abs(latents[:, 1:] - latents[:, :-1])),
    }


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `flash_vae` (for pictures), `reader`, `denoiser`, the student of `dit_causal`, and `teacher`; and may name
    a `critic` to start from, which one of another size than the teacher's needs.

    Raises:
      ValueError: lengths that are no roll-out, or networks that do not fit one another.
    """
    check_evictions(config, settings.latent_frames, settings.judged)
    models = training_models(Models.of(config), settings.form)
    teacher = training_form(score_model(config, settings.teacher), settings.form)
    critic = training_form(score_model(config, settings.critic or settings.teacher), settings.form)
    if critic.abstract != teacher.abstract and "critic" not in init:
        raise ValueError(f"a critic of preset {settings.critic} cannot start as a copy of the teacher: give --init critic=PATH")
    optimiser = make_optimiser(models.denoiser.abstract, settings.optimiser, settings.updates)
    critic_optimiser = make_optimiser(critic.abstract, settings.critic_optimiser, settings.updates * settings.critic_updates)
    distance = float(config.stream.reference_distance)
    reader = reader_model(config)

    def initial_state() -> TrainState:
        state = TrainState.start(restore_into(models.denoiser.abstract, load_weights(init["denoiser"], "denoiser")), optimiser)
        params = restore_into(critic.abstract, load_weights(init.get("critic", init["teacher"]), "denoiser"))
        return dataclasses.replace(state, extra={"critic": params, "optimiser": critic_optimiser.init(params)})

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, Metrics]:
        k_rows, k_swap, k_noise, k_exit, k_t, k_score, k_critic, k_clips = jax.random.split(key, 8)
        rows = split_batch(prepare_batch(config, data, batch, k_rows, drop=0.0))
        script = Script.of(rows, config.stream.chunk)
        script = with_swaps(script, rows.other_reference, k_swap, script.prompt.shape[1] - 1)
        told, counts = script.last(settings.judged, rows)
        noise = jax.random.normal(k_noise, rows.latents.shape)
        exit_step = jax.random.randint(k_exit, (settings.batch,), 0, config.stream.steps)
        clips, k_loss = training_rows(config, data, batch, k_clips)

        def student(params: Params):
            _, shown, clean = roll_out(models, text_kept(params), script, noise, exit_step, settings.judged)
            generated = in_sequence(clean)
            seen = jax.lax.stop_gradient(generated)
            t = score_timesteps(k_t, settings.batch, settings.shift)
            x = interpolate(seen, jax.random.normal(k_score, seen.shape), jnp.broadcast_to(t[:, None], seen.shape[:2]))
            real = expected_clean(teacher, data["teacher"], told, x, t, settings.guidance, distance)
            fake = expected_clean(critic, state.extra["critic"], told, x, t, Guidance(), distance)
            gradient = matching_gradient(seen, fake, real, counts)
            size = jnp.sqrt(counted_mean(gradient**2, counts))
            matched = matching_loss(generated, gradient, counts)
            total, parts = matched, {"loss": matched, "matching": size} | health(shown)
            if settings.data:
                kept, misread = students_loss(config, models.denoiser, params, data, clips, k_loss)
                total, parts = total + settings.data * kept, parts | misread
            return total, (seen, parts)

        # The loss that is reported is the distribution's alone: the held-out one, of what streams show, has no part on clips either.
        gradient, (seen, metrics) = jax.grad(student, has_aux=True)(state.params)

        def critic_update(carry, key):
            params, optimiser_state = carry
            value, gradient = jax.value_and_grad(
                lambda params: critic_loss(critic, text_kept(params), told, seen, counts, key, settings.shift, distance)
            )(params)
            changes, optimiser_state = critic_optimiser.update(gradient, optimiser_state, params)
            return (jax.tree.map(jnp.add, params, changes), optimiser_state), value

        carry = (state.extra["critic"], state.extra["optimiser"])
        carry, critic_losses = jax.lax.scan(critic_update, carry, jax.random.split(k_critic, settings.critic_updates))
        state = state.descend(gradient, optimiser, settings.ema)
        state = dataclasses.replace(state, extra=dict(zip(("critic", "optimiser"), carry, strict=True)))
        return state, {"critic": jnp.mean(critic_losses)} | metrics

    def data() -> dict:
        with on_the_host():  # the whole of it may be more than a device holds
            weights = restore_into(teacher.abstract, load_weights(init["teacher"], "denoiser"))
            weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, settings.teacher_precision), weights)
        return clip_constants(init["clips"]) | {"teacher": weights, "reader": load_reader(config, init["reader"])}

    held_out = HeldOutStreams(config, init["clips"], settings.latent_frames, HELD_OUT)

    def read(params: Params, data: dict, batch) -> tuple[Metrics, Array, Array]:
        rows, latents = held_out.roll_out(params, data, batch)
        said, true = (reader.bind(data["reader"])(x, rows.boxes, rows.truth) for x in (latents, rows.latents))
        parts = reading_error(said, true.readings, rows.opening) | {"statistics": distance_of_statistics(latents, rows.latents)}
        asked = parts | {"closures": dit_causal.Settings().closures * parts["closures"]}  # as much as in the loss on clips
        return {"loss": sum(asked.values())} | parts | health(latents), rows.latents, latents

    read = jax.jit(read)

    def sample(state: TrainState, data: dict, path: Path) -> None:
        _, truth, generated = read(state.ema, data, held_out.windows())
        save_preview(config, init, path, np.asarray(truth[:4]), np.asarray(generated[:4]))

    return Stage(
        name="dit_self_forcing",
        total_steps=settings.updates,
        seed=seed,
        init=initial_state,
        update=update,
        data=data,
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config=dit_causal.record(config, settings),
        evaluate=lambda state, data: read(state.ema, data, held_out.windows())[0],
        evaluate_every=settings.every(50),
        sample=sample,
        sample_every=200,
    )
