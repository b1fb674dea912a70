"""The DiT's stages: how sequences are cut into chunks, what the causal loss asks, and that both learn."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from coded_clips import OUTPUTS, coded_batch, coded_constants

from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.training import (
    conditions,
    dit_causal,
    dit_data,
    dit_guidance,
    dit_pretrain,
    dit_sft,
    latent_reader,
    two_copies,
)
from pikastream_jax.training.latent_reader import EXPRESSION, Said, reader_model
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.training.training_form import Form
from pikastream_jax.weights import safetensors_io
from tests.small import copied, randomised, small_config, small_models

CONFIG = small_config(chunk=3, window=3)  # 6 x 4 latents of 8 pixels
READER = reader_model(CONFIG)


@pytest.fixture(scope="module")
def held_out():
    """The first six latent frames of five clips, nothing dropped."""
    prepare = jax.jit(functools.partial(dit_data.prepare_batch, CONFIG, train=False))
    return prepare(coded_constants(CONFIG), coded_batch(CONFIG, 5, 6), jax.random.key(0))


def test_random_chunks():
    """Whole chunks of one size per sequence: the largest in 2/3 + 1/3 x 1/3 of them, else any."""
    ids = np.asarray(two_copies.random_chunks(jax.random.key(0), 3000, 9, 3))
    sizes = (ids == 0).sum(axis=1)
    assert set(sizes) == {1, 2, 3}
    np.testing.assert_array_equal(ids, np.arange(9) // sizes[:, None])
    shares = [(sizes == size).mean() for size in (1, 2, 3)]
    np.testing.assert_allclose(shares, [1 / 9, 1 / 9, 7 / 9], atol=0.03)


def test_what_the_causal_loss_asks():
    """The network is asked at the solver's timesteps, its context at the last; a network that answers 0 pays |noise - clean|^2."""
    asked = {}

    @dataclasses.dataclass(frozen=True)
    class Heard:
        text: jax.Array
        text_valid: jax.Array
        audio: jax.Array
        motion: jax.Array

    class Silent:
        """Takes the place of the denoiser, records what it is given, answers zero."""

        dit = property(lambda self: self)

        def text_conditions(self, tokens, valid, frame_prompt):
            at = frame_prompt[..., None], jnp.arange(len(valid))[:, None]
            return tokens[at[1], at[0][..., 0]][None], valid[at[1], at[0][..., 0]]

        def conditions(self, text, valid, mel, motion, keep_audio):
            return Heard(text, valid, mel[None], motion)

        def reference_keys_values(self, reference):
            return reference

        def forward_sequence(self, latents, t, conditions, reference, **rest):
            asked.update(rest, latents=np.asarray(latents), t=np.asarray(t), told=conditions)
            return jnp.zeros_like(latents)

    rng = np.random.default_rng(0)
    b, f = 8, 9
    batch = dit_data.DiTBatch(
        latents=jnp.asarray(rng.normal(size=(b, f, 6, 4, 4)), jnp.float32),
        reference=jnp.zeros((b, 6, 4, 4)),
        other_reference=jnp.zeros((b, 6, 4, 4)),
        mel=jnp.asarray(rng.normal(size=(b, f, 2, 2)), jnp.float32),
        tokens=jnp.asarray(rng.integers(0, 60, (b, 2, 6))),
        valid=jnp.asarray(rng.integers(1, 6, (b, 2))),
        frame_prompt=jnp.asarray(np.arange(f) >= np.arange(b)[:, None]).astype(jnp.int32),
        keep_audio=jnp.ones(b, bool),
        weight=jnp.asarray(rng.uniform(0.5, 2, (b, f, 6, 4)), jnp.float32),
        boxes=jnp.zeros((b, f, 2, 4)),
        truth=jnp.zeros((b, f, OUTPUTS)),
        opening=jnp.asarray(rng.uniform(0.0, 0.2, (b, f, 4)), jnp.float32),
        motion=jnp.asarray(rng.normal(size=(b, f, 6)), jnp.float32),
    )

    def mean_of_latents(latents, boxes, truth):
        """A reader whose every number is the mean of the latent frame."""
        mean = latents.mean(axis=(2, 3, 4))[..., None]
        return Said(jnp.broadcast_to(mean, (b, f, OUTPUTS)), jnp.broadcast_to(mean, (b, f, 4)))

    config = small_config(chunk=3, window=3, steps=4, shift=2.0)
    chunk_ids = jnp.arange(f)[None] // jnp.array([[3], [2]] * 4)
    model = types.SimpleNamespace(bind=lambda params: Silent())
    copies = two_copies.two_copies(config, batch, jax.random.key(0), chunk_ids)
    parts = two_copies.causal_losses(config, model, {}, batch, copies, mean_of_latents)

    solver = np.array([1, 6 / 7, 2 / 3, 2 / 5], np.float32)  # four steps, shift 2, by hand
    t_context, t_query = asked["t"][:, :f], asked["t"][:, f:]
    np.testing.assert_allclose(t_context, solver[-1], rtol=1e-6)
    nearest = np.abs(t_query[..., None] - solver).argmin(-1)
    np.testing.assert_allclose(t_query, solver[nearest], rtol=1e-6)
    assert set(nearest.ravel()) == {0, 1, 2, 3}
    for row in range(b):
        for chunk in range(int(chunk_ids[row, -1]) + 1):
            assert len(set(t_query[row, np.asarray(chunk_ids[row]) == chunk])) == 1, "one timestep per chunk"

    def noise_in(x, t):
        t = t[:, :, None, None, None]
        return (x - (1 - t) * np.asarray(batch.latents)) / t

    noises = [noise_in(asked["latents"][:, part], t) for part, t in ((slice(f), t_context), (slice(f, None), t_query))]
    for noise in noises:
        assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(noises[0].ravel(), noises[1].ravel())[0, 1]) < 0.05, "the copies have noise of their own"
    expected = np.mean(np.asarray(batch.weight) * ((noises[1] - np.asarray(batch.latents)) ** 2).mean(-1))
    assert parts["loss"] == pytest.approx(expected, rel=1e-4)
    # A velocity of zero leaves x_t where it is, and its mean is misread by that much.
    misread = (asked["latents"][:, f:] - np.asarray(batch.latents)).mean(axis=(2, 3, 4)) ** 2
    assert parts["identity"] == pytest.approx(misread.mean(), rel=1e-4) == parts["expression"]
    closed = 1 / (1 + np.exp(-asked["latents"][:, f:].mean(axis=(2, 3, 4))))[..., None]  # the chance that it gives
    price = -np.log(np.where(np.asarray(batch.opening) < 0.1, closed, 1 - closed))
    assert parts["closures"] == pytest.approx(price.mean(), rel=1e-4)

    told = asked["told"]
    np.testing.assert_array_equal(told.audio, np.concatenate([batch.mel, batch.mel], axis=1)[None])
    np.testing.assert_array_equal(told.motion, np.concatenate([batch.motion, batch.motion], axis=1))
    for row in range(b):
        prompts = [int(frame >= row) for frame in range(f)] * 2  # in row r the caption changes at latent frame r
        np.testing.assert_array_equal(told.text[0, row], batch.tokens[row, prompts])
        np.testing.assert_array_equal(told.text_valid[row], batch.valid[row, prompts])
    np.testing.assert_array_equal(asked["chunk_ids"], chunk_ids)
    assert asked["copies"] == 2 and asked["window"] == 3
    distance = np.asarray(asked["reference_distance"])
    assert (distance >= 4).all() and (distance <= 30).all() and len(set(distance)) > 1


