"""The DiT's stages: what a batch holds, how sequences are cut into chunks, what the causal loss asks, and that both learn."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_corpus import small_corpus

from pikastream_jax.data.corpus import MEL_STEP
from pikastream_jax.measuring.estimator import COLUMNS, READERS
from pikastream_jax.text.tokenizer import COMMA
from pikastream_jax.training import conditions, dit_causal, dit_data, dit_guidance, dit_pretrain
from pikastream_jax.training.clips import Clips
from pikastream_jax.training.innovations import fit_innovations
from pikastream_jax.training.latent_reader import EXPRESSION, reader_model
from pikastream_jax.training.mesh import replicate
from pikastream_jax.training.optimiser import OptimiserConfig
from pikastream_jax.weights import safetensors_io
from tests.small import randomised, small_config, small_models

CONFIG = small_config(chunk=3, window=3)  # 6 x 4 latents of 8 pixels
LENGTH, COUNT = 12, 4
OUTPUTS = sum(reader.outputs for reader in READERS.values())
READER = reader_model(CONFIG)


def coded_data():
    """Clips that say which they are: latents 100 x clip + latent frame, prompt tokens 10 + clip."""
    corpus = small_corpus()
    clip, frame = np.arange(COUNT), np.arange(LENGTH)
    value = 100 * clip[:, None] + frame
    boxes = np.zeros((COUNT, LENGTH, 2, 4), np.float32)
    boxes[:, :, 0] = [9, 8, 17, 16]  # touches rows 1-2 (8 to 24 pixels) and column 1
    boxes[:, :, 1] = [0, 0, 7.5, 32]  # row 0
    truth = np.repeat(value[..., None] / 100, OUTPUTS, axis=-1).astype(np.float32)
    truth[..., COLUMNS == "blink"] = -0.5  # open eyes
    clips = Clips(
        latents=np.broadcast_to(value[..., None, None, None], (COUNT, LENGTH, 6, 4, 4)).astype(np.float16),
        reference=np.broadcast_to(1.0 + clip[:, None, None, None], (COUNT, 6, 4, 4)).astype(np.float16),
        boxes=boxes,
        truth=truth,
        speech_start=5 + clip,
        tokens=np.tile(10 + clip[:, None], (1, CONFIG.text.length)),
        valid=np.full(COUNT, 4),
    )
    clips = jax.tree.map(jnp.asarray, clips)
    sound = {"mel": jnp.asarray(corpus.mel), "tracks": jnp.asarray(corpus.tracks)}
    motion = {"innovations": fit_innovations(np.asarray(clips.truth))}
    return {"train": clips, "held_out": clips, "reader": randomised(READER.abstract, 0)} | sound | motion


def level(batch):
    """The quantised level of every mel frame: small_corpus writes the latent frame's number there. [b, f, m]"""
    return np.round((np.asarray(batch.mel)[..., 0] * 15 - 55 + 80) / MEL_STEP).astype(int)


def draw(batch, frames, train):
    split = "train" if train else "held_out"
    run = jax.jit(lambda data, key: dit_data.draw_batch(CONFIG, data, split, key, batch, frames, train=train))
    return run(coded_data(), jax.random.key(0))


@pytest.fixture(scope="module")
def held_out():
    return draw(5, 6, train=False)


def test_held_out_clips_come_in_order_from_their_start(held_out):
    batch = held_out
    assert batch.latents[:, :, 0, 0, 0].tolist() == [[100 * c + f for f in range(6)] for c in (0, 1, 2, 3, 0)]
    np.testing.assert_allclose(batch.truth[..., 0], batch.latents[..., 0, 0, 0] / 100, rtol=1e-6)
    assert batch.reference[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 1]
    assert batch.tokens[:, 0].tolist() == [10, 11, 12, 13, 10]
    assert batch.valid.tolist() == [4] * 5 and batch.keep_audio.all(), "nothing is dropped"
    # A slice is 16 mel frames here, exactly its latent frame's own.
    expected = np.array([[5 + c + f for f in range(6)] for c in (0, 1, 2, 3, 0)])
    assert (level(batch) == expected[..., None]).all()


