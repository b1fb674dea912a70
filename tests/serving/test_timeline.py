from fractions import Fraction

import pytest

from pikastream_jax.serving.timeline import frame_count, output_frames


@pytest.mark.parametrize(
    "fps", [Fraction(25), Fraction(30), Fraction(24), Fraction(10), Fraction(60), Fraction(30000, 1001)]
)
def test_every_output_frame_shows_what_is_on_screen_at_its_time(fps):
    shown = []
    for chunk in range(50):
        shown += [(k, chunk * 12 + offset) for k, offset in output_frames(chunk * 12, 12, Fraction(25), fps)]
    assert [k for k, _ in shown] == list(range(len(shown)))  # none is missing, none comes twice
    for k, frame in shown:
        assert Fraction(frame, 25) <= k / fps < Fraction(frame + 1, 25)


@pytest.mark.parametrize("samples, expected", [(1, 1), (48_000, 25), (48_000 + 959, 25), (48_000 + 961, 26)])
def test_length_is_the_nearest_number_of_frames(samples, expected):
    assert frame_count(samples, 48_000, Fraction(25)) == expected