def learnable(batch, frames):
    """One clip's worth of structure, so that a small network learns in seconds; and the data that goes with it."""
    pattern = np.random.default_rng(1).normal(size=(6, 4, 4))
    latents = np.broadcast_to(1.5 * pattern, (frames, 6, 4, 4)).astype(np.float16)
    data = coded_constants(CONFIG) | {"reader": randomised(READER.abstract, 0)}
    return copied(data), copied(coded_batch(CONFIG, batch, frames, latents=latents, reference=latents[0]))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights in a file, with an output head of zeros as a fresh network has."""
    path = tmp_path_factory.mktemp("teacher") / "denoiser.safetensors"
    _, params = small_models(CONFIG)
    head = params.denoiser["dit"]["head"]
    head = head | {"projection": jax.tree.map(jnp.zeros_like, head["projection"])}
    safetensors_io.save(path, params.denoiser | {"dit": params.denoiser["dit"] | {"head": head}}, dtype=jnp.float32)
    return path


@pytest.mark.parametrize(
    "stage_module",
    [pytest.param(dit_pretrain, marks=pytest.mark.slow, id="pretrain"), pytest.param(dit_causal, id="causal")],
)
def test_a_stage_learns(stage_module, teacher, held_out):
    """Updates on one repeated picture: the error, |noise - clean|^2 at first, falls by more than a quarter."""
    objective = {"objective": "data"} if stage_module is dit_causal else {}
    optimiser = OptimiserConfig(learning_rate=5e-3, warmup_steps=2)
    quick = stage_module.Settings(updates=100, batch=4, latent_frames=6, optimiser=optimiser, **objective)
    stage = stage_module.build(CONFIG, 0, {"denoiser": teacher}, quick)
    update = jax.jit(stage.update)
    first = state = copied(stage.init())
    (data, batch), losses = learnable(4, 6), []
    for step in range(40):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batch)
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["loss"]))
    clean, weight = batch.latents[0, 0].astype(jnp.float32), held_out.weight[0, 0]
    assert losses[0] == pytest.approx(float(jnp.mean(weight * (1 + (clean**2).mean(-1)))), rel=0.05)
    assert update._cache_size() == 1
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), state.params, first.params)
    still = [name for name, value in safetensors_io.flatten(moved).items() if value == 0]
    text = {name for name in safetensors_io.flatten(moved) if name.startswith("text.")}
    assert set(still) == text, "the text encoder is kept, every other parameter takes part"


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Random weights in a file, the output head included: it answers every condition somehow."""
    path = tmp_path_factory.mktemp("student") / "denoiser.safetensors"
    safetensors_io.save(path, small_models(CONFIG)[1].denoiser, dtype=jnp.float32)
    return path