def test_weights_by_hand(held_out):
    weight = held_out.weight[0, 1]
    raw = np.ones((6, 4))
    raw[1:3, 1] += 5.0  # mouth
    raw[0, :] += 1.5  # eyes
    np.testing.assert_allclose(weight, raw / raw.mean(), rtol=1e-5)


def test_training_windows_are_whole_stretches_with_their_own_sound(monkeypatch):
    monkeypatch.setattr(dit_data, "augment", lambda mel, key, config: mel)
    batch = draw(64, 5, train=True)
    first = np.asarray(batch.latents[:, 0, 0, 0, 0], int)
    clip, offset = first // 100, first % 100
    assert (np.asarray(batch.latents[..., 0, 0, 0], int) == first[:, None] + np.arange(5)).all()
    assert set(clip) == set(range(COUNT)) and set(offset) == set(range(LENGTH - 5 + 1))
    assert (level(batch) == (5 + clip + offset)[:, None, None] + np.arange(5)[None, :, None]).all()
    assert (np.asarray(batch.tokens[:, 0]) == 10 + clip).all()
    kept = np.asarray(batch.reference[:, 0, 0, 0]) != 0
    np.testing.assert_array_equal(np.asarray(batch.reference[:, 0, 0, 0])[kept], (1 + clip)[kept])


def test_the_sound_of_training_is_varied_row_by_row(held_out):
    varied = draw(8, 6, train=True)
    assert np.isfinite(varied.mel).all() and varied.mel.shape[2:] == held_out.mel.shape[2:]
    # Where nothing is varied, the bands of a mel frame and the mel frames of a latent frame are all alike.
    assert (np.std(held_out.mel, axis=(2, 3)) < 1e-5).all()
    assert len({round(float(row.mean()), 3) for row in np.asarray(varied.mel)}) == 8
    assert np.std(varied.mel, axis=(2, 3)).max() > 0.1


def test_a_tenth_of_the_rows_loses_each_condition_on_its_own():
    draw_flags = jax.jit(
        lambda data, key: dataclasses.replace(
            dit_data.draw_batch(CONFIG, data, "train", key, 3000, 1), mel=jnp.zeros(()), latents=jnp.zeros(())
        )
    )
    batch = draw_flags(coded_data(), jax.random.key(3))
    no_face = np.asarray(batch.reference == 0).all(axis=(1, 2, 3))
    no_prompt, no_sound = np.asarray(batch.valid) == 1, ~np.asarray(batch.keep_audio)
    for dropped in (no_face, no_prompt, no_sound):
        assert dropped.mean() == pytest.approx(0.1, abs=0.02)
    for one, other in ((no_face, no_prompt), (no_prompt, no_sound), (no_face, no_sound)):
        assert (one & other).mean() == pytest.approx(0.01, abs=0.006)
    assert (np.asarray(batch.valid)[~no_prompt] == 4).all()


def test_captions_are_cut_at_commas():
    """Three in ten end before one of their commas, each as often; the comma after the caption's end counts for nothing."""
    tokens = jnp.asarray([[1, 50, COMMA, 51, COMMA, 52, 0, COMMA]] * 4000 + [[1, 50, 51, 52, 53, 54, 55, 56]] * 10)
    valid = jnp.asarray([6] * 4000 + [8] * 10)
    left = np.asarray(dit_data._cut_captions(jax.random.key(0), tokens, valid))
    assert (left[4000:] == 8).all()
    shares = [(left[:4000] == end).mean() for end in (2, 4, 6)]
    np.testing.assert_allclose(shares, [0.15, 0.15, 0.7], atol=0.03)
    assert set(left[:4000]) == {2, 4, 6}


