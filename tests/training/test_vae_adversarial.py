"""FlashVAE's decoder against a discriminator: who learns when, the balance, and the reader's share."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from noise_faces import noise_for_faces, one_block_config

from pikastream_jax.flash_vae.model import DECODER_PARTS
from pikastream_jax.measuring.estimator import FaceEstimator
from pikastream_jax.nn.layers import functional
from pikastream_jax.training import vae_adversarial
from pikastream_jax.training.adversarial import generator_hinge
from pikastream_jax.training.face_estimator import face_misreading
from pikastream_jax.training.faces import FaceBatch
from pikastream_jax.training.flash_vae import encode_sample, pixel_loss
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.weights.safetensors_io import save
from tests.small import copied, randomised, small_models

CONFIG = one_block_config()
SETTINGS = vae_adversarial.Settings(
    updates=4,
    batch=2,
    latent_frames=1,
    crop=16,
    alone=2,
    r1_every=2,
    discriminator_dim=2,
    largest_balance=1e6,
    optimiser=OptimiserConfig(1e-3, warmup_steps=0),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of FlashVAE's weights."""
    path = tmp_path_factory.mktemp("weights") / "flash_vae.safetensors"
    save(path, small_models(CONFIG)[1].flash_vae, {})
    return path


def differ(a, b):
    return any(bool(jnp.any(x != y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.slow
def test_who_learns_when(weights, monkeypatch):
    monkeypatch.setattr(vae_adversarial, "draw_faces", noise_for_faces)
    stage = vae_adversarial.build(CONFIG, 0, {"flash_vae": weights}, SETTINGS)
    update, states = jax.jit(stage.update), [copied(stage.init())]
    for step in range(3):
        state, metrics = update(states[-1], jax.random.key(step), {}, {})
        states.append(dataclasses.replace(state, step=state.step + 1))
        assert all(np.isfinite(float(value)) for value in metrics.values())
        assert differ(states[-1].extra["discriminator"], states[-2].extra["discriminator"])
    assert update._cache_size() == 1
    start, after_alone, end = states[0], states[2], states[3]
    assert not differ(start.params, after_alone.params) and not differ(start.opt_state, after_alone.opt_state)
    for name, part in end.params.items():
        changed = differ(part, start.params[name]), differ(end.ema[name], start.ema[name])
        assert changed == ((name in DECODER_PARTS),) * 2, name

    # The balance of the last update, from gradients taken one by one at the last layer.
    models, _ = small_models(CONFIG)
    before, judge = states[2], end.extra["discriminator"]
    k_data, k_noise = jax.random.split(jax.random.key(2))
    discriminator = functional(lambda rngs: vae_adversarial.Discriminator(2, rngs=rngs))

    @jax.jit
    def lengths(kernel):
        faces = noise_for_faces(k_data, SETTINGS, CONFIG)

        def decode(kernel):
            vae = models.flash_vae.bind(before.params)
            vae.upsampler.head.down.kernel[...] = kernel
            return vae.decode(encode_sample(vae, faces.video, k_noise)[0])

        truth = jax.grad(lambda k: pixel_loss(decode(k), faces, SETTINGS)[0])(kernel)
        fooled = jax.grad(lambda k: generator_hinge(discriminator.bind(judge)(decode(k))))(kernel)
        return jnp.linalg.norm(truth), jnp.linalg.norm(fooled)

    truth, fooled = lengths(vae_adversarial.last_layer(vae_adversarial.decoder_of(before.params)))
    assert metrics["balance"] == pytest.approx(float(truth / fooled), rel=1e-3)


def test_what_makes_no_sense_is_refused(weights):
    with pytest.raises(ValueError, match="alone 4 must lie in 0 to 3"):
        dataclasses.replace(SETTINGS, alone=4)
    with pytest.raises(ValueError, match="crop 12 must be a multiple of 8"):
        dataclasses.replace(SETTINGS, crop=12)
    with pytest.raises(ValueError, match="crop 64 is larger than the 32x32 pictures"):
        vae_adversarial.build(CONFIG, 0, {"flash_vae": weights}, dataclasses.replace(SETTINGS, crop=64))


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
    parts = [
        np.sqrt(difference**2 + 0.01) - 0.1 for difference in (0.2, 0.5)
    ]  # mouth of the second clip, eyes of the first
    assert error == pytest.approx(sum(parts) / 2, rel=1e-5)
    assert face_misreading(read, video, FaceBatch(video, boxes, origin)) == 0


def test_the_reader_is_heard():
    """What it misreads is part of the loss, with its weight, and has a gradient of its own."""
    rng = np.random.default_rng(0)
    video, output = (jnp.asarray(rng.uniform(-1, 1, (1, 2, 128, 128, 3)), jnp.float32) for _ in range(2))
    box = jnp.array([[40.0, 40.0, 80.0, 80.0]] * 2)
    faces = FaceBatch(video, boxes=jnp.broadcast_to(box, (1, 2, 2, 4)), origin=jnp.zeros((1, 2)))
    model = functional(lambda rngs: FaceEstimator(rngs=rngs))
    reader = model.bind(randomised(model.abstract, 0))

    def loss(output, weight):
        return vae_adversarial.truth_loss(output, faces, dataclasses.replace(SETTINGS, reading_weight=weight), reader)

    (silent, parts), without = jax.value_and_grad(loss, has_aux=True)(output, 0.0)
    (heard, _), given = jax.value_and_grad(loss, has_aux=True)(output, 0.5)
    assert parts["reading"] > 0.01 and heard == pytest.approx(float(silent + 0.5 * parts["reading"]), rel=1e-5)
    assert jnp.abs(given - without).max() > 0
