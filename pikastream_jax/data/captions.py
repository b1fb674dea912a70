"""What a clip looks like, in words: captions that agree with the style that moves the face.

A style is described by a few attributes, each with a handful of values (`attributes_of`); `caption` words a random
subset of them in one of many ways, and `style_from_caption_attributes` goes back to a style: attributes a caption
leaves out are drawn at random, so that a model learns what a prompt decides and what it leaves open. Left and right are
those of the picture.
"""

from collections.abc import Mapping
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from pikastream_jax.data.face_identity import Identity, presentation_name
from pikastream_jax.data.motion import Style, sample_style

# attribute -> value -> the style fields it fixes
ATTRIBUTES: dict[str, dict[str, dict[str, float]]] = {
    "emotion": {
        "neutral": dict(happy=0.0, sad=0.0, angry=0.0, surprised=0.0),
        "slightly happy": dict(happy=0.45, sad=0.0, angry=0.0, surprised=0.0),
        "happy": dict(happy=0.9, sad=0.0, angry=0.0, surprised=0.0),
        "sad": dict(happy=0.0, sad=0.8, angry=0.0, surprised=0.0),
        "angry": dict(happy=0.0, sad=0.0, angry=0.8, surprised=0.0),
        "surprised": dict(happy=0.0, sad=0.0, angry=0.0, surprised=0.8),
    },
    "gaze": {
        "camera": dict(gaze_x=0.0, gaze_y=0.0),
        "left": dict(gaze_x=-0.8, gaze_y=0.0),
        "right": dict(gaze_x=0.8, gaze_y=0.0),
        "up": dict(gaze_x=0.0, gaze_y=-0.8),
        "down": dict(gaze_x=0.0, gaze_y=0.8),
    },
    "gesture": {"none": dict(nod=0.0), "nod": dict(nod=0.8), "shake": dict(nod=-0.8)},
    "tilt": {"none": dict(tilt=0.0), "left": dict(tilt=-0.85), "right": dict(tilt=0.85)},
    "movement": {
        "still": dict(head_activity=0.15),
        "some": dict(head_activity=0.5),
        "lively": dict(head_activity=0.85),
    },
    "energy": {"calm": dict(energy=0.15), "some": dict(energy=0.5), "energetic": dict(energy=0.85)},
}

_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "emotion": {
        "neutral": ("with a neutral expression", "serious", "with a straight face", "looking neutral", "composed",
                    "with a plain expression", "not smiling", "with a relaxed face", "with a sober look"),
        "slightly happy": ("smiling slightly", "with a slight smile", "with a faint smile", "with a hint of a smile",
                           "smiling gently", "with a soft smile", "looking content", "with a small smile", "pleased"),
        "happy": ("smiling", "smiling warmly", "with a broad smile", "with a big smile", "happy", "cheerful",
                  "beaming", "looking delighted", "with a happy face", "smiling brightly", "grinning", "joyful"),
        "sad": ("sad", "looking sad", "with a sad face", "unhappy", "looking sorrowful", "downcast", "gloomy",
                "with a sad expression", "looking miserable", "with the corners of the mouth down", "frowning sadly"),
        "angry": ("angry", "looking angry", "with an angry face", "frowning", "annoyed", "with furrowed brows",
                  "looking cross", "scowling", "with a stern look", "furious", "irritated"),
        "surprised": ("surprised", "looking surprised", "with raised eyebrows", "astonished", "amazed", "wide-eyed",
                      "with a surprised expression", "looking startled", "with brows raised", "in wonder"),
    },
    "gaze": {
        "camera": ("looking at the camera", "looking straight ahead", "facing the viewer", "with eye contact",
                   "looking at you", "looking into the camera", "facing the camera"),
        "left": ("looking to the left", "looking left", "gazing to the left", "glancing left", "facing left",
                 "turned to the left", "with eyes to the left"),
        "right": ("looking to the right", "looking right", "gazing to the right", "glancing right", "facing right",
                  "turned to the right", "with eyes to the right"),
        "up": ("looking up", "looking upwards", "gazing up", "with eyes raised", "glancing up",
               "looking at the ceiling"),
        "down": ("looking down", "looking downwards", "gazing down", "with lowered eyes", "glancing down",
                 "looking at the table"),
    },
    "gesture": {
        "none": ("without nodding", "keeping the head level", "with no head gestures"),
        "nod": ("nodding", "nodding along", "nodding in agreement", "agreeing with nods", "nodding the head",
                "nodding yes", "who nods", "nodding repeatedly", "giving nods", "with a nodding head", "nodding often"),
        "shake": ("shaking the head", "with head shakes", "disagreeing", "shaking the head no", "who shakes the head",
                  "saying no with the head", "shaking the head in doubt", "turning the head from side to side",
                  "shaking the head repeatedly", "with a shaking head", "swinging the head left and right"),
    },
    "tilt": {
        "none": ("with an upright head", "holding the head straight", "head upright", "with the head straight",
                 "upright"),
        "left": ("with the head tilted to the left", "head tilted left", "tilting the head to the left",
                 "leaning the head left", "with a tilt of the head to the left", "head cocked to the left",
                 "with the head inclined to the left", "with the head leaning left", "head to the left side",
                 "tilted left"),
        "right": ("with the head tilted to the right", "head tilted right", "tilting the head to the right",
                  "leaning the head right", "with a tilt of the head to the right", "head cocked to the right",
                  "with the head inclined to the right", "with the head leaning right", "head to the right side",
                  "tilted right"),
    },
    "movement": {
        "still": ("holding still", "keeping still", "with a steady head", "hardly moving", "motionless",
                  "sitting still", "with little movement", "with a quiet head", "barely moving"),
        "some": ("moving naturally", "with natural movement", "with some movement", "moving a little",
                 "with gentle movements", "moving moderately"),
        "lively": ("moving a lot", "with lively movements", "with an active head", "animated", "restless",
                   "gesturing with the head", "with much movement", "swaying", "moving around", "full of motion"),
    },
    "energy": {
        "calm": ("calm", "calmly", "relaxed", "in a calm manner", "quietly", "gentle", "with low energy", "slowly",
                 "softly", "unhurried"),
        "some": ("at an easy pace", "in an ordinary manner", "with moderate energy", "at a normal pace", "evenly"),
        "energetic": ("energetic", "energetically", "with energy", "lively and quick", "excited", "enthusiastic",
                      "with enthusiasm", "passionate", "dynamic", "vigorous"),
    },
}  # fmt: skip

