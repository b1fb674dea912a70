"""Eye contact is asked for where a prompt names no gaze, and nowhere else."""

import pytest

from pikastream_jax.data.captions import CANONICAL
from pikastream_jax.text.prompts import with_gaze


@pytest.mark.parametrize(
    "prompt, completed",
    [
        ("a woman smiling", "a woman smiling, looking at the camera"),
        ("Sad.", "Sad, looking at the camera"),
        (" a man, serious, ", "a man, serious, looking at the camera"),
        ("looking angry", "looking angry, looking at the camera"),
        ("grinning upstairs", "grinning upstairs, looking at the camera"),
        ("", ""),
        ("  ", "  "),
        ("A man LOOKING UP.", "A man LOOKING UP."),
        ("happy, with eye contact", "happy, with eye contact"),
    ],
)
def test_by_hand(prompt, completed):
    assert with_gaze(prompt) == completed
    assert with_gaze(completed) == completed, "once is enough"


def test_canonical_prompts_that_name_a_gaze_stay():
    gazes = [prompt for prompt, attributes in CANONICAL.items() if "gaze" in attributes]
    assert len(gazes) >= 5 and [with_gaze(prompt) for prompt in gazes] == gazes
