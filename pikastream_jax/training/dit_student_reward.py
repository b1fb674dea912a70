"""The student is rewarded along its own stream (ReFL), chunk by chunk.

Roll-outs as in self-forcing (`roll_out`): the exit step of every judged chunk carries the gradient. Its clean latents are decoded with the
rolling cache that the stream has at that place, rewards see the pixels of all judged chunks as one clip, and the gradient goes back into each
chunk's exit step and no further. The anchor is the student that the stage starts from: the squared distance of velocities at the exit steps,
both asked under the same cache. Beside both stands the loss of `dit_causal --objective data` on the same clips (`clip_loss`).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pikastream_jax.config import Config
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.flash_vae.latents import LatentStatistics
from pikastream_jax.nn.layers import Params
from pikastream_jax.streaming.step import Models
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clip_loss import students_loss, training_rows
from pikastream_jax.training.dit_causal import record
from pikastream_jax.training.dit_data import clip_constants, prepare_batch, text_kept, windows
from pikastream_jax.training.held_out_streams import HeldOutStreams
from pikastream_jax.training.latent_reader import load_reader
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.processes import on_the_host
from pikastream_jax.training.refl import (
    RewardedSettings,
    as_shown,
    decode_frames,
    decode_from,
    load_rewards,
    reference_picture,
    reward_loss,
    score_metrics,
)
from pikastream_jax.training.roll_out import Script, ask, check_evictions, learn, roll_out, with_swaps
from pikastream_jax.training.settings import Optimiser
from pikastream_jax.training.training_form import training_models
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT = 12  # clips that are rolled out to be measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardedSettings):
    """Settings of the stage; a row of a batch is a roll-out."""

    updates: int = 150
    batch: int = 4
    latent_frames: int = 12
    """Length of a roll-out."""
    judged: int = 6
    """Its last latent frames, which rewards see."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=5e-5, warmup_steps=10, decay="linear", muon=False)