def test_guidance_by_hand(held_out, monkeypatch):
    """A network that answers 1, 10 more with words, 100 with a face and 1000 with sound; 1111 + 2 x 10 + 0.5 x 100 + 0.1 x 1000."""

    def velocity(config, model, params, batch, copies):
        words, face = (batch.valid > 1).all(axis=1), jnp.any(batch.reference != 0, axis=(1, 2, 3))
        answer = 1.0 + 10 * words + 100 * face + 1000 * batch.keep_audio
        return jnp.broadcast_to(answer[:, None, None, None, None], batch.latents.shape)

    monkeypatch.setattr(dit_guidance, "causal_velocity", velocity)
    wordless = dataclasses.replace(held_out, valid=held_out.valid.at[0].set(1))
    for text, audio, reference, expected in ((1.0, 1.0, 1.0, [1101, 1111]), (3.0, 1.1, 1.5, [1251, 1281])):
        scales = dit_guidance.Settings(text=text, audio=audio, reference=reference)
        guided = dit_guidance.guided_velocity(CONFIG, None, {}, wordless, None, scales)
        np.testing.assert_allclose(guided[:2, 0, 0, 0, 0], expected, rtol=1e-6, err_msg="a row without words is not guided by them")


def test_the_guidance_stage_learns(student):
    """At first the student pays for all that guidance adds; it learns it, and its guide stays as it was."""
    quick = dit_guidance.Settings(
        updates=100, batch=4, latent_frames=6, text=3.0, reference=2.0, optimiser=OptimiserConfig(learning_rate=2e-3, warmup_steps=2)
    )
    stage = dit_guidance.build(CONFIG, 0, {"denoiser": student}, quick)
    update = jax.jit(stage.update)
    state = copied(stage.init())
    first = jax.tree.map(np.asarray, state.params)
    data, batch = learnable(4, 6)
    data, losses = data | {"guide": copied(first)}, []
    for step in range(30):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, batch)
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.1 and np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5]) and update._cache_size() == 1
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, first)
    moved = safetensors_io.flatten(moved)
    assert moved["dit.head.projection.kernel"] > 0 == max(value for name, value in moved.items() if name.startswith("text."))


def test_a_guide_of_its_own(student, teacher, monkeypatch):
    """Without a `guide` the student is guided by what it starts from."""
    monkeypatch.setattr(dit_guidance, "clip_constants", lambda clips: {})
    for named, guide in (({}, student), ({"guide": teacher}, teacher)):
        stage = dit_guidance.build(CONFIG, 0, {"clips": None, "denoiser": student} | named, dit_guidance.Settings())
        for path, params in ((student, stage.init().params), (guide, stage.data()["guide"])):
            expected = safetensors_io.load(path)[0]["dit"]["head"]["projection"]["kernel"]
            np.testing.assert_array_equal(params["dit"]["head"]["projection"]["kernel"], expected)


