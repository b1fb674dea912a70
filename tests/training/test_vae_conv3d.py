"""The two decoders side by side: the same latents and loss, each its own descent."""

import dataclasses

import jax
import numpy as np
import pytest
from noise_faces import noise_for_faces, one_block_config
from PIL import Image

from pikastream_jax.training import vae_conv3d
from pikastream_jax.training.flash_vae import encode_sample, pixel_loss
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.weights.safetensors_io import save
from tests.small import copied, small_models

CONFIG = one_block_config()
SETTINGS = vae_conv3d.Settings(
    updates=3, batch=2, latent_frames=2, crop=16, optimiser=OptimiserConfig(3e-3, warmup_steps=0)
)


@pytest.mark.slow
def test_both_decoders_learn_from_the_same_latents(tmp_path, monkeypatch):
    monkeypatch.setattr(vae_conv3d, "draw_faces", noise_for_faces)
    models, params = small_models(CONFIG)
    save(tmp_path / "flash_vae.safetensors", params.flash_vae, {})
    stage = vae_conv3d.build(CONFIG, 0, {"flash_vae": tmp_path / "flash_vae.safetensors"}, SETTINGS)
    update, state, data = jax.jit(stage.update), copied(stage.init()), stage.data()
    start, losses = state, []
    for _ in range(3):  # the same clips again and again
        state, metrics = update(state, jax.random.key(0), data, {})
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append({name: float(metrics[f"loss_{name}"]) for name in ("conv3d", "flash_vae")})
    for name in losses[0]:
        assert losses[2][name] < losses[0][name]

    # The first losses again, each decoder by itself.
    k_data, k_noise = jax.random.split(jax.random.key(0))

    @jax.jit
    def by_hand(params):
        faces = noise_for_faces(k_data, SETTINGS, CONFIG)
        vae = models.flash_vae.bind({**data["encoder"], **params["flash_vae"]})
        latents, _ = encode_sample(vae, faces.video, k_noise)
        outputs = {
            "conv3d": vae_conv3d.conv3d(CONFIG).bind(params["conv3d"])(latents),
            "flash_vae": vae.decode(latents),
        }
        return {name: pixel_loss(output, faces, SETTINGS)[0] for name, output in outputs.items()}

    assert {name: float(loss) for name, loss in by_hand(start.params).items()} == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_figures_and_pictures_of_both(tmp_path):
    _, params = small_models(CONFIG)
    save(tmp_path / "flash_vae.safetensors", params.flash_vae, {})
    stage = vae_conv3d.build(CONFIG, 0, {"flash_vae": tmp_path / "flash_vae.safetensors"}, SETTINGS)
    figures = stage.evaluate(stage.init(), stage.data())
    assert figures["loss"] == figures["loss_conv3d"] and all(np.isfinite(value) for value in figures.values())
    assert figures["psnr_conv3d"] != figures["psnr_flash_vae"]
    stage.sample(stage.init(), stage.data(), tmp_path / "step_1.png")
    with Image.open(tmp_path / "step_1.png") as picture:
        assert picture.size == (8 * CONFIG.stream.width, 6 * CONFIG.stream.height), "eight people; truth and both outputs, twice"
