"""The renderer: what it draws agrees with what it says it draws."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.data import face
from pikastream_jax.data.face_pose import to_face, to_picture

SIZE = 128
PEOPLE = 12
LIMITS = dict(
    yaw=(-0.35, 0.35), pitch=(-0.25, 0.25), roll=(-0.2, 0.2), shift_x=(-0.05, 0.05), shift_y=(-0.05, 0.05),
    blink=(0, 1), brow_furrow=(0, 1), mouth_open=(0, 1), tongue=(0, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def people() -> face.Identity:
    return jax.jit(jax.vmap(face.sample_identity))(jax.random.split(jax.random.key(7), PEOPLE))


def random_states(seed: int, count: int = PEOPLE) -> face.FaceState:
    """States drawn over the whole allowed range."""
    rng = np.random.default_rng(seed)
    draw = {f.name: rng.uniform(*LIMITS.get(f.name, (-1, 1)), count) for f in fields(face.FaceState)}
    return face.FaceState(**{name: jnp.asarray(value, jnp.float32) for name, value in draw.items()})


draw_small = jax.jit(jax.vmap(partial(face.render, size=SIZE)))


def levels(picture) -> np.ndarray:
    """[-1, 1] to 0..255."""
    return np.asarray((picture + 1) * 127.5).round().astype(int)


def inside(box, shape) -> np.ndarray:
    y0, x0, y1, x1 = (float(edge) for edge in box)
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (y >= y0) & (y <= y1) & (x >= x0) & (x <= x1)


def test_same_key_same_person_and_picture(people):
    again = jax.jit(jax.vmap(face.sample_identity))(jax.random.split(jax.random.key(7), PEOPLE))
    for a, b in zip(jax.tree.leaves(people), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(people))
    state = random_states(0)
    np.testing.assert_array_equal(draw_small(people, state), draw_small(people, state))


def test_people_look_different(people):
    pictures = np.asarray(draw_small(people, face.neutral_state(PEOPLE)))
    difference = np.abs(pictures[:, None] - pictures[None]).mean((2, 3, 4)) + np.eye(PEOPLE)
    assert difference.min() > 0.02


def test_finite_and_in_range_for_extreme_states(people):
    for sign in (-1.0, 1.0):
        extreme = {f.name: LIMITS.get(f.name, (-1, 1))[int(sign > 0)] for f in fields(face.FaceState)}
        state = face.FaceState(**{name: jnp.full(PEOPLE, value, jnp.float32) for name, value in extreme.items()})
        picture = np.asarray(draw_small(people, state))
        assert np.isfinite(picture).all() and picture.min() >= -1 and picture.max() <= 1
        assert picture.std() > 0.1


def test_crop_is_the_slice_of_the_whole_picture(people):
    state = random_states(1)
    whole = levels(draw_small(people, state))
    origin = jnp.asarray(np.random.default_rng(0).integers(0, SIZE - 48, (PEOPLE, 2)))
    cut = jax.jit(jax.vmap(lambda i, s, o: face.render(i, s, size=SIZE, origin=(o[0], o[1]), crop=(48, 40))))
    for picture, part, (y, x) in zip(whole, levels(cut(people, state, origin)), np.asarray(origin), strict=True):
        # One level of rounding where a value lies between two levels.
        assert np.abs(part - picture[y : y + 48, x : x + 40]).max() <= 1


def test_any_size_shows_the_same_picture(people):
    state = random_states(2)
    large = np.asarray(jax.jit(jax.vmap(partial(face.render, size=2 * SIZE)))(people, state))
    pooled = large.reshape(PEOPLE, SIZE, 2, SIZE, 2, 3).mean((2, 4))
    error = ((pooled - np.asarray(draw_small(people, state))) ** 2).mean()
    assert 10 * np.log10(4 / error) > 30


def test_wrong_crop_is_refused(people):
    one = jax.tree.map(lambda leaf: leaf[0], people)
    with pytest.raises(ValueError, match="crop=.* does not fit"):
        face.render(one, face.neutral_state(), size=64, crop=(65, 64))


def test_face_and_picture_coordinates_are_inverse(people):
    one, state = jax.tree.map(lambda leaf: leaf[0], (people, random_states(3)))
    u, v = jnp.meshgrid(jnp.linspace(-0.2, 0.2, 5), jnp.linspace(-0.2, 0.35, 6))
    pose = to_face(one, state, *to_picture(one, state, u, v))
    np.testing.assert_allclose(pose.u, u, atol=2e-3)
    np.testing.assert_allclose(pose.v, v, atol=2e-3)


def test_nose_moves_more_than_the_ears_when_the_head_turns(people):
    one = jax.tree.map(lambda leaf: leaf[0], people)
    points = jnp.asarray([0.0, 0.98 * one.head_width])
    moved = []
    for yaw in (-0.2, 0.2):
        state = replace(face.neutral_state(), yaw=jnp.float32(yaw))
        moved.append(to_picture(one, state, points, jnp.full(2, 0.1))[0])
    middle, side = np.asarray(moved[1] - moved[0])
    assert middle > 1.5 * side


def test_mouth_box_holds_every_pixel_the_mouth_changes(people):
    state = random_states(4)
    frames = [
        levels(draw_small(people, replace(state, mouth_open=jnp.full(PEOPLE, value)))) for value in (0.0, 0.3, 0.7, 1.0)
    ]
    boxes = jax.vmap(partial(face.mouth_box, size=SIZE))(people, state)
    for row in range(PEOPLE):
        changed = np.any([np.abs(frame[row] - frames[0][row]).max(-1) > 1 for frame in frames], axis=0)
        assert changed.sum() > 20
        assert not (changed & ~inside(boxes[row], changed.shape)).any()


def test_mouth_box_is_tight_enough_to_measure_in(people):
    y0, x0, y1, x1 = np.asarray(jax.vmap(face.mouth_box)(people, random_states(5))).T
    assert ((y1 - y0) < 90).all() and ((x1 - x0) < 90).all() and ((y1 - y0) > 30).all() and ((x1 - x0) > 40).all()


def test_dark_inside_of_the_mouth_grows_with_the_opening(people):
    """On fair skin without a beard, where nothing around the mouth is as dark as its inside."""
    one = jax.tree.map(lambda leaf: leaf[np.asarray(people.skin).sum(-1).argmax()], people)
    one = replace(one, beard=jnp.float32(0), moustache=jnp.float32(0))
    openings = jnp.asarray([0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0])
    state = replace(face.neutral_state(len(openings)), mouth_open=openings)
    draw = jax.jit(jax.vmap(partial(face.render, one)))
    picture = levels(draw(state))
    box = inside(face.mouth_box(one, face.neutral_state()), picture.shape[1:3])
    dark = ((picture < 110).all(-1) & (picture < 60).any(-1) & box).sum((1, 2))
    assert (np.diff(dark[1:]) > 0).all() and dark[-1] > dark[0] + 150
    opening, width = jax.vmap(partial(face.true_mouth, one))(state)
    assert (np.diff(opening) > 0).all() and 0.11 < float(opening[-1]) < 0.14
    np.testing.assert_allclose(width, width[0])


@pytest.mark.parametrize("value", [0.4, 1.0])
def test_opening_is_drawn_as_tall_as_stated(people, value):
    """The pixels in the middle column that belong to the inside of the mouth, counted against `true_mouth`."""
    state = replace(face.neutral_state(PEOPLE), mouth_open=jnp.full(PEOPLE, value), smile=jnp.full(PEOPLE, 0.3))
    draw = jax.jit(jax.vmap(partial(face.render, size=512, origin=(0, 252), crop=(512, 8))))
    # Lips, teeth and tongue have other colours on everyone: recolour the lips and see which pixels of the mouth stay.
    green = replace(people, lip_color=jnp.broadcast_to(jnp.asarray([0.1, 0.9, 0.1]), (PEOPLE, 3)))
    blue = replace(people, lip_color=jnp.broadcast_to(jnp.asarray([0.1, 0.1, 0.9]), (PEOPLE, 3)))
    lips = np.abs(levels(draw(green, state)) - levels(draw(blue, state))).max(-1).mean(-1) > 60
    measured = []
    for column in lips:
        rows = np.flatnonzero(column)
        gaps = np.diff(rows)
        measured.append(gaps.max() - 1)
    stated = np.asarray(jax.vmap(face.true_mouth)(people, state)[0] * 2 * people.head_height * 256)
    np.testing.assert_allclose(measured, stated, atol=4)


def test_smile_moves_the_corners_but_not_the_opening(people):
    state = replace(random_states(6), mouth_open=jnp.full(PEOPLE, 0.5))
    sad, happy = (
        jax.vmap(face.true_mouth)(people, replace(state, smile=jnp.full(PEOPLE, value))) for value in (-1.0, 1.0)
    )
    np.testing.assert_array_equal(sad[0], happy[0])
    assert (happy[1] > sad[1]).all()


def test_blink_hides_the_iris(people):
    """An iris of pure red is seen with the eyes open and gone with the eyes closed, inside the eyes' box."""
    red = replace(
        people,
        eye_color=jnp.broadcast_to(jnp.asarray([1.0, 0.0, 0.0]), (PEOPLE, 3)),
        glasses=jnp.zeros(PEOPLE),
    )
    green = replace(red, eye_color=jnp.broadcast_to(jnp.asarray([0.0, 1.0, 0.0]), (PEOPLE, 3)))
    state = replace(random_states(8), yaw=jnp.zeros(PEOPLE), roll=jnp.zeros(PEOPLE))
    for closed in (0.0, 1.0):
        now = replace(state, blink=jnp.full(PEOPLE, closed))
        iris = np.abs(levels(draw_small(red, now)) - levels(draw_small(green, now))).max(-1) > 8
        if closed:
            assert not iris.any()
        else:
            boxes = jax.vmap(partial(face.eyes_box, size=SIZE))(people, now)
            for row in range(PEOPLE):
                assert iris[row].sum() > 8
                assert not (iris[row] & ~inside(boxes[row], iris[row].shape)).any()


