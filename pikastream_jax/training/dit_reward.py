"""The teacher is rewarded (ReFL): it samples with gradients off to a random point, then a few steps with gradients, and rewards see the pixels.

ReFL (Xu et al. 2023, https://arxiv.org/abs/2304.05977), with several differentiable steps at the end as in DRaFT-K (Clark et al. 2023,
https://arxiv.org/abs/2309.17400). The last of them answers with the clean latents that its velocity points to, so that the window may end
anywhere. What keeps the teacher from pleasing rewards and nobody else is the squared distance of its velocities from those of the model
that the stage starts from, at the points that the window passes, and the loss of the pre-training on the same clips (`clip_loss`).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pikastream_jax.config import Config
from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.dit import Denoiser
from pikastream_jax.flash_vae import FlashVAE
from pikastream_jax.nn.layers import Functional, Params, functional
from pikastream_jax.training.checkpoint import load_weights
from pikastream_jax.training.clip_loss import teachers_loss, training_rows
from pikastream_jax.training.dit_data import DiTBatch, clip_constants, prepare_batch, text_kept, windows
from pikastream_jax.training.latent_reader import load_reader
from pikastream_jax.training.loop import Metrics, Stage, TrainState
from pikastream_jax.training.mesh import split_batch
from pikastream_jax.training.optimiser import OptimiserConfig, make_optimiser
from pikastream_jax.training.previews import save_preview
from pikastream_jax.training.processes import on_the_host
from pikastream_jax.training.refl import (
    RewardedSettings,
    as_shown,
    decode_from,
    load_rewards,
    reference_picture,
    reward_loss,
    score_metrics,
)
from pikastream_jax.training.sampling import bidirectional_velocity, sample_teacher
from pikastream_jax.training.settings import Optimiser
from pikastream_jax.training.training_form import training_form
from pikastream_jax.weights.safetensors_io import restore_into

HELD_OUT = 12  # clips that are sampled to be measured


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(RewardedSettings):
    """Settings of the stage; a row of a batch is a clip."""

    updates: int = 150
    batch: int = 4
    latent_frames: int = 6
    """Length of a sample, which rewards see as a whole."""
    solver_steps: int = 10
    """Of the solver."""
    shift: float = 3.0
    """Of the solver's timesteps."""
    window: int = 2
    """Steps with gradient, at the end."""
    earliest: int = 5
    """Steps without gradient before them are this many or more."""
    decoded: int = 4
    """Latent frames that rewards see, a random stretch; FlashVAE's window comes before them."""
    optimiser: Optimiser = OptimiserConfig(learning_rate=1e-4, warmup_steps=10, decay="linear", muon=False)

    def __post_init__(self):
        super().__post_init__()
        if not (self.window >= 1 and 0 <= self.earliest <= self.solver_steps - self.window):
            raise ValueError(
                f"a window of {self.window} of {self.solver_steps} steps after {self.earliest} or more: window + earliest must be at most solver_steps, "
                "and the window at least 1"
            )


def sampled_window(
    model: Functional,
    params: Params,
    batch: DiTBatch,
    noise: Float[Array, "b f r c z"],
    times: Float[np.ndarray, "n"],
    first: Int[Array, ""],
    window: int,
    distance: Float[Array, "b"],
) -> tuple[Float[Array, "b f r c z"], tuple[Float[Array, "w b f r c z"], Float[Array, "w"], Float[Array, "w b f r c z"]]]:
    """Euler without gradient for `first` steps, then `window` steps with it.

    Returns:
      The clean latents that the last velocity points to; and the window's points, timesteps and velocities.
    """
    times = jnp.asarray(times)
    frozen = jax.lax.stop_gradient(params)

    def velocity(params, x, t):
        return bidirectional_velocity(model, params, batch, x, jnp.full(x.shape[:2], t), distance)

    def without(index, x):
        return x + (times[index + 1] - times[index]) * velocity(frozen, x, times[index])

    # A loop of unknown length knows no gradient in reverse, and needs none.
    x = jax.lax.stop_gradient(jax.lax.fori_loop(0, jax.lax.stop_gradient(first), without, noise))

    @jax.checkpoint
    def step(x, index):
        v = velocity(params, x, times[index])
        return x + (times[index + 1] - times[index]) * v, (x, v)

    indices = first + jnp.arange(window)
    _, (points, velocities) = jax.lax.scan(step, x, indices)
    clean = points[-1] - times[indices[-1]] * velocities[-1]
    return clean, (points, times[indices], velocities)


def anchor_distance(
    model: Functional,
    anchor: Params,
    batch: DiTBatch,
    points: Float[Array, "w b f r c z"],
    times: Float[Array, "w"],
    velocities: Float[Array, "w b f r c z"],
    distance: Float[Array, "b"],
) -> Float[Array, ""]:
    """Mean squared distance of velocities from those of another model of the same form at the same points.

    A point after the first depends on the parameters too, and then both velocities move with it: were the anchor's held still there, what
    both owe to the point would not cancel.
    """

    @jax.checkpoint
    def one(point):
        x, t, velocity = point
        wanted = bidirectional_velocity(model, anchor, batch, x, jnp.full(x.shape[:2], t), distance)
        return jnp.mean((velocity - wanted) ** 2)

    return jnp.mean(jax.lax.map(one, (points, times, velocities)))


