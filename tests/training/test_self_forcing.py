"""Self-forcing: what the critic pays by hand, what the held-out measure sees, and that an update moves what it should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from coded_clips import write_coded

from pikastream_jax.training import dit_causal, dit_self_forcing
from pikastream_jax.training.dit_data import prepare_batch, text_kept
from pikastream_jax.training.dmd import TIMESTEPS
from pikastream_jax.training.latent_reader import reader_model
from pikastream_jax.training.loop import TrainState
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.sampling import Guidance
from pikastream_jax.weights import safetensors_io
from tests.small import copied, randomised, small_config, small_models

CONFIG = small_config(chunk=2, window=4, steps=2)
ADAM = dict(warmup_steps=0, decay="linear", betas=(0.0, 0.999), muon=False)
SETTINGS = dit_self_forcing.Settings(
    updates=10, batch=2, latent_frames=8, judged=4, critic_updates=2,
    optimiser=OptimiserConfig(1e-3, **ADAM), critic_optimiser=OptimiserConfig(1e-3, **ADAM),
)  # fmt: skip


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, params in {
        "denoiser": small_models(CONFIG)[1].denoiser,
        "teacher": small_models(CONFIG, seed=5)[1].denoiser,
        "reader": randomised(reader_model(CONFIG).abstract, 0),
    }.items():
        safetensors_io.save(folder / f"{name}.safetensors", params, dtype=jnp.float32)
    paths = {path.stem: path for path in folder.glob("*.safetensors")}
    return paths | {"clips": write_coded(folder / "clips", CONFIG), "flash_vae": folder}


def test_the_critic_pays_for_flow_matching_on_frames_that_count(monkeypatch):
    """A network that answers 0 pays the velocity's square; the second row counts in its last frame alone."""
    rng = np.random.default_rng(0)
    clean = jnp.asarray(rng.normal(size=(2, 3, 2, 2, 1)), jnp.float32)
    counts = jnp.array([[True] * 3, [False, False, True]])
    asked = {}

    def silent(model, params, batch, x, t, distance):
        asked.update(x=x, t=t)
        return jnp.zeros_like(x)

    monkeypatch.setattr(dit_self_forcing, "bidirectional_velocity", silent)
    loss = dit_self_forcing.critic_loss(None, {}, None, clean, counts, jax.random.key(0), 3.0, 8.0)
    x, t = np.asarray(asked["x"], np.float64), np.asarray(asked["t"], np.float64)[..., None, None, None]
    assert (asked["t"] == asked["t"][:, :1]).all() and (np.asarray(asked["t"]) >= TIMESTEPS[0]).all() and (np.asarray(asked["t"]) <= TIMESTEPS[1]).all()
    noise = (x - (1 - t) * np.asarray(clean)) / t
    squares = (noise - np.asarray(clean)) ** 2
    assert loss == pytest.approx(np.concatenate([squares[0].ravel(), squares[1, 2].ravel()]).mean(), rel=1e-4)


def test_expected_clean_by_hand(monkeypatch):
    """x - t velocity, guided: velocity 1, 3 more with words, scale 2: 1 + 3 + 3."""
    answer = lambda model, params, batch, x, t, distance: jnp.broadcast_to(1.0 + 3 * (batch.valid[:, :1] > 1)[..., None, None, None], x.shape)  # noqa: E731
    monkeypatch.setattr(dit_self_forcing, "bidirectional_velocity", answer)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass(frozen=True)
    class Told:
        valid: jax.Array
        reference: jax.Array
        keep_audio: jax.Array

    told = Told(jnp.array([[4, 4], [1, 1]]), jnp.zeros((2, 1)), jnp.ones(2, bool))
    x = jnp.full((2, 1, 1, 1, 1), 10.0)
    clean = dit_self_forcing.expected_clean(None, {}, told, x, jnp.array([0.5, 0.25]), Guidance(text=2.0), 8.0)
    np.testing.assert_allclose(clean.ravel(), [10 - 0.5 * 7, 10 - 0.25 * 1])


