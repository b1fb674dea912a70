"""Several streams in one step: each is, bit for bit, what it is alone in the same program."""

import numpy as np
import pytest

from pikastream_jax.live.model import StreamModel
from pikastream_jax.streaming.generator import Generator
from pikastream_jax.streaming.package import Package
from pikastream_jax.streaming.rows import RowStepper
from pikastream_jax.text import Tokenizer
from tests.small import small_config, small_models


@pytest.fixture(scope="module")
def generator():
    config = small_config()
    words = Tokenizer.learn(["a person smiling"], config.text.vocabulary, config.text.length)
    return Generator(Package(*small_models(config), words, {}))


def starts(generator, seeds):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (generator.height, generator.width, 3), np.uint8) for _ in seeds]
    return [generator.start(generator.encode_reference(image), generator.encode_prompt("a person" + " smiling" * seed), seed) for image, seed in zip(images, seeds, strict=True)]


def sound(generator, seed, chunk):
    return np.random.default_rng([seed, chunk]).normal(size=generator.chunk_samples(chunk)).astype(np.float32) * 0.1


def test_streams_do_not_know_of_each_other(generator):
    stepper = RowStepper(generator, 3)
    together, frames = starts(generator, (0, 1)), {0: [], 1: []}
    for chunk in range(4):
        together, made = stepper.step([(state, chunk, sound(generator, seed, chunk)) for seed, state in enumerate(together)])
        for seed in (0, 1):
            frames[seed].append(np.asarray(made[seed]))
    alone = starts(generator, (0, 1))
    for chunk in range(4):
        for seed in (1, 0):
            (alone[seed],), made = stepper.step([(alone[seed], chunk, sound(generator, seed, chunk))])
            np.testing.assert_array_equal(np.asarray(made[0]), frames[seed][chunk])
    assert not np.array_equal(frames[0][-1], frames[1][-1])
    assert stepper.compiled_steps() == 1


def test_a_late_comer_joins_at_its_own_chunk(generator):
    stepper = RowStepper(generator, 2)
    first, second = starts(generator, (0, 1))
    alone = []
    for chunk in range(2):
        (second,), made = stepper.step([(second, chunk, sound(generator, 1, chunk))])
        alone.append(np.asarray(made[0]))
    second = starts(generator, (0, 1))[1]
    for chunk in range(4):
        streams = [(first, chunk, sound(generator, 0, chunk))]
        if chunk >= 2:
            streams.append((second, chunk - 2, sound(generator, 1, chunk - 2)))
        states, made = stepper.step(streams)
        first = states[0]
        if chunk >= 2:
            second = states[1]
            np.testing.assert_array_equal(np.asarray(made[1]), alone[chunk - 2])


def test_what_does_not_fit_is_refused(generator):
    with pytest.raises(ValueError, match="0 rows holds no stream"):
        RowStepper(generator, 0)
    stepper = RowStepper(generator, 1)
    with pytest.raises(ValueError, match="0 streams do not fit a step of 1 rows"):
        stepper.step([])
    state = starts(generator, (0,))[0]
    with pytest.raises(ValueError, match="chunk 0 takes"):
        stepper.step([(state, 0, np.zeros(3, np.float32))])


def test_a_live_stream_is_the_one_that_goes_to_a_file(generator):
    """`serve.py --audio` and `--listen` differ in when chunks are made, not in what they are."""
    image = np.random.default_rng(0).integers(0, 255, (generator.height, generator.width, 3), np.uint8)
    session, model = generator.session(image, "a person smiling", 3), StreamModel(generator)
    state = model.start(image, "a person smiling", 3)
    for chunk in range(4):
        (state,), frames = model.step([(state, chunk, sound(generator, 7, chunk))])
        np.testing.assert_array_equal(frames[0], np.asarray(session.step(sound(generator, 7, chunk))))
