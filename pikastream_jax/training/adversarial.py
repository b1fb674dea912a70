"""What a decoder and its discriminator play by: hinge losses, R1, and the weight that balances their gradients.

Sources: hinge loss: Lim and Ye, "Geometric GAN", 2017. R1: Mescheder, Geiger and Nowozin, "Which training methods for GANs do actually
converge?", 2018; every few updates only, with the weight made up for: Karras et al., StyleGAN2, 2020. Balance: Esser, Rombach and
Ommer, "Taming Transformers" (VQGAN), 2021, equation 7.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def discriminator_hinge(real: Float[Array, "*b"], fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Mean over answers of max(0, 1 - real) + max(0, 1 + fake): an answer that is right by a margin of 1 costs nothing."""
    return jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake))


def generator_hinge(fake: Float[Array, "*b"]) -> Float[Array, ""]:
    """Minus the mean answer: the decoder wants to be taken for filmed, however sure the discriminator is."""
    return -jnp.mean(fake)


def r1_penalty(discriminate: Callable[[Array], Array], video: Float[Array, "b *s"]) -> Float[Array, ""]:
    """Half the squared gradient of the answers with respect to filmed video, summed over pixels, a mean over answers.

    Divided by the number of answers, so that its weight does not depend on the size of a crop.
    """
    answers, pull = jax.vjp(discriminate, video)
    (gradient,) = pull(jnp.ones_like(answers))
    return 0.5 * jnp.sum(gradient**2) / answers.size


def gradient_balance(reconstruction: PyTree[Array], adversarial: PyTree[Array], largest: float) -> Float[Array, ""]:
    """The weight that makes the adversarial gradient as long as that of the reconstruction, at most `largest`.

    Args:
      reconstruction: gradient of the losses against the truth with respect to the decoder's last layer.
      adversarial: gradient of `generator_hinge` with respect to the same.
      largest: a bound for the times when the discriminator has no opinion, and its gradient vanishes.
    """
    ratio = _length(reconstruction) / (_length(adversarial) + 1e-8)
    return jax.lax.stop_gradient(jnp.minimum(ratio, largest))


def _length(gradient: PyTree[Array]) -> Float[Array, ""]:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