def test_statistics_by_hand():
    truth = jnp.asarray([0.0, 2.0]).reshape(1, 1, 1, 2, 1)
    generated = jnp.asarray([1.0, 5.0]).reshape(1, 1, 1, 2, 1)  # mean 3 against 1, deviation 2 against 1
    assert dit_self_forcing.distance_of_statistics(generated, truth) == pytest.approx(4 + 1)
    assert dit_self_forcing.distance_of_statistics(truth, truth) == 0


def test_an_update_moves_student_and_critic(init):
    """Teacher and text encoder stay; the loss is half the mean square of the gradient that is matched."""
    stage = dit_self_forcing.build(CONFIG, 0, init, SETTINGS)
    state, data = copied(stage.init()), copied(stage.data())
    first = jax.tree.map(np.asarray, (state.params, state.extra["critic"]))
    update, batches = jax.jit(stage.update), stage.batches()
    for step in range(2):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batches[step])
        state = dataclasses.replace(state, step=state.step + 1)
        assert all(np.isfinite(float(value)) for value in metrics.values()), metrics
        assert float(metrics["loss"]) == pytest.approx(0.5 * float(metrics["matching"]) ** 2, rel=1e-4)
    assert update._cache_size() == 1
    for before, after in zip(first, (state.params, state.extra["critic"]), strict=True):
        moved = safetensors_io.flatten(jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), after, before))
        assert moved["dit.head.projection.kernel"] > 0 == max(value for name, value in moved.items() if name.startswith("text."))
    figures = stage.evaluate(state, data)
    assert {"loss", "identity", "expression", "closures", "statistics", "size", "spread", "change"} == set(figures)
    parts = {name: float(figures[name]) for name in ("identity", "expression", "closures", "statistics")}
    assert figures["loss"] == pytest.approx(parts["identity"] + parts["expression"] + 0.1 * parts["closures"] + parts["statistics"], rel=1e-5)


@pytest.mark.slow
def test_clips_beside_the_teacher(init, monkeypatch):
    """The gradient is the sum of the distribution's and of `data` times that of teacher forcing on the same windows; the loss is the first's."""
    monkeypatch.setattr(TrainState, "descend", lambda state, gradient, *rest: dataclasses.replace(state, params=gradient))
    key, found = jax.random.key(3), {}
    for weight in (0.0, 0.5):
        stage = dit_self_forcing.build(CONFIG, 0, init, dataclasses.replace(SETTINGS, data=weight, critic_updates=1))
        state, data, batch = copied(stage.init()), copied(stage.data()), stage.batches()[0]
        found[weight] = jax.jit(stage.update)(state, key, data, batch)
    k_rows, k_loss = jax.random.split(jax.random.split(key, 8)[-1])

    @jax.jit
    def alone(params, data, batch):
        rows = prepare_batch(CONFIG, data, batch, k_rows, train=True)
        model, reader = small_models(CONFIG)[0].denoiser, reader_model(CONFIG).bind(data["reader"])
        asked = dit_causal.Settings(objective="data")
        return jax.grad(lambda params: dit_causal.teacher_forcing_loss(CONFIG, model, text_kept(params), rows, k_loss, reader, asked, train=True)[0])(params)

    clips = alone(state.params, data, batch)
    (without, before), (both, metrics) = found[0.0], found[0.5]
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(clips))
    assert largest > 1e-3
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(c, a + 0.5 * b, rtol=1e-3, atol=1e-4 * largest), without.params, clips, both.params)
    assert metrics["loss"] == pytest.approx(float(before["loss"]), rel=1e-4)
    assert set(metrics) - set(before) == {"data", "data_identity", "data_expression", "data_closures"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_frames": 7}, "a roll-out of 7 latent frames, 4 of them judged, is not made of whole chunks of 2"),
        ({"latent_frames": 6}, "use 8 or more, so that eviction is trained"),
        ({"teacher": "tiny"}, "preset tiny cannot judge preset small: its flash_vae"),
        ({"critic_updates": 0}, "critic_updates 0 must be at least 1"),
        ({"shift": 0.0}, "shift 0.0 must be above 0"),
        ({"data": float("inf")}, "data inf must be finite and at least 0"),
    ],
)
def test_what_cannot_be_is_refused(init, changes, message):
    with pytest.raises(ValueError, match=message):
        dit_self_forcing.build(CONFIG, 0, init, dataclasses.replace(SETTINGS, **changes))