def build(config: Config, seed: int, init: dict[str, Path], settings: Settings) -> Stage:
    """The stage. `init` names `clips`, `flash_vae`, `reader`, `denoiser`, the model to start from and to stay near, and the four rewards.

    Raises:
      ValueError: more latent frames decoded than there are.
    """
    context = config.flash_vae.window
    if settings.decoded + context > settings.latent_frames:
        raise ValueError(
            f"decoded {settings.decoded} latent frames and FlashVAE's window of {context} before them are more than the clip's "
            f"{settings.latent_frames}: decode fewer, or use longer clips"
        )
    model = training_form(functional(lambda rngs: Denoiser(config, rngs=rngs)), settings.form)
    vae_model = functional(lambda rngs: FlashVAE(config.flash_vae, rngs=rngs))
    optimiser = make_optimiser(model.abstract, settings.optimiser, settings.updates)
    times = solver_timesteps(settings.solver_steps, settings.shift)
    rewards, reward_params = load_rewards(config, init)

    def start() -> Params:
        return restore_into(model.abstract, load_weights(init["denoiser"], "denoiser"))

    def judged(rows: DiTBatch, clean: Float[Array, "b f r c z"], data: dict, first: Int[Array, ""]):
        """Rewards' view of the stretch of latent frames from `first` on, FlashVAE's window behind it."""
        vae, statistics = vae_model.bind(data["flash_vae"]), data["statistics"]
        stretch = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=first, axis=1)
        latents = stretch(clean, slice_size=context + settings.decoded)
        pixels = decode_from(vae, statistics, latents[:, :context], latents[:, context:])
        mel = stretch(rows.mel, slice_size=context + settings.decoded)[:, context:]
        return as_shown(pixels, reference_picture(vae, statistics, rows.reference), mel)

    def update(state: TrainState, key: Array, data: dict, batch: dict) -> tuple[TrainState, Metrics]:
        k_rows, k_noise, k_first, k_stretch, k_distance, k_clips = jax.random.split(key, 6)
        rows = split_batch(prepare_batch(config, data, batch, k_rows, train=False))
        noise = jax.random.normal(k_noise, rows.latents.shape)
        first = jax.random.randint(k_first, (), settings.earliest, settings.solver_steps - settings.window + 1)
        stretch = jax.random.randint(k_stretch, (), 0, settings.latent_frames - settings.decoded - context + 1)
        distance = jax.random.randint(k_distance, (settings.batch,), 4, 31).astype(jnp.float32)
        clips, k_loss = training_rows(config, data, batch, k_clips)

        def loss(params: Params):
            clean, passed = sampled_window(model, text_kept(params), rows, noise, times, first, settings.window, distance)
            shown = judged(rows, clean, data, stretch)
            value, scores = reward_loss(rewards, data["rewards"], shown, settings.weights, settings.clip)
            away = anchor_distance(model, data["anchor"], rows, *passed, distance)
            value, parts = value + settings.anchor * away, scores | {"distance": away}
            if settings.data:
                kept, misread = teachers_loss(config, model, params, data, clips, k_loss)
                value, parts = value + settings.data * kept, parts | misread
            return value, parts

        gradient, parts = jax.grad(loss, has_aux=True)(state.params)
        # The surrogate's value means nothing; what the stage lowers is the distance, the loss on clips and minus the scores' worth.
        value = settings.anchor * parts["distance"] + settings.data * parts.get("data", 0.0) - parts["worth"]
        return state.descend(gradient, optimiser, settings.ema), {"loss": value} | parts

    def data() -> dict:
        flash_vae = restore_into(vae_model.abstract, load_weights(init["flash_vae"], "flash_vae"))
        constants = clip_constants(init["clips"]) | {"reader": load_reader(config, init["reader"])}
        with on_the_host():  # the whole of it may be more than a device holds
            anchor = start()
        return constants | {"flash_vae": flash_vae, "rewards": reward_params, "anchor": anchor}

    @functools.cache
    def held_out_windows():
        return windows(config, init["clips"], "held_out", HELD_OUT, settings.latent_frames, None)[0]

    @jax.jit
    def held_out(params, data, batch):
        rows = prepare_batch(config, data, batch, jax.random.key(0), train=False)
        noise = jax.random.normal(jax.random.key(1), rows.latents.shape)
        distance = jnp.full(HELD_OUT, float(config.stream.reference_distance))
        clean, points = sample_teacher(model, params, rows, noise, times, distance, kept=tuple(range(settings.earliest, settings.solver_steps)))
        scores = rewards.scores(data["rewards"], judged(rows, clean, data, settings.latent_frames - settings.decoded - context))
        scores = score_metrics(scores, settings.weights)

        def velocity(point):
            x, t = point
            return bidirectional_velocity(model, params, rows, x, jnp.full(x.shape[:2], t), distance)

        asked = jnp.asarray(times[settings.earliest : -1])
        away = anchor_distance(model, data["anchor"], rows, points, asked, jax.lax.map(velocity, (points, asked)), distance)
        # Measured with weight 0 too: it tells what rewards alone take.
        kept, misread = teachers_loss(config, model, params, data, rows, jax.random.key(2))
        value = settings.anchor * away + settings.data * kept - scores["worth"]
        return {"loss": value, "distance": away} | scores | misread, rows.latents, clean

    def sample(state: TrainState, data: dict, path: Path) -> None:
        _, truth, generated = held_out(state.ema, data, held_out_windows())
        save_preview(config, init, path, np.asarray(truth[:4]), np.asarray(generated[:4]))

    return Stage(
        name="dit_reward",
        total_steps=settings.updates,
        seed=seed,
        init=lambda: TrainState.start(start(), optimiser),
        update=update,
        data=data,
        batches=lambda: windows(config, init["clips"], "train", settings.batch, settings.latent_frames, seed),
        config={"preset": config.name, "dit": dataclasses.asdict(config.dit), "stage": settings.record()},
        evaluate=lambda state, data: held_out(state.ema, data, held_out_windows())[0],
        evaluate_every=settings.every(25),
        sample=sample,
        sample_every=100,
    )
