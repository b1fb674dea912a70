"""What makes a face this face, attribute by attribute, and the same person with one attribute changed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from pikastream_jax.data.face_identity import Identity, sample_identity

# Fields of `Identity` that change together. Background, age and what is only derived from others are no attributes.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "skin": ("skin",),
    "hair_color": ("hair_color",),
    "hair_style": (
        "hair", "hair_side", "hair_top", "line_height", "line_slope", "line_curve", "part_drop", "part_x", "line_side", "hair_bottom",
        "hair_square", "panel", "curl", "bun", "puffs",
    ),
    "beard": ("beard", "moustache"),
    "glasses": ("glasses",),
    "clothes": ("clothes_color", "collar_color", "neckline", "neckline_v", "turtleneck"),
    "head": ("head_width", "head_height", "jaw", "squareness"),
    "eye_color": ("eye_color",),
    "eyes": ("eye_spacing", "eye_y", "eye_width", "eye_height", "eye_tilt"),
    "brows": ("brow_height", "brow_length", "brow_thickness", "brow_arch", "brow_tilt"),
    "nose": ("nose_y", "nose_width", "nose_size"),
    "mouth": ("mouth_y", "mouth_size", "lip_upper", "lip_lower"),
    "lip_color": ("lip_color",),
}  # fmt: skip
_CANDIDATES = 16


def change_attribute(key: PRNGKeyArray, identity: Identity, attribute: Int[Array, ""] | int) -> Identity:
    """The same person with one attribute of somebody else: of the one among 16 random people who differs most in it.

    The change may still be invisible: a bald head's hair color, or a beard where none of the 16 has another.

    Args:
      attribute: number in the order of `ATTRIBUTES`; may be traced.
    """
    others = jax.vmap(sample_identity)(jax.random.split(key, _CANDIDATES))
    changed = {}
    for number, fields in enumerate(ATTRIBUTES.values()):
        distance = jnp.zeros(_CANDIDATES)
        for name in fields:
            values = getattr(others, name).reshape(_CANDIDATES, -1)
            spread = jnp.std(values, axis=0) + 1e-4
            distance = distance + jnp.mean(jnp.abs(values - getattr(identity, name)) / spread, axis=-1)
        other = jnp.argmax(distance)
        for name in fields:
            own = getattr(identity, name)
            changed[name] = jnp.where(attribute == number, getattr(others, name)[other], own)
    return replace(identity, **changed)


def attribute_values(identity: Identity) -> Float[Array, " o"]:
    """All fields of all attributes as one vector, in the order of `ATTRIBUTES`."""
    return jnp.concatenate([jnp.atleast_1d(getattr(identity, name)) for fields in ATTRIBUTES.values() for name in fields])