_SUBJECTS: dict[str, tuple[str, ...]] = {
    "woman": ("a woman", "a young woman", "a lady", "a woman", "one woman", "the woman"),
    "man": ("a man", "a young man", "a guy", "a man", "one man", "the man"),
    "person": ("a person", "someone", "a speaker", "the person", "one person", "somebody"),
    "older woman": ("an older woman", "an elderly woman", "an old lady", "a senior woman"),
    "older man": ("an older man", "an elderly man", "an old man", "a senior man"),
    "older person": ("an older person", "an elderly person", "a senior", "an old person"),
}
_FRAMES = (
    "{s}, {a}", "{s} {a}", "{s}, {a}.", "{s} talking, {a}", "{s} speaking, {a}", "{s} who is talking, {a}",
    "a video of {s}, {a}", "a portrait of {s}, {a}", "a close-up of {s}, {a}", "a talking head of {s}, {a}",
    "video of {s}, {a}", "portrait of {s}, {a}", "a clip of {s}, {a}", "a shot of {s}, {a}", "footage of {s}, {a}",
    "{s} in a video call, {a}", "{s} in a portrait, {a}", "{s} on camera, {a}",
    "{s} in front of a plain background, {a}", "{s} having a conversation, {a}", "{s} in conversation, {a}", "{s} listening and speaking, {a}",
    "the face of {s}, {a}", "here is {s}, {a}", "a cartoon of {s}, {a}", "an animated portrait of {s}, {a}",
    "{a}: {s}", "{a}",
)  # fmt: skip

# Prompts with a fixed meaning, for evaluation and for the command line's examples.
CANONICAL: dict[str, dict[str, str]] = {
    "a person with a neutral expression, looking at the camera": {"emotion": "neutral", "gaze": "camera"},
    "a person smiling warmly, looking at the camera": {"emotion": "happy", "gaze": "camera"},
    "a person with a slight smile": {"emotion": "slightly happy"},
    "a person looking sad": {"emotion": "sad"},
    "a person looking angry": {"emotion": "angry"},
    "a person looking surprised": {"emotion": "surprised"},
    "a person looking to the left": {"gaze": "left"},
    "a person looking to the right": {"gaze": "right"},
    "a person looking up": {"gaze": "up"},
    "a person looking down": {"gaze": "down"},
    "a person nodding": {"gesture": "nod"},
    "a person shaking the head": {"gesture": "shake"},
    "a person with the head tilted to the left": {"tilt": "left"},
    "a person with the head tilted to the right": {"tilt": "right"},
    "a person talking calmly, holding still": {"energy": "calm", "movement": "still"},
    "a person talking energetically, moving a lot": {"energy": "energetic", "movement": "lively"},
}


def phrases() -> list[str]:
    """Everything that captions are put together from: the vocabulary of any number of them is the same."""
    said = [phrase for values in _WORDS.values() for wordings in values.values() for phrase in wordings]
    subjects = [subject for wordings in _SUBJECTS.values() for subject in wordings]
    return [*said, *subjects, *(frame.format(s="", a="") for frame in _FRAMES), "and"]


