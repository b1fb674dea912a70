"""Sessions: plain NumPy in and out, one program for all of them, an exact clock, errors with the number that is wrong."""

import functools
import subprocess
import sys
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from PIL import Image

import configs
from pikastream_jax.audio.slices import max_chunk_samples
from pikastream_jax.serving.command import main
from pikastream_jax.streaming.generator import load_generator
from pikastream_jax.streaming.package import save_package
from pikastream_jax.streaming.state import StepInputs, init_state
from pikastream_jax.text import Tokenizer
from tests.small import small_config, small_models

CHUNKS = 6  # the window of two chunks fills and evicts
CONFIG = small_config(fps=24)  # chunks of 5,333 1/3 samples, so that their lengths differ
TOKENIZER = Tokenizer(("smiling", "woman"), CONFIG.text.length)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the small preset from a file, as serving does, run as the fields say."""
    path = tmp_path_factory.mktemp("generator") / "small.safetensors"
    _, params = small_models(CONFIG)
    save_package(path, CONFIG, params, TOKENIZER, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.PRESETS, "small", lambda: CONFIG)
        yield functools.partial(load_generator, path)


@pytest.fixture(scope="module")
def generator(load):
    return load()


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (48, 32, 3), np.uint8)


def sound(generator, chunk, seed=0):
    samples = generator.chunk_samples(chunk)
    return (0.1 * np.random.default_rng([seed, chunk]).normal(size=samples)).astype(np.float32)


def play(generator, session, chunks):
    return np.concatenate([session.step(sound(generator, chunk)) for chunk in range(chunks)])


def test_one_program_from_loading_to_a_full_window(generator):
    assert generator.compiled_steps() == 1, "load_generator compiles the step before the first sound"
    for prompt in ("a smiling woman", ""):
        video = play(generator, generator.session(picture(), prompt, seed=1), CHUNKS)
        assert video.shape == (CHUNKS * 8, 48, 32, 3) and video.dtype == np.uint8
        assert video.std() > 0.1 * 127
    assert generator.compiled_steps() == 1


def test_the_seed_decides_what_sound_and_prompt_leave_open(generator):
    first, again, other = (play(generator, generator.session(picture(), "smiling", seed), 2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_face_prompt_and_sound_all_reach_the_pixels(generator):
    base = play(generator, generator.session(picture(), "smiling", 0), 1)
    assert (play(generator, generator.session(picture(1), "smiling", 0), 1) != base).any()
    assert (play(generator, generator.session(picture(), "woman", 0), 1) != base).any()
    assert (generator.session(picture(), "smiling", 0).step(sound(generator, 0, seed=1)) != base).any()


def test_sessions_share_nothing(generator):
    alone = play(generator, generator.session(picture(), "smiling", 0), 3)
    session, neighbour = generator.session(picture(), "smiling", 0), generator.session(picture(1), "woman", 9)
    frames = []
    for chunk in range(3):
        neighbour.step(sound(generator, chunk, seed=5))
        frames.append(session.step(sound(generator, chunk)))
    np.testing.assert_array_equal(np.concatenate(frames), alone)


def test_a_rolling_stream_gives_its_frames_late_and_none_is_lost(load):
    rolling = load(schedule="rolling", steps=3)
    session = rolling.session(picture(), "smiling", 0)
    early = [np.asarray(session.step(sound(rolling, chunk))) for chunk in range(CHUNKS)]
    assert [len(frames) for frames in early] == [0, 0] + [8] * (CHUNKS - 2)
    rest = np.concatenate(list(session.finish()))
    assert rest.shape == (16, 48, 32, 3) and rest.dtype == np.uint8 and rest.std() > 0.1 * 127
    # The same stream with silence after it, pushed by hand.
    session = rolling.session(picture(), "smiling", 0)
    silence = [np.zeros(rolling.chunk_samples(CHUNKS + i), np.float32) for i in range(2)]
    by_hand = [np.asarray(session.step(audio)) for audio in [*(sound(rolling, chunk) for chunk in range(CHUNKS)), *silence]]
    np.testing.assert_array_equal(np.concatenate(by_hand), np.concatenate([*early, rest]))
    short = rolling.session(picture(), "smiling", 0)
    assert len(short.step(sound(rolling, 0))) == 0 and [len(frames) for frames in short.finish()] == [8], "a stream shorter than the delay is not lost either"


def test_a_reference_and_a_prompt_may_begin_many_streams(generator):
    reference = generator.encode_reference(picture())
    prompt = generator.encode_prompt("smiling")
    first, second = (generator.start(reference, prompt, seed) for seed in (1, 1))
    audio = np.zeros((1, max_chunk_samples(CONFIG)), np.float32)
    inputs = StepInputs(jnp.asarray(audio), jnp.asarray([[2667, 2666]], jnp.int32))
    _, frames = generator.run_step(first, inputs)
    np.testing.assert_array_equal(frames, generator.run_step(second, inputs)[1])


def test_a_sequential_stream_has_nothing_left(generator):
    session = generator.session(picture(), "smiling", 0)
    assert len(session.step(sound(generator, 0))) == 8 and list(session.finish()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"chunk": 3}, "window 4 must be a positive multiple of chunk 3"), ({"precision": "fp4"}, "precision 'fp4' is not one of")],
)
def test_how_it_streams_is_checked(load, fields, message):
    with pytest.raises(ValueError, match=message):
        load(**fields)


@pytest.mark.parametrize("shape", [(32, 48, 3), (48, 32), (48, 32, 4), (256, 256, 3)])
def test_a_picture_of_another_size_is_named(generator, shape):
    with pytest.raises(ValueError, match=rf"shape \({shape[0]}, {shape[1]}.*takes \(48, 32, 3\): resize it first"):
        generator.session(np.zeros(shape, np.uint8), "", 0)


def test_a_model_that_is_not_square_is_served_in_its_own_shape(generator, tmp_path):
    assert (generator.height, generator.width) == (48, 32)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), np.uint8)).save(tmp_path / "face.png")
    soundfile.write(tmp_path / "speech.wav", sound(generator, 0), 16_000)
    files = ["--audio", tmp_path / "speech.wav", "--image", tmp_path / "face.png", "--output", tmp_path / "out.mp4"]
    assert main([str(word) for word in files], lambda weights=None: generator) == 0
    with av.open(str(tmp_path / "out.mp4")) as video:
        assert {(frame.height, frame.width) for frame in video.decode(video=0)} == {(48, 32)}


def test_a_wrong_number_of_samples_is_named_and_changes_nothing(generator):
    session = generator.session(picture(), "", 0)
    for samples in (0, 5332, 5334):
        with pytest.raises(ValueError, match=f"chunk 0 takes 5333 samples, got {samples}"):
            session.step(np.zeros(samples, np.float32))
    np.testing.assert_array_equal(
        session.step(sound(generator, 0)), generator.session(picture(), "", 0).step(sound(generator, 0))
    )


def test_the_clock_of_film(generator):
    """At 24 FPS the counts alternate and sum to the exact time; a session wants the count of its own chunk."""
    assert [generator.chunk_samples(chunk) for chunk in range(4)] == [5333, 5334, 5333, 5333]
    assert sum(generator.chunk_samples(chunk) for chunk in range(3 * 60 * 60)) == 60 * 60 * 16_000
    session = generator.session(picture(), "", 0)
    session.step(sound(generator, 0))
    with pytest.raises(ValueError, match="chunk 1 takes 5334 samples, got 5333"):
        session.step(np.zeros(5333, np.float32))


def test_reconstruction_is_the_autoencoder_and_its_figure(generator):
    video = np.random.default_rng(3).integers(0, 256, (12, 48, 32, 3), np.uint8)
    out = generator.reconstruct(video)
    models, params = generator.models, generator.params
    vae = models.flash_vae.bind(params.flash_vae)
    clip = jax.jit(lambda x: vae.decode(vae.encode(x)[0]))(video[None].astype(np.float32) / 127.5 - 1)
    expected = np.round((np.clip(clip[0], -1, 1) + 1) * 127.5)
    assert out.dtype == np.uint8 and np.abs(out.astype(float) - expected).max() <= 1

    still = np.repeat(picture()[None], 4, axis=0)
    error = np.mean((generator.reconstruct(still).astype(float) - still) ** 2)
    figure = generator.session(picture(), "", 0).reconstruction_psnr
    assert figure == pytest.approx(10 * np.log10(255**2 / error), abs=0.05)


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_products_have_the_precision_that_was_asked_for(load, precision):
    """In the lowered programs of the stream and of `reconstruct`: float32 factors only in the sound's filter bank, and where e4m3 is emulated."""
    generator = load(precision=precision)
    config = generator.config
    inputs = StepInputs(jnp.zeros((1, max_chunk_samples(config))), jnp.zeros((1, 2), jnp.int32))
    step = generator._step.lower(generator.params, init_state(config, 1), inputs).as_text()
    video = generator._reconstruct.lower(generator.params, jnp.zeros((4, 48, 32, 3), jnp.uint8)).as_text()
    for program, allowed in ((step, 1), (video, 0)):
        products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
        single = [line for line in products if "bf16" not in line.split(" : ")[-1].split("->")[0]]
        emulated = [line for line in single if precision == "float8" and "tensor<1x2x6x" in line]
        assert len(products) > 10 and len(single) - len(emulated) <= allowed, single


def test_streaming_imports_no_training_data():
    code = (
        "import sys, pikastream_jax.streaming.generator\n"
        "parts = ('pikastream_jax.data', 'pikastream_jax.training', 'pikastream_jax.serving', 'matplotlib', 'grain', 'av')\n"
        "print([name for name in sys.modules if name.startswith(parts)])"
    )
    root = Path(__file__).parent.parent.parent
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
