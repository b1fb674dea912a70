"""What a prompt leaves unsaid: whoever is not told where to look, looks at the viewer."""

import re

_GAZE = re.compile(
    r"\b(ahead|away|camera|ceiling|down|downwards|eyes?|facing|gaz(e|es|ing)|glanc(e|es|ing)|left|right|sideways|table|up|upwards|viewer|you)\b"
)


def with_gaze(prompt: str) -> str:
    """The prompt, with eye contact asked for where it is not empty and names no gaze.

    Captions of the training mostly have eight words or more. On "a woman smiling" alone a model trained on nothing shorter smiled less than on
    the same with a gaze, and drew a grid into the background.

    >>> with_gaze("a woman smiling")
    'a woman smiling, looking at the camera'
    >>> with_gaze("sad, looking down")
    'sad, looking down'
    """
    said = prompt.strip().rstrip(".,;")
    if not said or _GAZE.search(said.lower()):
        return prompt
    return f"{said}, looking at the camera"
