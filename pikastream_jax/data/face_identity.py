"""Who is in the picture: the parameters of one cartoon person and how they are drawn at random.

Lengths are in picture units (the picture is 2 units high), measured on the head facing the camera with the origin at
the middle of the head, x to the right and y down. Colours are sRGB in [0, 1].
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

WOMAN, MAN, PERSON = 0, 1, 2
PRESENTATIONS = ("woman", "man", "person")
OLDER_AGE = 0.6  # from this `age` on a person is called "older" and has grey hair and a few lines

_SKINS = (
    (1.00, 0.88, 0.79), (0.98, 0.82, 0.70), (0.96, 0.79, 0.66), (0.93, 0.74, 0.58), (0.88, 0.68, 0.51),
    (0.80, 0.58, 0.41), (0.70, 0.48, 0.33), (0.58, 0.38, 0.26), (0.47, 0.30, 0.21), (0.38, 0.24, 0.18),
)  # fmt: skip
_HAIRS = (
    (0.10, 0.08, 0.09), (0.16, 0.11, 0.10), (0.25, 0.15, 0.11), (0.36, 0.21, 0.13), (0.48, 0.29, 0.16),
    (0.62, 0.42, 0.22), (0.83, 0.65, 0.36), (0.92, 0.79, 0.52), (0.62, 0.24, 0.12), (0.78, 0.36, 0.16),
    (0.30, 0.20, 0.34), (0.16, 0.25, 0.42),
)  # fmt: skip
_EYES = (
    (0.25, 0.14, 0.08), (0.36, 0.21, 0.10), (0.48, 0.31, 0.13), (0.32, 0.45, 0.22),
    (0.22, 0.50, 0.40), (0.24, 0.48, 0.68), (0.38, 0.58, 0.76), (0.42, 0.47, 0.52),
)  # fmt: skip
_CLOTHES = (
    (0.20, 0.29, 0.46), (0.16, 0.42, 0.46), (0.85, 0.38, 0.31), (0.95, 0.72, 0.30), (0.42, 0.54, 0.36),
    (0.57, 0.30, 0.44), (0.93, 0.91, 0.86), (0.24, 0.24, 0.28), (0.70, 0.20, 0.24), (0.47, 0.62, 0.80),
    (0.89, 0.58, 0.60), (0.60, 0.48, 0.74), (0.34, 0.22, 0.20), (0.30, 0.60, 0.52),
)  # fmt: skip
_BACKGROUNDS = (
    (0.98, 0.86, 0.72), (0.74, 0.86, 0.92), (0.80, 0.88, 0.74), (0.93, 0.78, 0.78), (0.82, 0.78, 0.92),
    (0.96, 0.92, 0.84), (0.48, 0.64, 0.72), (0.40, 0.46, 0.60), (0.66, 0.52, 0.56), (0.52, 0.62, 0.52),
    (0.30, 0.36, 0.44), (0.96, 0.78, 0.54), (0.62, 0.80, 0.78), (0.86, 0.62, 0.50),
)  # fmt: skip
_GLASSES = ((0.10, 0.09, 0.10), (0.35, 0.20, 0.12), (0.62, 0.47, 0.22), (0.55, 0.13, 0.16), (0.16, 0.26, 0.42))

# One row per hair style, the columns named in _STYLE_COLUMNS; every row is jittered when sampled.
_STYLE_COLUMNS = (
    "hair", "hair_side", "hair_top", "line_height", "line_slope", "line_curve", "part_drop", "line_side",
    "hair_bottom", "hair_square", "panel", "curl", "bun", "puffs", "woman", "man", "person",
)  # fmt: skip
_HAIR_STYLES = {
    #                 hair side   top  height slope curve  drop  lside  bottom square panel curl  bun puffs  w  m  p
    "bald":           (0, 0.010, 0.01, -0.90, 0.00, 0.50, 0.00, -0.20, 0.00, 0.20, 9.0, 0.000, 0, 0, 0.0, 1.2, 0.3),
    "crop":           (1, 0.008, 0.04, -0.33, 0.00, 1.90, 0.00, 0.02, 0.06, 0.20, 9.0, 0.000, 0, 0, 0.3, 2.0, 1.0),
    "side_sweep":     (1, 0.016, 0.09, -0.30, 0.38, 1.70, 0.00, 0.02, 0.08, 0.30, 9.0, 0.000, 0, 0, 0.4, 2.0, 1.0),
    "quiff":          (1, 0.006, 0.13, -0.34, -0.15, 2.00, 0.00, 0.02, 0.05, 0.15, 9.0, 0.000, 0, 0, 0.1, 1.5, 0.6),
    "fringe_short":   (1, 0.025, 0.07, -0.19, 0.08, 0.70, 0.00, 0.04, 0.12, 0.30, 9.0, 0.000, 0, 0, 0.5, 1.4, 1.0),
    "curly_short":    (1, 0.035, 0.10, -0.27, 0.05, 1.40, 0.00, 0.02, 0.12, 0.20, 9.0, 0.014, 0, 0, 0.5, 1.5, 1.0),
    "afro":           (1, 0.130, 0.17, -0.27, 0.00, 1.50, 0.00, 0.30, 0.25, 0.10, 9.0, 0.010, 0, 0, 1.0, 0.8, 0.8),
    "bob":            (1, 0.070, 0.08, -0.28, 0.30, 0.90, 0.00, 0.40, 0.43, 0.55, 0.335, 0.0, 0, 0, 1.6, 0.0, 0.8),
    "bob_fringe":     (1, 0.075, 0.08, -0.14, 0.00, 0.30, 0.00, 0.40, 0.45, 0.60, 0.330, 0.0, 0, 0, 1.2, 0.0, 0.6),
    "long_parted":    (1, 0.060, 0.07, -0.38, 0.00, 0.60, 0.55, 0.50, 0.95, 0.60, 0.340, 0.0, 0, 0, 1.8, 0.3, 0.6),
    "long_side":      (1, 0.070, 0.09, -0.30, 0.45, 0.80, 0.00, 0.50, 0.98, 0.60, 0.345, 0.0, 0, 0, 1.8, 0.1, 0.5),
    "long_fringe":    (1, 0.065, 0.08, -0.15, 0.00, 0.30, 0.00, 0.50, 0.92, 0.60, 0.335, 0.0, 0, 0, 1.2, 0.0, 0.5),
    "long_wavy":      (1, 0.100, 0.10, -0.31, 0.25, 0.70, 0.10, 0.50, 0.85, 0.50, 0.340, 0.016, 0, 0, 1.6, 0.2, 0.6),
    "tucked":         (1, 0.045, 0.06, -0.34, 0.10, 1.60, 0.10, 0.02, 0.82, 0.60, 9.0, 0.000, 0, 0, 1.0, 0.6, 0.8),
    "bun":            (1, 0.012, 0.05, -0.35, 0.05, 1.80, 0.00, 0.02, 0.06, 0.20, 9.0, 0.000, 1, 0, 1.6, 0.3, 0.6),
    "bun_fringe":     (1, 0.018, 0.05, -0.17, 0.00, 0.60, 0.00, 0.05, 0.08, 0.20, 9.0, 0.000, 1, 0, 0.9, 0.0, 0.5),
    "puffs":          (1, 0.016, 0.04, -0.33, 0.00, 1.60, 0.15, 0.02, 0.06, 0.20, 9.0, 0.000, 0, 1, 1.0, 0.0, 0.4),
    "receding":       (1, 0.010, 0.02, -0.47, 0.00, 2.60, -0.25, 0.02, 0.08, 0.20, 9.0, 0.000, 0, 0, 0.0, 0.9, 0.2),
}  # fmt: skip


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Identity:
    """One person. Every field is float32: a scalar, or ``[3]`` for a colour; a leading batch axis comes from vmap."""

    presentation: Float[Array, ""]  # WOMAN, MAN or PERSON
    age: Float[Array, ""]  # 0 young .. 1 old
    # head
    head_width: Float[Array, ""]  # half width at the cheekbones
    head_height: Float[Array, ""]  # half height, crown to chin
    jaw: Float[Array, ""]  # width at the chin as a fraction of head_width
    squareness: Float[Array, ""]  # 0 oval .. 0.6 square
    ear_size: Float[Array, ""]  # half height of an ear
    neck_width: Float[Array, ""]  # half width
    skin: Float[Array, "3"]
    freshness: Float[Array, ""]  # strength of the blush on the cheeks, 0..1
    # eyes and brows
    eye_color: Float[Array, "3"]
    eye_spacing: Float[Array, ""]  # from the middle of the face to the middle of an eye
    eye_y: Float[Array, ""]
    eye_width: Float[Array, ""]  # half width
    eye_height: Float[Array, ""]  # half height, open
    eye_tilt: Float[Array, ""]  # outer corner up for positive values, slope
    lashes: Float[Array, ""]  # 0 none .. 1 long
    brow_color: Float[Array, "3"]
    brow_height: Float[Array, ""]  # above the middle of the eye
    brow_length: Float[Array, ""]  # half length
    brow_thickness: Float[Array, ""]  # half thickness
    brow_arch: Float[Array, ""]
    brow_tilt: Float[Array, ""]  # slope, positive when the outer end is higher
    # nose and mouth
    nose_y: Float[Array, ""]  # of the tip
    nose_width: Float[Array, ""]  # half width at the wings
    nose_size: Float[Array, ""]  # radius of the tip
    mouth_y: Float[Array, ""]
    mouth_size: Float[Array, ""]  # half width at rest
    lip_upper: Float[Array, ""]  # thickness
    lip_lower: Float[Array, ""]  # thickness
    lip_color: Float[Array, "3"]
    # hair
    hair: Float[Array, ""]  # 1, or 0 for a bald head
    hair_color: Float[Array, "3"]
    hair_side: Float[Array, ""]  # how far the hair stands out beyond the head at the sides
    hair_top: Float[Array, ""]  # and on top
    line_height: Float[Array, ""]  # y of the hair line in the middle of the forehead
    line_slope: Float[Array, ""]  # of a hair line swept to one side
    line_curve: Float[Array, ""]  # how fast it comes down to the temples
    part_drop: Float[Array, ""]  # slope of a curtain that falls from a parting
    part_x: Float[Array, ""]  # x of that parting
    line_side: Float[Array, ""]  # y down to which the hair line is followed at the sides
    hair_bottom: Float[Array, ""]  # y of the lower end of the hair
    hair_square: Float[Array, ""]  # squareness of its outline
    panel: Float[Array, ""]  # |x| beyond which hair falls in front of the face; 9 for none
    curl: Float[Array, ""]  # amplitude of the waves in the outline
    bun: Float[Array, ""]  # 0 or 1
    puffs: Float[Array, ""]  # 0 or 1: two round bunches
    # beard and accessories
    beard: Float[Array, ""]  # opacity 0..1
    moustache: Float[Array, ""]  # opacity 0..1
    glasses: Float[Array, ""]  # 0 or 1
    glasses_size: Float[Array, ""]  # half width of a lens
    glasses_round: Float[Array, ""]  # 1 round .. 0 square
    glasses_color: Float[Array, "3"]
    earrings: Float[Array, ""]  # 0 or 1
    # clothes and background
    clothes_color: Float[Array, "3"]
    collar_color: Float[Array, "3"]
    neckline: Float[Array, ""]  # depth of the opening below the base of the neck
    neckline_v: Float[Array, ""]  # 0 round .. 1 pointed
    turtleneck: Float[Array, ""]  # 0 or 1
    shoulder_width: Float[Array, ""]  # half width
    background_top: Float[Array, "3"]
    background_bottom: Float[Array, "3"]
    background_glow: Float[Array, "3"]


_FACE_FIELDS = (
    "head_width", "head_height", "jaw", "squareness", "ear_size", "skin", "freshness", "eye_color", "eye_spacing",
    "eye_y", "eye_width", "eye_height", "eye_tilt", "brow_height", "brow_length", "brow_thickness", "brow_arch",
    "brow_tilt", "nose_y", "nose_width", "nose_size", "mouth_y", "mouth_size", "lip_upper", "lip_lower", "lip_color",
)  # fmt: skip


def sample_identity(key: PRNGKeyArray) -> Identity:
    """One random person, a pure function of ``key``; vmap over keys for many."""
    draw = _Draw(key)
    presentation = draw.choice(jnp.asarray([0.0, 1.0, 2.0]), jnp.asarray([0.45, 0.45, 0.1]))
    man = jnp.where(presentation == MAN, 1.0, jnp.where(presentation == PERSON, 0.5, 0.0))
    woman = 1.0 - man
    age = jnp.where(draw.chance(0.2), draw.uniform(0.7, 1.0), draw.uniform(0.0, 0.5))
    old = (age > OLDER_AGE).astype(jnp.float32)

    skin_at = draw.uniform(0.0, len(_SKINS) - 1.0)
    skin = _interpolate(jnp.asarray(_SKINS), skin_at) * draw.uniform(0.96, 1.02)
    dark = skin_at / (len(_SKINS) - 1.0)
    # Light hair and light eyes are rarer the darker the skin, as they are among people.
    hairs, eyes = jnp.asarray(_HAIRS), jnp.asarray(_EYES)
    fair = jnp.asarray([0.0, 0, 0, 0.1, 0.5, 1, 1, 1, 1, 1, 0.3, 0.3])
    common = jnp.asarray([1.4, 1.4, 1.3, 1.2, 1.0, 0.8, 0.8, 0.6, 0.5, 0.6, 0.12, 0.12])
    hair_color = draw.choice(hairs, common * (1.0 - fair * jnp.minimum(1.5 * dark, 0.97)))
    grey = draw.uniform(0.55, 0.90)
    hair_color = jnp.where(old > 0, grey * jnp.asarray([1.0, 0.99, 0.97]), hair_color * draw.uniform(0.85, 1.15))
    light = jnp.asarray([0.0, 0, 0.3, 1, 1, 1, 1, 1])
    eye_color = draw.choice(eyes, 1.0 - light * jnp.minimum(1.3 * dark, 0.97))

    table = jnp.asarray(list(_HAIR_STYLES.values()), jnp.float32)
    style = draw.choice(table, table[:, -3:] @ jax.nn.one_hot(presentation.astype(int), 3))
    hair = dict(zip(_STYLE_COLUMNS[:-3], style[:-3], strict=True))
    mirror = jnp.where(draw.chance(0.5), 1.0, -1.0)
    hair["line_slope"] = mirror * hair["line_slope"] * draw.uniform(0.8, 1.2)
    hair["line_curve"] *= draw.uniform(0.85, 1.15)
    hair["line_height"] += draw.uniform(-0.02, 0.02)
    hair["hair_top"] *= draw.uniform(0.85, 1.2)
    hair["hair_side"] *= draw.uniform(0.85, 1.2)
    hair["hair_bottom"] += draw.uniform(-0.03, 0.03)

    skin_lip = skin * jnp.asarray([0.90, 0.62, 0.60])
    painted = draw.choice(jnp.asarray([(0.78, 0.22, 0.26), (0.72, 0.26, 0.34), (0.85, 0.40, 0.38), (0.58, 0.20, 0.26)]))
    paint = jnp.where(draw.chance(0.45), draw.uniform(0.4, 0.9), 0.15) * woman
    bearded = draw.chance(0.42) & (presentation == MAN)
    full = draw.chance(0.55)
    beard = jnp.where(bearded, jnp.where(full, draw.uniform(0.8, 1.0), draw.uniform(0.12, 0.3)), 0.0)
    moustache = jnp.where(bearded & full, beard, jnp.where(bearded & draw.chance(0.5), draw.uniform(0.7, 1.0), beard))

    clothes = draw.choice(jnp.asarray(_CLOTHES)) * draw.uniform(0.9, 1.08)
    collar = jnp.where(draw.chance(0.5), clothes * 0.82, draw.choice(jnp.asarray(_CLOTHES)))
    backdrop = draw.choice(jnp.asarray(_BACKGROUNDS)) * draw.uniform(0.9, 1.03)
    other = draw.choice(jnp.asarray(_BACKGROUNDS))
    values = dict(
        presentation=presentation, age=age,
        head_width=draw.uniform(0.375, 0.43) + 0.008 * man, head_height=draw.uniform(0.515, 0.555),
        jaw=draw.uniform(0.60, 0.80) + 0.12 * man, squareness=draw.uniform(0.05, 0.30) + 0.18 * man,
        ear_size=draw.uniform(0.080, 0.110), neck_width=draw.uniform(0.165, 0.185) + 0.045 * man,
        skin=skin, freshness=draw.uniform(0.25, 0.7) + 0.25 * woman,
        eye_color=eye_color, eye_spacing=draw.uniform(0.165, 0.190), eye_y=draw.uniform(-0.005, 0.045),
        eye_width=draw.uniform(0.086, 0.104), eye_height=draw.uniform(0.050, 0.068) + 0.006 * woman,
        eye_tilt=draw.uniform(-0.06, 0.16), lashes=jnp.clip(draw.uniform(0.4, 1.0) * woman + 0.1, 0.0, 1.0),
        brow_color=jnp.where(old > 0, hair_color * jnp.asarray([0.84, 0.78, 0.72]), hair_color * 0.55 + jnp.asarray([0.10, 0.05, 0.03])),
        brow_height=draw.uniform(0.118, 0.145) - 0.008 * man, brow_length=draw.uniform(0.085, 0.11),
        brow_thickness=draw.uniform(0.010, 0.015) + 0.006 * man, brow_arch=draw.uniform(0.005, 0.03) * (1 + woman),
        brow_tilt=draw.uniform(-0.10, 0.16),
        nose_y=draw.uniform(0.165, 0.21), nose_width=draw.uniform(0.050, 0.068) + 0.010 * man,
        nose_size=draw.uniform(0.036, 0.052), mouth_y=draw.uniform(0.315, 0.345),
        mouth_size=draw.uniform(0.132, 0.166), lip_upper=draw.uniform(0.018, 0.030) + 0.004 * woman,
        lip_lower=draw.uniform(0.026, 0.040) + 0.006 * woman, lip_color=skin_lip + (painted - skin_lip) * paint,
        hair_color=hair_color, part_x=mirror * draw.uniform(0.0, 0.10), **hair,
        beard=beard, moustache=moustache,
        glasses=draw.chance(0.28).astype(jnp.float32), glasses_size=draw.uniform(0.118, 0.140),
        glasses_round=draw.uniform(0.0, 1.0), glasses_color=draw.choice(jnp.asarray(_GLASSES)),
        earrings=(draw.chance(0.4) & (presentation != MAN)).astype(jnp.float32),
        clothes_color=clothes, collar_color=collar,
        neckline=draw.uniform(0.02, 0.16), neckline_v=draw.chance(0.35).astype(jnp.float32),
        turtleneck=draw.chance(0.16).astype(jnp.float32), shoulder_width=draw.uniform(0.70, 0.80) + 0.12 * man,
        background_top=backdrop, background_bottom=backdrop * draw.uniform(0.72, 0.92),
        background_glow=backdrop + (other - backdrop) * draw.uniform(0.1, 0.5),
    )  # fmt: skip
    return Identity(**{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def hard_distractor(key: PRNGKeyArray, identity: Identity) -> Identity:
    """Another face under the same hair, clothes, accessories and background: a test that identity is more than hair."""
    other = sample_identity(key)
    return replace(identity, **{name: getattr(other, name) for name in _FACE_FIELDS})


def presentation_name(identity: Identity) -> str:
    """The words "woman", "man" or "person", with "older " in front where it applies; for one identity, outside jit."""
    name = PRESENTATIONS[int(identity.presentation)]
    return f"older {name}" if float(identity.age) > OLDER_AGE else name


class _Draw:
    """Hands out one random value after another, so that a long list of parameters reads as a list.

    All of them come from one draw: dozens of small ones would take seconds to compile.
    """

    _MOST = 128

    def __init__(self, key: PRNGKeyArray):
        self._values, self._count = jax.random.uniform(key, (self._MOST,)), 0

    def _next(self) -> Float[Array, ""]:
        self._count += 1
        assert self._count <= self._MOST
        return self._values[self._count - 1]

    def uniform(self, low: float, high: float) -> Float[Array, ""]:
        return low + (high - low) * self._next()

    def chance(self, probability: float) -> Array:
        return self._next() < probability

    def choice(self, rows: Array, weights: Array | None = None) -> Array:
        weights = jnp.ones(len(rows)) if weights is None else weights
        edges = jnp.cumsum(weights)
        return rows[jnp.minimum((self._next() * edges[-1] >= edges).sum(), len(rows) - 1)]


def _interpolate(rows: Float[Array, "n 3"], at: Float[Array, ""]) -> Float[Array, "3"]:
    low = jnp.clip(at.astype(int), 0, len(rows) - 2)
    return rows[low] + (rows[low + 1] - rows[low]) * (at - low)
