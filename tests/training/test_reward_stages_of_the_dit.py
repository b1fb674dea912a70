"""ReFL on teacher and student: the window of steps, the anchor, decoding along the stream, the loss on clips, and updates that climb."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_clips import coded_batch, coded_constants, write_coded

from pikastream_jax.diffusion.flow import solver_timesteps
from pikastream_jax.rewards import REWARDS, Rewards
from pikastream_jax.training import dit_causal, dit_pretrain, dit_reward, dit_student_reward
from pikastream_jax.training.dit_data import prepare_batch, text_kept
from pikastream_jax.training.latent_reader import reader_model
from pikastream_jax.training.loop import TrainState
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.refl import RewardWeights, decode_from
from pikastream_jax.training.sampling import bidirectional_velocity
from pikastream_jax.weights import safetensors_io
from tests.small import copied, randomised, small_config, small_models

CONFIG = small_config(chunk=2, window=4, steps=2)
ADAM = OptimiserConfig(1e-3, warmup_steps=0, decay="linear", muon=False)
TEACHER = dit_reward.Settings(updates=10, batch=2, latent_frames=6, solver_steps=4, window=2, earliest=1, decoded=4, optimiser=ADAM)
STUDENT = dit_student_reward.Settings(updates=10, batch=2, latent_frames=8, judged=4, optimiser=ADAM)


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    _, params = small_models(CONFIG)
    weights = {"denoiser": params.denoiser, "flash_vae": params.flash_vae}
    weights["reader"] = randomised(reader_model(CONFIG).abstract, 0)
    weights |= {f"reward_{name}": randomised(model.abstract, 3) for name, model in Rewards.of(CONFIG).models.items()}
    for name, tree in weights.items():
        safetensors_io.save(folder / f"{name}.safetensors", tree, dtype=jnp.float32)
    return {name: folder / f"{name}.safetensors" for name in weights} | {"clips": write_coded(folder / "clips", CONFIG)}


def test_the_window_is_the_end_of_the_solver(init):
    """First steps without gradient, then the window, then the clean latents that its last velocity points to; by hand, step by step."""
    models, params = small_models(CONFIG)
    rows = prepare_batch(CONFIG, coded_constants(CONFIG), coded_batch(CONFIG, 2, 3), jax.random.key(0), train=False)
    noise = jax.random.normal(jax.random.key(1), rows.latents.shape)
    distance, times = jnp.full(2, 8.0), solver_timesteps(4, 3.0)
    velocity = jax.jit(lambda x, t: bidirectional_velocity(models.denoiser, params.denoiser, rows, x, jnp.full(x.shape[:2], t), distance))
    window = jax.jit(lambda noise: dit_reward.sampled_window(models.denoiser, params.denoiser, rows, noise, times, jnp.int32(1), 2, distance))
    clean, (points, asked, velocities) = window(noise)
    x, expected = noise, []
    for index in range(3):
        v = velocity(x, times[index])
        expected.append((x, times[index], v))
        last, x = x - times[index] * v, x + (times[index + 1] - times[index]) * v
    np.testing.assert_allclose(asked, times[1:3])
    for row, (point, _, v) in enumerate(expected[1:]):
        np.testing.assert_allclose(points[row], point, atol=2e-4)
        np.testing.assert_allclose(velocities[row], v, atol=2e-3)
    np.testing.assert_allclose(clean, last, atol=2e-3)
    gradient = jax.jit(jax.grad(lambda noise: jnp.sum(dit_reward.sampled_window(models.denoiser, params.denoiser, rows, noise, times, jnp.int32(1), 2, distance)[0])))(noise)
    assert (np.asarray(gradient) == 0).all(), "nothing goes back behind the window"


def test_the_anchor_by_hand(monkeypatch):
    """Velocities of 3 against 1 at the first point and 2 against 1 at the second: mean of 4 and 1."""
    monkeypatch.setattr(dit_reward, "bidirectional_velocity", lambda model, params, batch, x, t, distance: jnp.ones_like(x))
    velocities = jnp.stack([jnp.full((1, 1, 1, 1, 1), 3.0), jnp.full((1, 1, 1, 1, 1), 2.0)])
    distance = dit_reward.anchor_distance(None, {}, None, jnp.zeros((2, 1, 1, 1, 1, 1)), jnp.array([0.5, 0.2]), velocities, jnp.ones(1))
    assert distance == pytest.approx(2.5)


def test_the_anchor_moves_with_the_points(monkeypatch):
    """Of velocities a x and 2 x, from x0 = 3 over a window from t = 0.8 to 0.5: x1 = x0 - 0.3 a x0, and the derivative by a of
    ((a - 2)^2 x0^2 + (a - 2)^2 x1^2) / 2, with x1 as it depends on a."""
    monkeypatch.setattr(dit_reward, "bidirectional_velocity", lambda model, params, batch, x, t, distance: params["a"] * x)
    noise, times = jnp.full((1, 1, 1, 1, 1), 3.0), np.array([0.8, 0.5, 0.0])

    def away(a):
        _, passed = dit_reward.sampled_window(None, {"a": a}, None, noise, times, jnp.int32(0), 2, jnp.ones(1))
        return dit_reward.anchor_distance(None, {"a": jnp.float32(2)}, None, *passed, jnp.ones(1))

    value, slope = jax.value_and_grad(away)(jnp.float32(2.5))
    x1 = 3 - 0.3 * 2.5 * 3
    assert value == pytest.approx((0.25 * 9 + 0.25 * x1**2) / 2, rel=1e-5)
    assert slope == pytest.approx((2 * 0.5 * 9 + 2 * 0.5 * x1**2 + 2 * 0.25 * x1 * -0.3 * 3) / 2, rel=1e-5)


def test_pixels_along_the_stream_are_the_streams():
    """Where the judged chunks' clean latents are what the stream shows, so are the pixels; each chunk's are its own latents' alone."""
    models, params = small_models(CONFIG)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.normal(size=(1, 8, 6, 4, 4)), jnp.float32)
    clean = latents[:, 4:].reshape(1, 2, 2, 6, 4, 4).swapaxes(0, 1)
    vae = models.flash_vae.bind(params.flash_vae)
    along = jax.jit(lambda latents, clean: dit_student_reward.decode_along(vae, params.statistics, latents, clean))
    expected = jax.jit(lambda latents: decode_from(vae, params.statistics, latents[:, :4], latents[:, 4:]))(latents)
    np.testing.assert_allclose(along(latents, clean), expected, atol=1e-4)
    other = along(latents, clean.at[0].add(1.0))
    change = np.abs(np.asarray(other - expected)).max(axis=(0, 2, 3, 4))
    assert (change[:8] > 1e-3).all() and (change[8:] < 1e-4).all(), "the next chunk is decoded after what the stream showed"