def test_motions_that_clips_do_not_tell_of_are_refused():
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, motion=5))
    with pytest.raises(ValueError, match="dit.motion 5: clips tell of 6"):
        dit_data.draw_batch(config, coded_data(), "train", jax.random.key(0), 2, 3)


def test_a_crop_is_the_same_part_of_video_reference_and_weight():
    place = np.stack(np.meshgrid(np.arange(6.0), np.arange(4.0), indexing="ij"), axis=-1).astype(np.float16)  # [6, 4, (row, column)]
    data = coded_data()
    latents = jnp.asarray(np.broadcast_to(np.tile(place, 2), (COUNT, LENGTH, 6, 4, 4)))
    data["train"] = dataclasses.replace(data["train"], latents=latents, reference=100 + latents[:, 0])
    run = jax.jit(lambda data, key, crop: dit_data.draw_batch(CONFIG, data, "train", key, 64, 2, crop=crop), static_argnums=2)
    batch, whole = run(data, jax.random.key(0), 0.5), run(data, jax.random.key(0), 1.0)
    # Half of 3 x 2 tokens, rounded up, is 2 x 1 tokens: 4 x 2 latents, from one of 2 x 2 corners.
    assert batch.latents.shape == (64, 2, 4, 2, 4) and batch.weight.shape == (64, 2, 4, 2)
    corner = np.asarray(batch.latents[:, 0, 0, 0, :2], int)
    assert {tuple(c) for c in corner} == {(0, 0), (0, 2), (2, 0), (2, 2)}
    for row, (y, x) in enumerate(corner):
        np.testing.assert_array_equal(batch.latents[row], whole.latents[row, :, y : y + 4, x : x + 2])
        np.testing.assert_array_equal(batch.reference[row], whole.reference[row, y : y + 4, x : x + 2])
        part = whole.weight[row, :, y : y + 4, x : x + 2]
        np.testing.assert_allclose(batch.weight[row], part / part.mean(axis=(1, 2), keepdims=True), rtol=1e-5)
        # The boxes stay on the same pixels: their first corner, seen from the part's own.
        np.testing.assert_allclose(batch.boxes[row, 0, 0, :2], [9 - 8 * y, 8 - 8 * x])
        np.testing.assert_allclose(batch.boxes[row, 0, 1, 2:], [7.5 - 8 * y, 32 - 8 * x])
    np.testing.assert_array_equal(batch.mel, whole.mel)
    np.testing.assert_array_equal(batch.truth, whole.truth)