def attributes_of(style: Style) -> dict[str, str]:
    """The value of each attribute that comes closest to ``style`` (scalar leaves)."""
    numbers = {field.name: float(getattr(style, field.name)) for field in fields(Style)}

    def distance(fixed: dict[str, float]) -> float:
        return sum((numbers[name] - value) ** 2 for name, value in fixed.items())

    return {name: min(values, key=lambda value: distance(values[value])) for name, values in ATTRIBUTES.items()}


def caption(rng: np.random.Generator, attributes: Mapping[str, str], presentation: str = "person",
            keep: float = 0.6) -> str:  # fmt: skip
    """Word some of ``attributes``.

    Args:
      rng: chooses the attributes that are mentioned, their order and the words.
      attributes: attribute -> value, as in `ATTRIBUTES`; need not be complete.
      presentation: "woman", "man" or "person", with "older " in front where it applies (`presentation_name`).
      keep: probability that an attribute is mentioned; those of no consequence ("none", "some") are mentioned less.

    Returns:
      An English phrase, such as "a woman smiling warmly, looking to the left".
    """
    return worded(rng, mentioned(rng, attributes, keep), presentation)


def mentioned(rng: np.random.Generator, attributes: Mapping[str, str], keep: float = 0.6) -> dict[str, str]:
    """The attributes that a caption is to mention, in the order it mentions them; see `caption`."""
    _check(attributes)
    plain = {"none": 0.25, "some": 0.25}
    said = [n for n, value in attributes.items() if rng.random() < keep * plain.get(value, 1.0)]
    if not said and attributes:
        said = [rng.choice(list(attributes))]
    rng.shuffle(said)
    return {str(name): attributes[name] for name in said}


def completeness(attributes: Mapping[str, str], said: Mapping[str, str]) -> float:
    """Share of what there is to say that a caption says; "none" and "some" need no words."""
    to_say = {name for name, value in attributes.items() if value not in ("none", "some")}
    return len(to_say & said.keys()) / len(to_say) if to_say else 1.0


def worded(rng: np.random.Generator, said: Mapping[str, str], presentation: str = "person") -> str:
    """Words all of ``said``; see `caption`."""
    _check(said)
    if presentation not in _SUBJECTS:
        raise ValueError(f"presentation={presentation!r} is unknown: use one of {', '.join(_SUBJECTS)}")
    subjects = _SUBJECTS[presentation] if rng.random() < 0.8 else _SUBJECTS["person"]
    subject = str(rng.choice(subjects))
    if not said:
        return subject
    phrases = [str(rng.choice(_WORDS[name][value])) for name, value in said.items()]
    joined = ", ".join(phrases)
    if len(phrases) > 1 and rng.random() < 0.5:
        joined = ", ".join(phrases[:-1]) + " and " + phrases[-1]
    text = str(rng.choice(_FRAMES)).format(s=subject, a=joined)
    return text[:1].upper() + text[1:] if rng.random() < 0.3 else text


def style_from_caption_attributes(attributes: Mapping[str, str], key: PRNGKeyArray) -> Style:
    """A style with the given attributes; what they leave open is drawn from ``key``."""
    _check(attributes)
    fixed = {}
    for name, value in attributes.items():
        fixed |= ATTRIBUTES[name][value]
    drawn = sample_style(key)
    return Style(**{f.name: jnp.float32(fixed[f.name]) if f.name in fixed else getattr(drawn, f.name)
                    for f in fields(Style)})  # fmt: skip


def caption_batch(seed: int, n: int, identities: Identity | None = None) -> tuple[list[str], Style]:
    """``n`` captions and the styles (leaves ``[n]``) they describe.

    Args:
      seed: of styles and words.
      n: how many.
      identities: leaves ``[n]``, whose presentation the captions then name; "a person" without them.
    """
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    styles = _sample_styles(jax.random.split(jax.random.key(seed), n))
    host = jax.device_get(styles)
    people = None if identities is None else jax.device_get(identities)
    rng = np.random.default_rng(seed)
    captions = []
    for row in range(n):
        name = "person" if people is None else presentation_name(jax.tree.map(lambda x, r=row: x[r], people))
        captions.append(caption(rng, attributes_of(jax.tree.map(lambda x, r=row: x[r], host)), name))
    return captions, styles


_sample_styles = jax.jit(jax.vmap(sample_style))


def _check(attributes: Mapping[str, str]) -> None:
    for name, value in attributes.items():
        if name not in ATTRIBUTES:
            raise ValueError(f"attribute {name!r} is unknown: use one of {', '.join(ATTRIBUTES)}")
        if value not in ATTRIBUTES[name]:
            raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(ATTRIBUTES[name])}")
