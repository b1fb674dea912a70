"""FlashVAE's stages: the loss by its parts, and that both stages build, learn and draw."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pikastream_jax.measuring.estimator import FaceEstimator
from pikastream_jax.nn.layers import functional
from pikastream_jax.training import flash_vae, vae_decoder, vae_low_res, vae_streaming
from pikastream_jax.training.face_estimator import face_misreading
from pikastream_jax.training.faces import FaceBatch
from pikastream_jax.training.losses import reconstruction_loss, region_weights
from pikastream_jax.training.mesh import replicate
from pikastream_jax.training.optimiser import OptimiserConfig
from tests.small import randomised, small_config, small_models

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
        run = jax.jit(lambda params: flash_vae.vae_loss(models.flash_vae, params, batch, key, SETTINGS, streaming=streaming))
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
    update, state = jax.jit(stage.update), replicate(stage.init())
    before = stage.evaluate(state)
    for step in range(40):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), {}, {})
        state = dataclasses.replace(state, step=state.step + 1)
    assert update._cache_size() == 1 and np.isfinite(float(metrics["loss"]))
    after = stage.evaluate(state)
    assert after["psnr"] > before["psnr"] + 1 and after["psnr_mouth"] > before["psnr_mouth"] + 1
    stage.sample(state, tmp_path / "faces.png")
    with Image.open(tmp_path / "faces.png") as picture:
        assert picture.size == (8 * 64, 4 * 64), "eight people, first and last frame, true and reconstructed"


def test_the_decoder_stage_leaves_the_encoder_alone():
    models, params = small_models(CONFIG)
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 12, 32, 32, 3)), jnp.float32)
    batch = FaceBatch(video, boxes=jnp.full((2, 12, 2, 4), 8.0), origin=jnp.zeros((2, 2)))

    def loss(params, encoder):
        return flash_vae.vae_loss(models.flash_vae, params, batch, jax.random.key(0), SETTINGS, streaming=False, encoder=encoder)[0]

    gradient = {known: jax.jit(jax.grad(lambda p, k=known: loss(p, k)))(params.flash_vae) for known in (True, False)}
    encoding = ("patch_in", "encoder", "norm_moments", "moments")
    for name in gradient[True]:
        size = {known: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(g[name])) for known, g in gradient.items()}
        assert size[True] > 0 and (size[False] == 0) == (name in encoding), name


def test_what_is_misread_by_hand():
    """Readers that add up what they see: two clips of two frames, of which the second is read; the other clip's crop holds no eyes."""

    class Adds:
        """Answers two numbers: the mean of the picture, and nothing."""

        def __call__(self, pictures):
            mean = pictures.mean(axis=(1, 2, 3))
            return jnp.stack([mean, 0 * mean], axis=-1)

    video = jnp.zeros((2, 2, 128, 128, 3))
    output = video.at[0, 1, :64].set(0.5).at[0, 1, 64:].set(0.8).at[1, 1].set(0.2).at[:, 0].set(9.0)
    mouth, eyes = [96, 40, 116, 80], [20, 30, 40, 90]  # middles (106, 60) and (30, 60)
    boxes = jnp.broadcast_to(jnp.array([mouth, eyes], jnp.float32), (2, 2, 2, 4)) + jnp.array([64.0, 64.0] * 2)
    origin = jnp.array([[64.0, 64.0], [96.0, 64.0]])
    # Mouth of 64x64: rows 74 to 138 of the first crop, beyond its 128; rows 42 to 106 of the second. Eyes of 48x96, 5 higher than
    # their box: rows 1 to 49 of the first; 32 rows higher in the second, above its edge.
    read = types.SimpleNamespace(mouth=Adds(), eyes=Adds())
    error = face_misreading(read, output, FaceBatch(video, boxes, origin))
    parts = [np.sqrt(difference**2 + 0.01) - 0.1 for difference in (0.2, 0.5)]  # mouth of the second clip, eyes of the first
    assert error == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert face_misreading(read, video, FaceBatch(video, boxes, origin)) == 0


def test_the_reader_moves_the_decoder():
    """Its error is part of the loss, with its weight, and what it misreads has a gradient."""
    config = small_config(height=128, width=128)
    models, params = small_models(config)
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 4, 128, 128, 3)), jnp.float32)
    box = jnp.array([[40.0, 40.0, 80.0, 80.0]] * 2)
    batch = FaceBatch(video, boxes=jnp.broadcast_to(box, (1, 4, 2, 4)), origin=jnp.zeros((1, 2)))
    reader = functional(lambda rngs: FaceEstimator(rngs=rngs))
    reader = reader.bind(randomised(reader.abstract, 0))

    def loss(params, weight):
        stage = dataclasses.replace(SETTINGS, reading_weight=weight)
        value, parts = flash_vae.vae_loss(
            models.flash_vae, params, batch, jax.random.key(0), stage, streaming=False, encoder=False, reader=reader
        )
        return value, parts["reading"]

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (silent, reading), without = run(params.flash_vae, 0.0)
    (heard, _), given = run(params.flash_vae, 0.5)
    assert reading > 0.01 and heard == pytest.approx(float(silent + 0.5 * reading), rel=1e-5)
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), given, without)
    assert max(jax.tree.leaves(change)) > 0


def test_a_decoder_of_another_size_is_refused():
    with pytest.raises(ValueError, match="reader of 256x256, preset small makes another size"):
        vae_decoder.build(CONFIG, 0, {}, vae_decoder.Settings())