def test_gaze_moves_the_iris_to_its_side(people):
    one = replace(jax.tree.map(lambda leaf: leaf[0], people), glasses=jnp.float32(0))
    colours = [replace(one, eye_color=jnp.asarray(c, jnp.float32)) for c in ((1, 0, 0), (0, 1, 0))]
    draw = jax.jit(face.render)
    centres = []
    for gaze in (-1.0, 0.0, 1.0):
        state = replace(face.neutral_state(), gaze_x=jnp.float32(gaze))
        a, b = (levels(draw(colour, state)) for colour in colours)
        centres.append(np.flatnonzero(np.abs(a - b).max(-1).max(0) > 8).mean())
    assert centres[0] + 2 < centres[1] < centres[2] - 2


def test_hard_distractor_changes_the_face_and_nothing_else(people):
    keys = jax.random.split(jax.random.key(99), PEOPLE)
    other = jax.jit(jax.vmap(face.hard_distractor))(keys, people)
    shared = [f.name for f in fields(face.Identity) if f.name.startswith(("hair", "line", "background", "clothes"))]
    shared += ["collar_color", "neckline", "panel", "curl", "bun", "puffs", "beard", "glasses", "presentation", "age"]
    for name in shared:
        np.testing.assert_array_equal(getattr(people, name), getattr(other, name))
    for name in ("skin", "eye_color", "eye_spacing", "brow_arch", "nose_width", "mouth_size", "lip_color", "jaw"):
        assert not np.allclose(getattr(people, name), getattr(other, name))
    state = face.neutral_state(PEOPLE)
    difference = np.abs(levels(draw_small(people, state)) - levels(draw_small(other, state))).max(-1)
    assert (difference[:, : SIZE // 16] <= 1).mean() > 0.95  # the background above the head
    assert all(difference[row, 45:85, 45:85].mean() > 2 for row in range(PEOPLE))


def test_presentation_names(people):
    one = jax.tree.map(lambda leaf: leaf[0], people)
    man = replace(one, presentation=jnp.float32(1), age=jnp.float32(0.9))
    assert face.presentation_name(man) == "older man"
    assert face.presentation_name(replace(man, presentation=jnp.float32(0), age=jnp.float32(0.2))) == "woman"


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_renders_are_mapped_alike_one_by_one_and_in_batches(monkeypatch, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    xs = {"a": jnp.arange(70.0), "b": jnp.ones((70, 2))}
    np.testing.assert_array_equal(face.map_renders(lambda x: x["a"] + x["b"].sum(), xs), np.arange(70) + 2.0)