CLIPS = {"data", "data_identity", "data_expression", "data_closures"}


def of_the_pre_training(model, params, rows, key, reader):
    return dit_pretrain.flow_matching_loss(model, params, rows, key, reader, dit_pretrain.Settings())


def of_teacher_forcing(model, params, rows, key, reader):
    return dit_causal.teacher_forcing_loss(CONFIG, model, params, rows, key, reader, dit_causal.Settings(objective="data"), train=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "settings", "keys", "of_clips"),
    [(dit_reward, TEACHER, 6, of_the_pre_training), (dit_student_reward, STUDENT, 5, of_teacher_forcing)],
)
def test_the_gradient_is_that_of_the_rewards_and_of_the_clips(init, module, settings, keys, of_clips, monkeypatch):
    """The second on the same windows as the earlier stage sees them, and with weight 0 not at all."""
    monkeypatch.setattr(TrainState, "descend", lambda state, gradient, *rest: gradient)
    key, found = jax.random.key(3), {}
    for weight in (0.0, 0.5):
        stage = module.build(CONFIG, 0, init, dataclasses.replace(settings, data=weight))
        state, data, batch = copied(stage.init()), copied(stage.data()), stage.batches()[0]
        found[weight] = jax.jit(stage.update)(state, key, data, batch)
    k_rows, k_loss = jax.random.split(jax.random.split(key, keys)[-1])

    @jax.jit
    def alone(params, data, batch):
        rows = prepare_batch(CONFIG, data, batch, k_rows, train=True)
        reader = reader_model(CONFIG).bind(data["reader"])
        model = small_models(CONFIG)[0].denoiser
        return jax.grad(lambda params: of_clips(model, text_kept(params), rows, k_loss, reader), has_aux=True)(params)

    clips, parts = alone(state.params, data, batch)
    (rewards, before), (both, metrics) = found[0.0], found[0.5]
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(clips))
    assert largest > 1e-3 and max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(rewards)) > 1e-6
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, a + 0.5 * b, rtol=1e-3, atol=1e-4 * largest), rewards, clips, both)
    assert set(metrics) - set(before) == CLIPS
    weights = dit_pretrain.Settings() if module is dit_reward else dit_causal.Settings()
    total = parts["loss"] + weights.reading * (parts["identity"] + parts["expression"]) + weights.closures * parts["closures"]
    assert metrics["data"] == pytest.approx(float(total), rel=1e-4)
    assert all(metrics[f"data_{name}"] == pytest.approx(float(parts[name]), rel=1e-4) for name in ("identity", "expression", "closures"))
    assert metrics["loss"] == pytest.approx(float(before["loss"] + 0.5 * total), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("module", "settings"), [(dit_reward, TEACHER), (dit_student_reward, STUDENT)])
