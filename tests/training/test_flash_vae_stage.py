"""FlashVAE's stages: the loss by its parts, and that both stages build, learn and draw."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pikastream_jax.training import flash_vae, vae_low_res, vae_streaming
from pikastream_jax.training.faces import FaceBatch
from pikastream_jax.training.losses import reconstruction_loss, region_weights
from pikastream_jax.training.optimiser import OptimiserConfig
from tests.small import copied, small_config, small_models

CONFIG = small_config(height=32, width=32)


SETTINGS = flash_vae.VAESettings(
    batch=2, latent_frames=3, crop=32, kl_weight=0.1, motion_weight=0.5, updates=1, optimiser=OptimiserConfig(1e-3)
)


def test_the_loss_by_its_parts_through_the_cache_or_at_once():
    models, params = small_models(CONFIG)
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20, (2, 12, 2, 2))
    batch = FaceBatch(
        video=jnp.asarray(rng.uniform(-1, 1, (2, 12, 32, 32, 3)), jnp.float32),
        boxes=jnp.asarray(np.concatenate([corner, corner + 8], axis=-1), jnp.float32),
        origin=jnp.array([[0.0, 0.0], [3.0, 5.0]]),
    )
    key = jax.random.key(0)

    def loss(streaming):
        run = jax.jit(
            lambda params: flash_vae.vae_loss(models.flash_vae, params, batch, key, SETTINGS, streaming=streaming)
        )
        return run(params.flash_vae)

    (through, parts), (at_once, _) = loss(True), loss(False)
    assert through == pytest.approx(float(at_once), rel=1e-5)

    @jax.jit
    def by_parts(params):
        vae = models.flash_vae.bind(params)
        mean, log_variance = vae.encode(batch.video)
        latents = mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
        return mean, log_variance, vae.decode(latents)

    mean, log_variance, output = (np.asarray(x, np.float64) for x in by_parts(params.flash_vae))
    kl = (0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)).mean()
    weight = jnp.stack([region_weights(batch.boxes[i], 32, 32, (6.0, 2.0), batch.origin[i]) for i in range(2)])
    reconstruction = float(reconstruction_loss(jnp.asarray(output, jnp.float32), batch.video, weight))
    error = output - np.asarray(batch.video, np.float64)
    share = np.asarray(weight / weight.mean(), np.float64)[:, 1:, ..., None]
    change = np.diff(error, axis=1)
    motion = (share * (np.abs(change) + 2 * change**2)).mean()
    assert through == pytest.approx(reconstruction + 0.5 * motion + 0.1 * kl, rel=1e-4)
    assert parts["psnr"] == pytest.approx(10 * np.log10(4 / (error**2).mean()), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("module", [vae_low_res, vae_streaming])
def test_a_stage_learns_and_draws(module, tmp_path):
    config = small_config(height=64, width=64)
    blocks = {"encoder_blocks": 1, "decoder_blocks": 1, "refine_blocks": 1}
    config = dataclasses.replace(config, flash_vae=dataclasses.replace(config.flash_vae, **blocks))
    stage = module.build(config, 0, {}, module.Settings(crop=16 if module is vae_low_res else 64))
    update, state = jax.jit(stage.update), copied(stage.init())
    before = stage.evaluate(state, stage.data())
    for step in range(40):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), {}, {})
        state = dataclasses.replace(state, step=state.step + 1)
    assert update._cache_size() == 1 and np.isfinite(float(metrics["loss"]))
    after = stage.evaluate(state, stage.data())
    assert after["psnr"] > before["psnr"] + 1 and after["psnr_mouth"] > before["psnr_mouth"] + 1
    stage.sample(state, stage.data(), tmp_path / "faces.png")
    with Image.open(tmp_path / "faces.png") as picture:
        assert picture.size == (8 * 64, 4 * 64), "eight people, first and last frame, true and reconstructed"


def test_crops_larger_than_the_pictures_are_refused():
    with pytest.raises(ValueError, match="vae_streaming: crop 256 is larger than the 32x32 pictures of small"):
        vae_streaming.build(CONFIG, 0, {}, vae_streaming.Settings())
