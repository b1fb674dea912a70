"""What a stream's past cannot foretell, told to the DiT in a few numbers: blinks, jumps of the eyes, the head's next turn.

Regression answers pure noise with the mean of what may follow, and the mean face of a listener never blinks: at the first of four steps
the share of faces that blink is a few percent, and the three steps left can't make a blink of so faint a trace. So the DiT is told what
the motion of each latent frame has of news. Motion is predicted from the latent frames before by linear regression; each quantity's
remainder, put on a Gaussian scale by its rank, is a number that in training comes from the clip and in a stream from the seed. What is
random in the motion is then drawn before the face is, as often as the clips have it, and the lips know nothing of it.

The idea of a predictor's innovations is Wiener's and Kalman's; a motion code that is drawn apart from the picture is common in talking
faces (VASA-1, arXiv 2404.10667; FLOAT, arXiv 2412.01064).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pikastream_jax.measuring.estimator import COLUMNS

QUANTITIES = ("yaw", "pitch", "roll", "gaze_x", "gaze_y", "blink")
_OPEN = -0.3  # of `blink` as `READERS` scales it: what lies above has begun before, and its end is no news
_LAGS = 3  # latent frames that are looked back to
_RANKS = 513
_JITTER = 0.01  # splits ties, as between all latent frames without a blink; of the quantity's scale in `READERS`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Innovations:
    """Linear predictors for latent frames with 1 to l predecessors, and how what they miss is distributed."""

    weights: Float[Array, "l k i"]  # on (l predecessors, the quantities before this one, 1); zero where there is none
    ranks: Float[Array, "l k r"]  # evenly spaced quantiles of the remainder


def motion(truth: Float[Array, "*b f o"]) -> Float[Array, "*b f k"]:
    """The columns of `true_readings` that `QUANTITIES` name."""
    return truth[..., np.array([COLUMNS.tolist().index(name) for name in QUANTITIES])]


def fit_innovations(truth: Float[np.ndarray, "n f o"]) -> Innovations:
    """Least squares over all clips.

    Raises:
      ValueError: the clips are too short to look back that far.
    """
    moved = np.asarray(motion(truth), np.float64)
    _, f, k = moved.shape
    if f <= _LAGS:
        raise ValueError(f"clips of {f} latent frames: motion is predicted from {_LAGS} before, make clips of at least {_LAGS + 1}")
    weights, ranks = np.zeros((_LAGS, k, _LAGS * k + k + 1)), np.zeros((_LAGS, k, _RANKS))
    rng = np.random.default_rng(0)
    for lags in range(1, _LAGS + 1):
        rows = np.concatenate([_inputs(moved, frame, lags) for frame in range(lags, f)])
        wanted = np.concatenate([moved[:, frame] for frame in range(lags, f)])
        for quantity in range(k):
            known = _known(lags, quantity, k)
            weights[lags - 1, quantity, known] = np.linalg.lstsq(rows[:, known], wanted[:, quantity], rcond=None)[0]
        left = wanted - rows @ weights[lags - 1].T
        left = left + rng.uniform(-_JITTER, _JITTER, left.shape)
        begun = np.concatenate([_begun(moved[:, frame - 1]) for frame in range(lags, f)])
        for quantity in range(k):
            ranks[lags - 1, quantity] = np.quantile(left[~begun[:, quantity], quantity], np.linspace(0.0, 1.0, _RANKS))
    return Innovations(jnp.asarray(weights, jnp.float32), jnp.asarray(ranks, jnp.float32))


def _inputs(moved, frame: int, lags: int):
    """Rows [n, i] for one latent frame: its predecessors, nearest first, what it is itself, and 1."""
    xp = jnp if isinstance(moved, jax.Array) else np
    n, _, k = moved.shape
    past = [moved[:, frame - lag] if lag <= lags else xp.zeros((n, k)) for lag in range(1, _LAGS + 1)]
    return xp.concatenate([*past, moved[:, frame], xp.ones((n, 1))], axis=1)


def _begun(before: Float[Array, "n k"]) -> Bool[Array, "n k"]:
    """Where a blink had begun in the latent frame before: it goes on by itself."""
    return (before > _OPEN) & (np.array(QUANTITIES) == "blink")


def _known(lags: int, quantity: int, k: int) -> np.ndarray:
    """Columns of `_inputs` that a quantity is predicted from."""
    return np.r_[0 : lags * k, _LAGS * k : _LAGS * k + quantity, _LAGS * k + k]


def innovations(fitted: Innovations, truth: Float[Array, "b f o"], key: Array) -> Float[Array, "b f k"]:
    """What is new in each latent frame, standard normal over clips; anything where there is no past to go by, or nothing new by it."""
    k_any, k_jitter = jax.random.split(key)
    moved = motion(jnp.asarray(truth))
    _, f, _ = moved.shape
    anything = jax.random.normal(k_any, moved.shape)
    jitter = jax.random.uniform(k_jitter, moved.shape, minval=-_JITTER, maxval=_JITTER)
    told = [anything[:, 0]]
    for frame in range(1, f):
        lags = min(frame, _LAGS)
        left = moved[:, frame] - _inputs(moved, frame, lags) @ fitted.weights[lags - 1].T + jitter[:, frame]
        share = jax.vmap(lambda x, r: jnp.interp(x, r, jnp.linspace(0.0, 1.0, _RANKS)), in_axes=(1, 0), out_axes=1)(left, fitted.ranks[lags - 1])
        news = jax.scipy.stats.norm.ppf(jnp.clip(share, 0.5 / _RANKS, 1.0 - 0.5 / _RANKS))
        told.append(jnp.where(_begun(moved[:, frame - 1]), anything[:, frame], news))
    return jnp.stack(told, axis=1)