def decode_along(
    vae: FlashVAE, statistics: LatentStatistics, latents: Float[Array, "b f r c z"], clean: Float[Array, "n b k r c z"]
) -> Float[Array, "b t h w 3"]:
    """Pixels of the clean latents of the last n chunks, each decoded with the cache that the stream has before it.

    Args:
      latents: what the stream shows, all of it: it fills the caches, without gradient.
      clean: of the last n chunks of k latent frames, with gradient.
    """
    n, b, k = clean.shape[:3]
    shown = jax.lax.stop_gradient(latents)
    before, rest = shown[:, : -n * k], shown[:, -n * k :].reshape(b, n, k, *latents.shape[2:]).swapaxes(0, 1)
    cache = vae.init_decode_cache(b, *latents.shape[2:4])
    if before.shape[1]:
        cache, _ = decode_frames(vae, statistics, cache, before)

    def chunk(cache, now):
        shown, clean = now
        _, pixels = decode_frames(vae, statistics, cache, clean)
        return decode_frames(vae, statistics, cache, shown)[0], pixels

    _, pixels = jax.lax.scan(chunk, jax.lax.stop_gradient(cache), (rest, clean))
    pixels = pixels.swapaxes(0, 1)
    return pixels.reshape(b, -1, *pixels.shape[3:])


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `flash_vae`, `reader`, `denoiser`, the student to start from and to stay near, and the four rewards.

    Raises:
      ValueError: lengths that are no roll-out, or that leave no chunk before the judged ones.
    """
    check_evictions(config, settings.latent_frames, settings.judged)
    if settings.judged == settings.latent_frames:
        raise ValueError(f"judged {settings.judged} latent frames of as many: leave a chunk before them, in which a face may be another")
    models = training_models(Models.of(config), settings.form)
    optimiser = make_optimiser(models.denoiser.abstract, settings.optimiser, settings.updates)
    rewards, reward_params = load_rewards(config, init)
    unjudged = (settings.latent_frames - settings.judged) // config.stream.chunk

    def start() -> Params:
        return restore_into(models.denoiser.abstract, load_weights(init["denoiser"], "denoiser"))

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, Metrics]:
        k_rows, k_swap, k_noise, k_exit, k_clips = jax.random.split(key, 5)
        rows = split_batch(prepare_batch(config, data, batch, k_rows, train=False))
        # No later than the first judged chunk: rewards compare the whole of what they see with one picture.
        script = with_swaps(Script.of(rows, config.stream.chunk), rows.other_reference, k_swap, unjudged)
        told, _ = script.last(settings.judged, rows)
        noise = jax.random.normal(k_noise, rows.latents.shape)
        exit_step = jax.random.randint(k_exit, (settings.batch,), 0, config.stream.steps)
        vae, statistics = models.flash_vae.bind(data["flash_vae"]), data["statistics"]
        known = learn(models.denoiser.bind(data["anchor"]), script)
        reference = reference_picture(vae, statistics, told.reference)
        clips, k_loss = training_rows(config, data, batch, k_clips)

        def loss(params: Params):
            def keep(exit, velocity):
                wanted = ask(models, data["anchor"], known, script, jax.lax.stop_gradient(exit))
                return exit.clean(velocity), jnp.mean((velocity - wanted) ** 2)

            _, latents, (clean, away) = roll_out(models, text_kept(params), script, noise, exit_step, settings.judged, keep)
            shown = as_shown(decode_along(vae, statistics, latents, clean), reference, told.mel)
            value, scores = reward_loss(rewards, data["rewards"], shown, settings.weights, settings.clip)
            away = jnp.mean(away)
            value, parts = value + settings.anchor * away, scores | {"distance": away}
            if settings.data:
                kept, misread = students_loss(config, models.denoiser, params, data, clips, k_loss)
                value, parts = value + settings.data * kept, parts | misread
            return value, parts

        gradient, parts = jax.grad(loss, has_aux=True)(state.params)
        # The surrogate's value means nothing; what the stage lowers is the distance, the loss on clips and minus the scores' worth.
        value = settings.anchor * parts["distance"] + settings.data * parts.get("data", 0.0) - parts["worth"]
        return state.descend(gradient, optimiser, settings.ema), {"loss": value} | parts

    def data() -> dict:
        flash_vae = restore_into(models.flash_vae.abstract, load_weights(init["flash_vae"], "flash_vae"))
        constants = clip_constants(init["clips"]) | {"reader": load_reader(config, init["reader"])}
        with on_the_host():  # the whole of it may be more than a device holds
            anchor = start()
        return constants | {"flash_vae": flash_vae, "rewards": reward_params, "anchor": anchor}

    streams = HeldOutStreams(config, init["clips"], settings.latent_frames, HELD_OUT)

    @jax.jit
    def held_out(params, data, batch):
        rows, latents = streams.roll_out(params, data, batch)
        vae, statistics = models.flash_vae.bind(data["flash_vae"]), data["statistics"]
        pixels = decode_from(vae, statistics, latents[:, : -settings.judged], latents[:, -settings.judged :])
        shown = as_shown(pixels, reference_picture(vae, statistics, rows.reference), rows.mel[:, -settings.judged :])
        scores = score_metrics(rewards.scores(data["rewards"], shown), settings.weights)
        # Measured with weight 0 too: it tells what rewards alone take.
        kept, misread = students_loss(config, models.denoiser, params, data, rows, jax.random.key(2), train=False)
        return {"loss": settings.data * kept - scores["worth"]} | scores | misread, rows.latents, latents

    def sample(state: TrainState, data: dict, path: Path) -> None:
        _, truth, generated = held_out(state.ema, data, streams.windows())
        save_preview(config, init, path, np.asarray(truth[:4]), np.asarray(generated[:4]))

    return Stage(
        name="dit_student_reward",
        total_steps=settings.updates,
        seed=seed,
        init=lambda: TrainState.start(start(), optimiser),
        update=update,
        data=data,
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config=record(config, settings),
        evaluate=lambda state, data: held_out(state.ema, data, streams.windows())[0],
        evaluate_every=settings.every(25),
        sample=sample,
        sample_every=100,
    )