@pytest.mark.parametrize("kind", ["identity", "expression", "closures"])
def test_what_the_reader_misreads_moves_the_weights(kind, teacher, monkeypatch):
    """Both stages descend on it: without the velocity's error, a reader of one kind alone moves the denoiser, a silent one does not."""
    numbers = np.concatenate([COLUMNS, ["closures"] * 4])  # the logits come after the mouth's readings
    columns = np.isin(numbers, list(EXPRESSION) if kind == "expression" else [kind])
    for module, errs, objective in ((dit_pretrain, dit_pretrain, {}), (dit_causal, two_copies, {"objective": "data"})):
        monkeypatch.setattr(errs, "weighted_velocity_loss", lambda *arguments: jnp.zeros(()))
        monkeypatch.setattr(module, "make_optimiser", lambda *arguments: optax.sgd(1.0))
        stage = module.build(CONFIG, 0, {"denoiser": teacher}, module.Settings(batch=4, **objective))
        update = jax.jit(stage.update)
        for heard, moves in ((columns, True), (np.zeros_like(columns), False)):
            (data, batch), state, first = learnable(4, 6), stage.init(), 0
            for reader in READERS:
                last = data["reader"][reader][len(data["reader"][reader]) - 1]
                stop = first + len(last["bias"])
                last["kernel"] = last["kernel"] * heard[first:stop]
                first = stop
            after, _ = update(copied(state), jax.random.key(0), data, batch)
            moved = np.abs(np.asarray(after.params["dit"]["head"]["projection"]["kernel"])).max()
            assert (moved > 1e-6) == moves, (module, moved)


def test_each_thing_misread_has_its_own_weight():
    parts = {"loss": 1.0, "identity": 10.0, "expression": 100.0, "closures": 1000.0}
    assert dit_causal.asked(parts, dit_causal.Settings(reading=0.3, likeness=0.2, closures=0.4)) == pytest.approx(1 + 0.2 * 10 + 0.3 * 100 + 0.4 * 1000)


def test_a_weight_of_closures_below_0_is_refused():
    for module in (dit_pretrain, dit_causal, latent_reader):
        assert module.Settings(closures=0.0).closures == 0
        with pytest.raises(ValueError, match="closures -0.1 must be 0 or more"):
            module.Settings(closures=-0.1)


