"""The convolutional decoder that ours is compared with: shapes, causality, the convolution itself, and its size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import preset
from pikastream_jax.flash_vae.conv3d import (
    CausalConv,
    Conv3DDecoder,
    conv3d_parameters,
    decoder_parameters,
    matching_width,
)
from pikastream_jax.nn.layers import functional, parameter_count
from tests.small import randomised, small_config, small_models

CONFIG = small_config().flash_vae


def test_a_frame_does_not_depend_on_later_latents():
    model = functional(lambda rngs: Conv3DDecoder(CONFIG, 1.0, rngs=rngs))
    params = randomised(model.abstract, 0)
    decode = jax.jit(lambda latents: model.bind(params)(latents))
    latents = np.random.default_rng(0).normal(size=(1, 3, 2, 3, 4)).astype(np.float32)
    changed = latents.copy()
    changed[:, 2] += 1.0
    before, after = decode(latents), decode(changed)
    assert before.shape == (1, 12, 16, 24, 3)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(np.asarray(before - after))[:, 8:].max() > 1e-3


def test_the_convolution_is_the_causal_one_of_three_dimensions():
    model = functional(lambda rngs: CausalConv(2, 3, rngs=rngs))
    params = randomised(model.abstract, 0)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 5, 3, 2)), jnp.float32)
    kernel = params["kernel"].reshape(3, 3, 3, 2, 3).transpose(2, 0, 1, 3, 4)  # kept as rows, columns, time
    dimensions = ("NTHWC", "THWIO", "NTHWC")
    wanted = jax.lax.conv_general_dilated(x, kernel, (1, 1, 1), [(2, 0), (1, 1), (1, 1)], dimension_numbers=dimensions)
    np.testing.assert_allclose(model.bind(params)(x), wanted + params["bias"], atol=1e-5)


def test_it_has_as_many_parameters_as_flash_vae():
    config = preset("tiny").flash_vae
    wanted, found = decoder_parameters(config), conv3d_parameters(config, matching_width(config))
    assert abs(found - wanted) <= 0.05 * wanted


def test_parameters_are_counted_right():
    for config, width in ((CONFIG, 1.6), (dataclasses.replace(CONFIG, spatial_stride=16), 3.0)):
        abstract = functional(lambda rngs, c=config, w=width: Conv3DDecoder(c, w, rngs=rngs)).abstract
        assert parameter_count(abstract) == conv3d_parameters(config, width)
    _, params = small_models(small_config())
    encoder = ("patch_in", "encoder", "norm_moments", "moments")
    of_decoder = {name: part for name, part in params.flash_vae.items() if name not in encoder}
    assert decoder_parameters(CONFIG) == parameter_count(of_decoder)


def test_strides_that_do_not_double_are_refused():
    with pytest.raises(ValueError, match="spatial_stride 12 must be a power of two"):
        matching_width(dataclasses.replace(CONFIG, spatial_stride=12))
