"""Captions say what the style does."""

import re

import jax
import numpy as np
import pytest

from pikastream_jax.data import captions, face

ATTRIBUTES = captions.ATTRIBUTES


def test_attributes_and_styles_are_inverse():
    for name, values in ATTRIBUTES.items():
        for value in values:
            style = captions.style_from_caption_attributes({name: value}, jax.random.key(0))
            assert captions.attributes_of(style)[name] == value


def test_open_attributes_are_drawn_at_random():
    styles = [captions.style_from_caption_attributes({"gaze": "left"}, jax.random.key(n)) for n in range(40)]
    emotions = {captions.attributes_of(style)["emotion"] for style in styles}
    assert len(emotions) >= 4
    assert {float(style.gaze_x) for style in styles} == {float(np.float32(-0.8))}


def test_caption_batch_is_deterministic_and_varied():
    words, styles = captions.caption_batch(5, 200)
    again, _ = captions.caption_batch(5, 200)
    assert words == again and len(words) == 200 and styles.happy.shape == (200,)
    assert len(set(words)) > 190
    assert all(text.strip() and "{" not in text for text in words)


@pytest.mark.parametrize(
    "name, value, tell",
    [
        ("gaze", "left", ("left",)), ("gaze", "up", ("up", "ceiling", "raised")), ("gesture", "nod", ("nod", "nods")),
        ("emotion", "happy", ("smil", "happy", "cheerful", "beam", "delight", "grin", "joy")),
        ("tilt", "right", ("right",)),
    ],
)  # fmt: skip
def test_wording_names_the_value(name, value, tell):
    rng = np.random.default_rng(0)
    for _ in range(60):
        text = captions.caption(rng, {name: value}, keep=1.0).lower()
        assert any(word in text for word in tell), text


def test_captions_never_contradict_the_style():
    words, styles = captions.caption_batch(11, 300)
    host = jax.device_get(styles)
    for row, text in enumerate(words):
        text = text.lower()
        if "looking left" in text or "looking to the left" in text:
            assert host.gaze_x[row] < -0.3
        if "nodding" in text and "without nodding" not in text:
            assert host.nod[row] > 0.3
        if "smiling" in text and "not smiling" not in text:
            assert host.happy[row] > 0.2
        if "head tilted right" in text or "head tilted to the right" in text:
            assert host.tilt[row] > 0.3


def test_every_attribute_has_at_least_25_wordings():
    seen = {name: set() for name in ATTRIBUTES}
    rng = np.random.default_rng(1)
    for name, values in ATTRIBUTES.items():
        for value in values:
            seen[name] |= {captions.caption(rng, {name: value}, keep=1.0) for _ in range(60)}
    assert all(len(texts) >= 25 for texts in seen.values())


def test_captions_name_the_person():
    people = jax.jit(jax.vmap(face.sample_identity))(jax.random.split(jax.random.key(0), 60))
    words, _ = captions.caption_batch(2, 60, people)
    men = [w.lower() for w, p in zip(words, np.asarray(people.presentation), strict=True) if p == 1]
    women = [w.lower() for w, p in zip(words, np.asarray(people.presentation), strict=True) if p == 0]
    assert any(" man" in text or "guy" in text for text in men)
    assert not any("woman" in text or "lady" in text for text in men)
    assert any("woman" in text or "lady" in text for text in women)


def test_canonical_prompts_are_complete():
    covered = {(name, value) for fixed in captions.CANONICAL.values() for name, value in fixed.items()}
    for name in ("emotion", "gaze"):
        assert {value for n, value in covered if n == name} == set(ATTRIBUTES[name])
    for fixed in captions.CANONICAL.values():
        assert captions.caption(np.random.default_rng(0), fixed)


def test_unknown_words_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="attribute 'mood' is unknown"):
        captions.caption(rng, {"mood": "happy"})
    with pytest.raises(ValueError, match="gaze='sideways' is unknown"):
        captions.style_from_caption_attributes({"gaze": "sideways"}, jax.random.key(0))
    with pytest.raises(ValueError, match="presentation='dog' is unknown"):
        captions.caption(rng, {}, "dog")
    with pytest.raises(ValueError, match="n=0"):
        captions.caption_batch(0, 0)


def test_phrases_hold_every_word_of_every_caption():
    words, _ = captions.caption_batch(3, 500)
    known = set(re.findall("[a-z]+", " ".join(captions.phrases()).lower()))
    assert set(re.findall("[a-z]+", " ".join(words).lower())) <= known


def test_a_caption_is_what_is_mentioned_put_into_words():
    """The same choices by the same numbers, so a caption can be told from what it leaves out."""
    attributes = {"emotion": "happy", "gaze": "left", "gesture": "none", "tilt": "right"}
    for seed in range(40):
        said = captions.mentioned(np.random.default_rng(seed), attributes)
        assert said and said.items() <= attributes.items()
        rng = np.random.default_rng(seed)
        assert captions.caption(np.random.default_rng(seed), attributes) == captions.worded(rng, captions.mentioned(rng, attributes))
    orders = {tuple(captions.mentioned(np.random.default_rng(seed), attributes, keep=1.0)) for seed in range(40)}
    assert len(orders) > 5


def test_completeness_by_hand():
    attributes = {"emotion": "happy", "gaze": "left", "gesture": "none", "tilt": "right", "energy": "some"}
    said = {name: attributes[name] for name in ("gaze", "gesture")}
    assert captions.completeness(attributes, said) == pytest.approx(1 / 3), "emotion, gaze and tilt need words"
    assert captions.completeness(attributes, attributes) == 1.0
    assert captions.completeness({"gesture": "none"}, {}) == 1.0, "there is nothing to say"