def test_updates_move_the_denoiser_and_nothing_else(init, module, settings):
    stage = module.build(CONFIG, 0, init, settings)
    state, data = copied(stage.init()), copied(stage.data())
    first = jax.tree.map(np.asarray, state.params)
    update, batches = jax.jit(stage.update), stage.batches()
    for step in range(2):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batches[step])
        state = dataclasses.replace(state, step=state.step + 1)
        assert {*REWARDS, *CLIPS, "worth", "distance", "loss"} == set(metrics) and all(np.isfinite(float(value)) for value in metrics.values())
        wanted = float(metrics["distance"]) - float(metrics["worth"]) + settings.data * float(metrics["data"])
        assert float(metrics["loss"]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert (float(metrics["distance"]) < 1e-8) == (step == 0), "at first it is the anchor itself"
    moved = safetensors_io.flatten(jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, first))
    assert moved["dit.head.projection.kernel"] > 0 == max(value for name, value in moved.items() if name.startswith("text."))
    figures = stage.evaluate(state, data)
    assert {*REWARDS, *CLIPS, "worth", "loss"} <= set(figures)
    wanted = float(figures.get("distance", 0.0)) - float(figures["worth"]) + settings.data * float(figures["data"])
    assert float(figures["loss"]) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(
    ("module", "settings", "changes", "message"),
    [
        (dit_reward, TEACHER, {"window": 4}, "a window of 4 of 4 steps after 1 or more"),
        (dit_reward, TEACHER, {"decoded": 5}, "decoded 5 latent frames and FlashVAE's window of 2 before them are more than the clip's 6"),
        (dit_reward, TEACHER, {"anchor": -1.0}, "anchor -1.0 must be at least 0"),
        (dit_reward, TEACHER, {"data": -1.0}, "data -1.0 must be finite and at least 0: it is the weight of the loss on clips"),
        (dit_student_reward, STUDENT, {"data": float("nan")}, "data nan must be finite and at least 0"),
        (dit_reward, TEACHER, {"weights": dict(identity=-1.0)}, "the weight -1.0 of reward identity must be finite and at least 0"),
        (dit_student_reward, STUDENT, {"judged": 8}, "judged 8 latent frames of as many"),
        (dit_student_reward, STUDENT, {"latent_frames": 6}, "use 8 or more, so that eviction is trained"),
    ],
)
def test_what_cannot_be_is_refused(module, settings, changes, message):
    with pytest.raises(ValueError, match=message):
        if "weights" in changes:
            changes = {"weights": RewardWeights(**changes["weights"])}
        module.build(CONFIG, 0, {}, dataclasses.replace(settings, **changes))