def test_random_chunks():
    """Whole chunks of one size per sequence: the largest in 2/3 + 1/3 x 1/3 of them, else any."""
    ids = np.asarray(dit_causal.random_chunks(jax.random.key(0), 3000, 9, 3))
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
        audio: jax.Array
        motion: jax.Array

    class Silent:
        """Takes the place of the denoiser, records what it is given, answers zero."""

        dit = property(lambda self: self)

        def text_conditions(self, tokens, valid):
            return "text", valid

        def conditions(self, text, valid, mel, motion, keep_audio):
            return Heard(mel[None], motion)

        def reference_keys_values(self, reference):
            return reference

        def forward_sequence(self, latents, t, conditions, reference, **rest):
            asked.update(rest, latents=np.asarray(latents), t=np.asarray(t), audio=conditions.audio, motion=conditions.motion)
            return jnp.zeros_like(latents)

    rng = np.random.default_rng(0)
    b, f = 8, 9
    batch = dit_data.DiTBatch(
        latents=jnp.asarray(rng.normal(size=(b, f, 6, 4, 4)), jnp.float32),
        reference=jnp.zeros((b, 6, 4, 4)),
        mel=jnp.asarray(rng.normal(size=(b, f, 2, 2)), jnp.float32),
        tokens=jnp.zeros((b, 6), jnp.int32),
        valid=jnp.ones(b, jnp.int32),
        keep_audio=jnp.ones(b, bool),
        weight=jnp.asarray(rng.uniform(0.5, 2, (b, f, 6, 4)), jnp.float32),
        boxes=jnp.zeros((b, f, 2, 4)),
        truth=jnp.zeros((b, f, OUTPUTS)),
        motion=jnp.asarray(rng.normal(size=(b, f, 6)), jnp.float32),
    )

    def mean_of_latents(latents, boxes, truth):
        """A reader whose every number is the mean of the latent frame."""
        return jnp.broadcast_to(latents.mean(axis=(2, 3, 4))[..., None], (b, f, OUTPUTS))

    config = small_config(chunk=3, window=3, steps=4, shift=2.0)
    chunk_ids = jnp.arange(f)[None] // jnp.array([[3], [2]] * 4)
    model = types.SimpleNamespace(bind=lambda params: Silent())
    parts = dit_causal.causal_losses(config, model, {}, batch, jax.random.key(0), chunk_ids, mean_of_latents)

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

    np.testing.assert_array_equal(asked["audio"], np.concatenate([batch.mel, batch.mel], axis=1)[None])
    np.testing.assert_array_equal(asked["motion"], np.concatenate([batch.motion, batch.motion], axis=1))
    np.testing.assert_array_equal(asked["chunk_ids"], chunk_ids)
    assert asked["copies"] == 2 and asked["window"] == 3
    distance = np.asarray(asked["reference_distance"])
    assert (distance >= 4).all() and (distance <= 30).all() and len(set(distance)) > 1


def learnable_data():
    """One clip's worth of structure, so that a small network learns in seconds."""
    data = coded_data()
    pattern = np.random.default_rng(1).normal(size=(1, 1, 6, 4, 4))
    latents = jnp.asarray(np.broadcast_to(1.5 * pattern, (COUNT, LENGTH, 6, 4, 4)), jnp.float16)
    clips = dataclasses.replace(data["train"], latents=latents, reference=latents[:, 0])
    return data | {"train": clips, "held_out": clips}


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
    quick = stage_module.Settings(updates=100, batch=4, latent_frames=6, optimiser=OptimiserConfig(learning_rate=5e-3, warmup_steps=2))
    stage = stage_module.build(CONFIG, 0, {"denoiser": teacher}, quick)
    update = jax.jit(stage.update)
    first = state = replicate(stage.init())
    data, losses = replicate(learnable_data()), []
    for step in range(40):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, {})
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["loss"]))
    clean, weight = data["train"].latents[0, 0].astype(jnp.float32), held_out.weight[0, 0]
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
        words, face = batch.valid > 1, jnp.any(batch.reference != 0, axis=(1, 2, 3))
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
    state = replicate(stage.init())
    first = jax.tree.map(np.asarray, state.params)
    data, losses = replicate(learnable_data() | {"guide": first}), []
    for step in range(30):
        state, metrics = update(state, jax.random.fold_in(jax.random.key(0), step), data, {})
        state = dataclasses.replace(state, step=state.step + 1)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 0.1 and np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5]) and update._cache_size() == 1
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), state.params, first)
    moved = safetensors_io.flatten(moved)
    assert moved["dit.head.projection.kernel"] > 0 == max(value for name, value in moved.items() if name.startswith("text."))


def test_a_guide_of_its_own(student, teacher, monkeypatch):
    """Without a `guide` the student is guided by what it starts from."""
    monkeypatch.setattr(dit_guidance, "load_data", lambda clips: {})
    for named, guide in (({}, student), ({"guide": teacher}, teacher)):
        stage = dit_guidance.build(CONFIG, 0, {"clips": None, "denoiser": student} | named, dit_guidance.Settings())
        for path, params in ((student, stage.init().params), (guide, stage.data()["guide"])):
            expected = safetensors_io.load(path)[0]["dit"]["head"]["projection"]["kernel"]
            np.testing.assert_array_equal(params["dit"]["head"]["projection"]["kernel"], expected)


