"""The models as they are trained: weights cast to the precision of the products, the DiT's blocks stacked for a scan.

Files, checkpoints and training states hold one array per parameter and block in float32, Wan's names, whatever the form: a run may change its form, a
student starts from any teacher, an export is a copy. The form is made inside the loss. Stacking in the state instead was
considered: it would save a copy of the weights, but in bfloat16 the cast makes that copy anyway, and the two are one pass; it would also put a second
layout into every file, and Muon stacks matrices by shape already.

Gradients, averages and the optimiser's state are float32: they flow back through the cast. Norms, modulation and softmax are computed in float32 in
any form.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pikastream_jax.dit.layers import REMATERIALISE, BlocksTracedOnce, ScannedBlocks
from pikastream_jax.nn.layers import Functional, Params
from pikastream_jax.streaming.step import Models

Precision = Literal["float32", "bfloat16"]
Layers = Literal["unrolled", "scan"]
Rematerialise = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model is computed in training."""

    precision: Precision = "float32"
    """Of weights and activations in the forward and backward pass; the weights that are kept are float32."""
    layers: Layers = "unrolled"
    """The DiT's blocks one after another, or scanned, which compiles one instead of all."""
    rematerialise: Rematerialise = "none"
    """What the DiT's blocks keep for the backward pass: everything, products with weights ("dots"), or their input alone ("full"); the rest is
    computed again."""

    def __post_init__(self):
        known = {"precision": ("float32", "bfloat16"), "layers": ("unrolled", "scan"), "rematerialise": tuple(REMATERIALISE)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(values)}")


@dataclasses.dataclass(frozen=True)
class TrainingForm(Functional):
    """A model whose `bind` takes float32 parameters, one block a piece, and gives the module in its form."""

    form: Form

    def bind(self, params: Params) -> Any:
        module = super().bind(in_precision(params, self.form.precision))
        if "dit" in self.abstract:
            module.dit.rematerialise = self.form.rematerialise
            module.dit.blocks = (ScannedBlocks if self.form.layers == "scan" else BlocksTracedOnce)(module.dit.blocks)
        return module


def training_form(model: Functional, form: Form) -> TrainingForm:
    """`model` as `form` says.

    Raises:
      ValueError: it has no DiT, and the form says how one is computed.
    """
    if "dit" not in model.abstract and dataclasses.replace(form, precision="float32") != Form():
        raise ValueError(f"layers {form.layers!r}, rematerialise {form.rematerialise!r}: only stages of the DiT take these, leave them out")
    return TrainingForm(model.graph, model.abstract, form)


def training_models(models: Models, form: Form) -> Models:
    """The models of a stream to roll out with gradients: the denoiser in its form, caches in its precision."""
    config = dataclasses.replace(models.config, stream=dataclasses.replace(models.config.stream, precision=form.precision))
    return Models(config, training_form(models.denoiser, form), models.flash_vae)


def in_precision(params: Params, precision: Precision) -> Params:
    """The float32 leaves cast; gradients through the cast are float32. What is kept in less, a teacher, stays in that."""
    return jax.tree.map(lambda leaf: leaf.astype(precision) if leaf.dtype == jnp.float32 else leaf, params)