def test_pre_training_without_encoders_is_refused():
    with pytest.raises(ValueError, match="needs audio and text: run audio_pretrain and text_pretrain first"):
        dit_pretrain.build(CONFIG, 0, {}, dit_pretrain.Settings())


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_a_quarter_of_the_rows_stands_at_pure_noise_however_few_they_are(rows):
    """Of 4,000 draws, in slices of any size; the others' timesteps are logit-normal, moved towards noise: sigmoid(0) = 1/2 becomes 3/4."""
    draw = jax.vmap(lambda key: dit_pretrain.timesteps(key, rows, dit_pretrain.Settings()))
    t = np.asarray(draw(jax.random.split(jax.random.key(0), 4_000 // rows))).ravel()
    assert (t == 1).mean() == pytest.approx(0.25, abs=0.025)
    assert np.median(t[t < 1]) == pytest.approx(0.75, abs=0.02) and t.min() > 0


def test_rows_at_pure_noise_show_nothing_of_the_clip(teacher, monkeypatch):
    asked = {}

    def velocity(model, params, batch, x, t, distance):
        asked.update(x=x, t=t, clean=batch.latents)
        return jnp.zeros_like(x)

    monkeypatch.setattr(dit_pretrain, "bidirectional_velocity", velocity)
    stage = dit_pretrain.build(CONFIG, 0, {"denoiser": teacher}, dit_pretrain.Settings())
    with jax.disable_jit():
        stage.update(copied(stage.init()), jax.random.key(0), *learnable(24, 3))
    t, x, clean = (np.asarray(asked[name]) for name in ("t", "x", "clean"))
    assert t.shape == (24, 3) and (t == t[:, :1]).all(), "one timestep per clip"
    pure = t[:, 0] == 1
    assert 0 < pure.sum() < 24
    assert abs(np.corrcoef(x[pure].ravel(), clean[pure].ravel())[0, 1]) < 0.1, "nothing of the clip is left in the noise"


@pytest.mark.parametrize(
    ("stage_module", "others", "part"),
    [(dit_pretrain, {}, dit_data.CROP), (dit_sft, {}, 1.0), (dit_causal, {"objective": "data"}, 1.0), (dit_guidance, {}, 1.0)],
    ids=["pretrain", "sft", "causal", "guidance"],
)
def test_only_the_pre_training_sees_parts_of_pictures(stage_module, others, part, teacher, monkeypatch):
    """Else nothing shows the DiT two tokens as far apart as the picture's first and last row are, or what it learned of them is forgotten."""
    seen = []

    def prepare(*given, crop=1.0, **named):
        seen.append(crop)
        return dit_data.prepare_batch(*given, crop=crop, **named)

    for module in (dit_pretrain, dit_causal, dit_guidance):
        monkeypatch.setattr(module, "prepare_batch", prepare)
    stage = stage_module.build(CONFIG, 0, {"denoiser": teacher}, stage_module.Settings(batch=4, latent_frames=3, **others))
    data, batch = learnable(4, 3)
    jax.eval_shape(stage.update, stage.init(), jax.random.key(0), data | {"guide": stage.init().params}, batch)
    assert seen == [part]


@pytest.mark.parametrize("schedule", ["sequential", "rolling"])
def test_the_form_reaches_every_schedule(schedule, teacher):
    """In bfloat16 no product of the scanned blocks is in float32; what `--precision` and `--layers` say is not passed over."""
    config = small_config(steps=2)
    form = Form("bfloat16", "scan", "full")
    settings = dit_causal.Settings(batch=2, latent_frames=8, objective="data", schedule=schedule, form=form)
    stage = dit_causal.build(config, 0, {"denoiser": teacher}, settings)
    program = jax.jit(stage.update).lower(jax.eval_shape(stage.init), jax.random.key(0), *learnable(2, 8)).as_text()
    blocks, width = config.dit.blocks, config.dit.mlp_dim
    assert re.search(rf"tensor<{blocks}x\d+x{width}xbf16>", program), "stacked for a scan, in the form's precision"


def test_what_the_conditions_are_worth(held_out):
    """A fresh head of zeros makes nothing of them; random weights hear the change of each; other clips' words come by rolling."""
    _, params = small_models(CONFIG)
    params = params.denoiser
    head = params["dit"]["head"]
    silent = params | {"dit": params["dit"] | {"head": head | {"projection": jax.tree.map(jnp.zeros_like, head["projection"])}}}
    for weights, differs in ((silent, False), (params, True)):
        data, batch = learnable(3, 3)
        result = conditions.measure(CONFIG, weights, data, {"train": batch, "held_out": batch})
        assert set(result) == {"train", "held_out"}
        for row in (row for rows in result.values() for row in rows.values()):
            assert all((value != row["all"]) == differs for name, value in row.items() if name != "all"), row
    changed = {name: change(held_out) for name, change in conditions.VARIANTS.items()}
    assert changed["no text"].valid.tolist() == [[1, 1]] * 5 and changed["other's text"].tokens[:, 0, 0].tolist() == [10, 10, 11, 12, 13]
    assert not changed["no audio"].keep_audio.any() and not changed["no reference"].reference.any()


def test_the_roll_out_is_the_stream(held_out):
    """A later chunk's sound changes that chunk and later ones alone."""
    models, params = small_models(CONFIG)
    batch = jax.tree.map(lambda leaf: leaf[:2], held_out)
    run = jax.jit(
        lambda params, batch: dit_causal.sample_causal(CONFIG, models.denoiser, params, batch, jax.random.key(1))
    )
    before = run(params.denoiser, batch)
    after = run(params.denoiser, dataclasses.replace(batch, mel=batch.mel.at[:, 3].add(1.0)))
    assert before.shape == (2, 6, 6, 4, 4) and np.std(before) > 0.1
    moved = np.abs(after - before).max(axis=(0, 2, 3, 4))
    assert (moved[:3] == 0).all() and (moved[3:] > 1e-4).all()