@pytest.mark.parametrize("kind", ["identity", "expression"])
def test_what_the_reader_misreads_moves_the_weights(kind, teacher, monkeypatch):
    """Both stages descend on it: without the velocity's error, a reader of one kind alone moves the denoiser, a silent one does not."""
    columns = COLUMNS == "identity" if kind == "identity" else np.isin(COLUMNS, list(EXPRESSION))
    for module in (dit_pretrain, dit_causal):
        monkeypatch.setattr(module, "weighted_velocity_loss", lambda *arguments: jnp.zeros(()))
        monkeypatch.setattr(module, "make_optimiser", lambda *arguments: optax.sgd(1.0))
        stage = module.build(CONFIG, 0, {"denoiser": teacher}, module.Settings())
        update = jax.jit(stage.update)
        for heard, moves in ((columns, True), (np.zeros_like(columns), False)):
            data, state, first = learnable_data(), stage.init(), 0
            for reader in READERS:
                stop = first + READERS[reader].outputs
                last = data["reader"][reader][len(data["reader"][reader]) - 1]
                last["kernel"] = last["kernel"] * heard[first:stop]
                first = stop
            after, _ = update(replicate(state), jax.random.key(0), replicate(data), {})
            moved = np.abs(np.asarray(after.params["dit"]["head"]["projection"]["kernel"])).max()
            assert (moved > 1e-6) == moves, (module, moved)


def test_pre_training_without_a_text_encoder_is_refused():
    with pytest.raises(ValueError, match="needs --init text=PATH"):
        dit_pretrain.build(CONFIG, 0, {}, dit_pretrain.Settings())


def test_a_quarter_of_the_pre_training_stands_at_pure_noise(teacher, monkeypatch):
    """There the conditions alone say what to draw; the other rows' timesteps are logit-normal, moved towards noise."""
    asked = {}

    def velocity(model, params, batch, x, t, distance):
        asked.update(x=x, t=t, clean=batch.latents)
        return jnp.zeros_like(x)

    monkeypatch.setattr(dit_pretrain, "bidirectional_velocity", velocity)
    stage = dit_pretrain.build(CONFIG, 0, {"denoiser": teacher}, dit_pretrain.Settings())
    with jax.disable_jit():
        stage.update(replicate(stage.init()), jax.random.key(0), replicate(learnable_data()), {})
    t, x, clean = (np.asarray(asked[name]) for name in ("t", "x", "clean"))
    assert t.shape == (24, 3) and (t == t[:, :1]).all(), "one timestep per clip"
    pure = t[:, 0] == 1
    assert pure.sum() == 6
    assert 0.5 < np.median(t[~pure]) < 0.9 and (t[~pure] > 0).all() and (t[~pure] < 1).all()
    assert abs(np.corrcoef(x[pure].ravel(), clean[pure].ravel())[0, 1]) < 0.1, "nothing of the clip is left in the noise"


def test_what_the_conditions_are_worth(held_out):
    """A fresh head of zeros makes nothing of them; random weights hear the change of each; other clips' words come by rolling."""
    _, params = small_models(CONFIG)
    params = params.denoiser
    head = params["dit"]["head"]
    silent = params | {"dit": params["dit"] | {"head": head | {"projection": jax.tree.map(jnp.zeros_like, head["projection"])}}}
    for weights, differs in ((silent, False), (params, True)):
        result = conditions.measure(CONFIG, weights, learnable_data(), batch=3)
        assert set(result) == {"train", "held_out"}
        for row in (row for rows in result.values() for row in rows.values()):
            assert all((value != row["all"]) == differs for name, value in row.items() if name != "all"), row
    changed = {name: change(held_out) for name, change in conditions.VARIANTS.items()}
    assert changed["no text"].valid.tolist() == [1] * 5 and changed["other's text"].tokens[:, 0].tolist() == [10, 10, 11, 12, 13]
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
