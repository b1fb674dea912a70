"""Motion follows its style and its speech."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data import motion
from pikastream_jax.data.captions import style_from_caption_attributes

FPS, FRAMES, CLIPS = 25, 500, 16
KEYS = jax.random.split(jax.random.key(3), CLIPS)
run = jax.jit(jax.vmap(partial(motion.style_motion, fps=FPS), in_axes=(0, 0, None)))


def silence(frames):
    """The speech track of ``frames`` silent frames."""
    zero = jnp.zeros(frames, jnp.float32)
    return motion.SpeechTrack(zero, zero, zero, zero, zero)


def moved(speech=None, **attributes):
    """Clips with the given attributes and everything else drawn at random."""
    styles = jax.vmap(partial(style_from_caption_attributes, attributes))(KEYS)
    return run(KEYS, styles, silence(FRAMES) if speech is None else speech)


@pytest.fixture(scope="module")
def speech() -> motion.SpeechTrack:
    """Two seconds of speech with excited peaks, two of silence, and so on."""
    t = np.arange(FRAMES) / FPS
    voice = (t % 4 < 2).astype(np.float32)
    excited = voice * (np.sin(2 * np.pi * 0.75 * t) > 0.6)
    opening = voice * np.abs(np.sin(2 * np.pi * 3 * t))
    values = (opening, np.sin(t), voice * 0.2, voice, excited)
    return motion.SpeechTrack(*(jnp.asarray(value, jnp.float32) for value in values))


def test_shapes_ranges_and_determinism(speech):
    state = moved(speech)
    limits = dict(yaw=0.35, pitch=0.25, roll=0.2, shift_x=0.06, shift_y=0.06)
    for field in fields(state):
        value = np.asarray(getattr(state, field.name))
        assert value.shape == (CLIPS, FRAMES) and value.dtype == np.float32
        assert np.abs(value).max() <= limits.get(field.name, 1.0)
    assert min(state.blink.min(), state.brow_furrow.min()) >= 0
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(moved(speech)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(state.yaw[0] - state.yaw[1]).max() > 0.01


def test_mouth_is_the_speech_tracks_own(speech):
    state = moved(speech, emotion="happy")
    for name in ("mouth_open", "mouth_width", "tongue"):
        np.testing.assert_array_equal(getattr(state, name), np.tile(getattr(speech, name), (CLIPS, 1)))


def test_blinks_close_the_eyes_every_few_seconds():
    blink = np.asarray(moved().blink)
    onsets = ((blink[:, 1:] > 0.5) & (blink[:, :-1] <= 0.5)).sum(1)
    seconds = FRAMES / FPS
    assert (onsets >= seconds / 5 - 2).all() and (onsets <= seconds / 2 + 1).all()
    assert 0.02 < (blink > 0.5).mean() < 0.08
    assert (blink.max(1) > 0.8).all()


@pytest.mark.parametrize(
    "attribute, value, name, sign",
    [
        ("emotion", "happy", "smile", 1), ("emotion", "sad", "smile", -1), ("emotion", "angry", "brow_furrow", 1),
        ("emotion", "surprised", "brow_raise", 1), ("gaze", "left", "gaze_x", -1), ("gaze", "right", "gaze_x", 1),
        ("gaze", "left", "yaw", -1), ("gaze", "up", "gaze_y", -1), ("gaze", "down", "pitch", 1),
        ("tilt", "right", "roll", 1), ("tilt", "left", "roll", -1),
    ],
)  # fmt: skip
def test_style_is_seen_in_every_clip(speech, attribute, value, name, sign):
    fixed = {"emotion": "neutral", "gaze": "camera", "tilt": "none", "gesture": "none"} | {attribute: value}
    plain = fixed | {attribute: {"emotion": "neutral", "gaze": "camera", "tilt": "none"}[attribute]}
    with_style, without = (np.asarray(getattr(moved(speech, **a), name)).mean(1) for a in (fixed, plain))
    assert (sign * (with_style - without) > 0.06).all()


def test_a_head_that_is_asked_for_nothing_stays_near_where_it_rests(speech):
    """In radians: the liveliest head's usual turn is some four degrees, the stillest one's a degree."""
    plain = {"emotion": "neutral", "gaze": "camera", "tilt": "none", "gesture": "none"}
    for activity, low, high in (("still", 0.01, 0.035), ("lively", 0.03, 0.085)):
        state = moved(speech, **plain, movement=activity)
        assert low < np.asarray(state.yaw).std() < high
        assert np.asarray(state.roll).std() < 0.6 * high  # the pitch also follows the voice


def test_eyes_keep_to_the_camera_most_of_the_time(speech):
    state = moved(speech, gaze="camera", gesture="none")
    # Gaze plus the turn of the head, in gaze units: where the eyes point in the picture.
    target = np.asarray(state.gaze_x) + 2.2 * np.asarray(state.yaw)
    assert (np.abs(target) < 0.15).mean() > 0.55
    assert (np.abs(target) > 0.2).mean() > 0.05  # and wander now and then


def test_nodding_and_shaking_are_fast_and_on_their_own_axis():
    def quick(angle) -> float:
        """Energy of the angle between 1.2 and 2.5 Hz."""
        spectrum = np.abs(np.fft.rfft(np.asarray(angle) - np.mean(angle, axis=1, keepdims=True), axis=1)) ** 2
        hertz = np.fft.rfftfreq(FRAMES, 1 / FPS)
        return float(spectrum[:, (hertz > 1.2) & (hertz < 2.5)].mean())

    nod, shake, none = (moved(gesture=gesture) for gesture in ("nod", "shake", "none"))
    assert quick(nod.pitch) > 10 * quick(none.pitch) and quick(nod.pitch) > 5 * quick(nod.yaw)
    assert quick(shake.yaw) > 10 * quick(none.yaw) and quick(shake.yaw) > 5 * quick(shake.pitch)


def test_excitement_raises_brows_and_moves_the_head(speech):
    calm = replace(speech, excitement=jnp.zeros(FRAMES))
    excited, plain = moved(speech, emotion="neutral"), moved(calm, emotion="neutral")
    assert (np.asarray(excited.brow_raise - plain.brow_raise).mean(1) > 0.03).all()
    assert np.abs(np.asarray(excited.pitch - plain.pitch)).max() > 0.02


def test_lively_heads_move_more_than_still_ones(speech):
    lively, still = (np.asarray(moved(speech, movement=m, gesture="none").yaw).std(1) for m in ("lively", "still"))
    assert lively.mean() > 1.7 * still.mean()


def test_motion_hears_nothing_of_the_future(speech):
    cut = 300
    louder = replace(speech, excitement=speech.excitement.at[cut:].set(1.0), activity=speech.activity.at[cut:].set(1.0))
    before, after = moved(speech), moved(louder)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(a[:, :cut], b[:, :cut], atol=1e-6)


def test_frame_rate_must_be_positive():
    with pytest.raises(ValueError, match="fps=0"):
        motion.style_motion(KEYS[0], motion.sample_style(KEYS[0]), silence(4), 0)


def test_a_changed_style_is_the_first_before_and_the_second_after(speech):
    """Until the change a frame differs in nothing; 0.4 s later the second manner is reached, without a jump on the way."""
    frames, change = speech.mouth_open.shape[0], 30
    first = style_from_caption_attributes({"emotion": "neutral", "gaze": "camera", "tilt": "none"}, jax.random.key(1))
    second = replace(first, happy=jnp.float32(0.9), tilt=jnp.float32(0.85))
    styles = motion.changed_style(first, second, jnp.int32(change), frames, FPS)
    share = np.asarray(styles.happy) / 0.9
    x = np.clip((np.arange(frames) - change + 1) / (0.4 * FPS), 0, 1)
    np.testing.assert_allclose(share, x * x * (3 - 2 * x), atol=1e-5)
    assert (share[:change] == 0).all() and (share[change + 10 :] == 1).all() and share[change] > 0
    move = jax.jit(partial(motion.style_motion, fps=FPS))
    keys = jax.random.key(0)
    same = (motion.changed_style(style, style, jnp.int32(change), frames, FPS) for style in (first, second))  # the shapes of one program
    changed, before, after = (move(keys, style, speech) for style in (styles, *same))
    for name in ("yaw", "roll", "smile", "breath", "blink", "brow_raise"):
        value = np.asarray(getattr(changed, name))
        np.testing.assert_allclose(value[:change], getattr(before, name)[:change], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(value[change + 10 :], getattr(after, name)[change + 10 :], atol=1e-5, err_msg=name)
    assert np.abs(np.diff(changed.smile)).max() < 0.3 and np.abs(np.diff(changed.roll)).max() < 0.04
    never = motion.changed_style(first, second, jnp.int32(frames), frames, FPS)
    assert (np.asarray(never.happy) == np.asarray(first.happy)).all()
