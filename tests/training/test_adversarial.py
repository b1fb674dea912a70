"""Hinge losses and the balance by hand, R1 against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pikastream_jax.training.adversarial import discriminator_hinge, generator_hinge, gradient_balance, r1_penalty


def test_hinge_losses_by_hand():
    real, fake = jnp.array([2.0, 0.5, -1.0, 1.0]), jnp.array([-3.0, 0.5])
    assert discriminator_hinge(real, fake) == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1.5) / 2)
    assert generator_hinge(fake) == pytest.approx(1.25)


def test_the_balance_by_hand():
    truth = {"kernel": jnp.array([[3.0, 0.0], [0.0, 4.0]])}  # length 5
    adversarial = {"kernel": jnp.array([[0.0, 0.5], [0.0, 0.0]])}
    assert gradient_balance(truth, adversarial, 100.0) == pytest.approx(10.0, rel=1e-5)
    assert gradient_balance(truth, adversarial, 4.0) == 4.0
    assert gradient_balance(truth, jax.tree.map(jnp.zeros_like, adversarial), 7.0) == 7.0
    # It weighs gradients, it is not one.
    gradient = jax.grad(lambda scale: gradient_balance(jax.tree.map(lambda x: scale * x, truth), adversarial, 100.0))(
        1.0
    )
    assert gradient == 0


def test_r1_against_its_closed_form():
    """Answers 0.5 sum_j a_ij x_j^2 have the gradient x_j sum_i a_ij; the penalty's own gradient is known, too."""
    rng = np.random.default_rng(0)
    weights, video = rng.normal(size=(3, 5)), rng.normal(size=(2, 5))

    def penalty(weights):
        return r1_penalty(lambda x: 0.5 * jnp.einsum("ij,bj->bi", weights, x**2), jnp.asarray(video, jnp.float32))

    value, gradient = jax.value_and_grad(penalty)(jnp.asarray(weights, jnp.float32))
    total = weights.sum(axis=0)
    assert value == pytest.approx(0.5 * ((video * total) ** 2).sum() / 6, rel=1e-5)
    np.testing.assert_allclose(gradient, np.tile((video**2).sum(axis=0) * total / 6, (3, 1)), rtol=1e-4)


def test_r1_does_not_depend_on_the_size_of_the_crop():
    answer = lambda video: 3.0 * video.reshape(*video.shape[:2], -1, 4).mean(axis=-1)  # noqa: E731
    small, large = (r1_penalty(answer, jnp.ones((2, 1, size))) for size in (8, 64))
    assert small == pytest.approx(float(large)) == pytest.approx(0.5 * 9 / 4)
