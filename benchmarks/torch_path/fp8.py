"""Linear layers in fp8: e4m3 weights with a scale per output channel, activations with a scale per token made at run time."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

_LARGEST = 448.0  # of e4m3


def quantise(x: Float[Tensor, "n c"]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n 1"]]:
    """e4m3 values and the float32 scale of every row; x is about values * scale."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn), scale


class Linear8(nn.Module):
    """`nn.Linear` with its weight kept and multiplied in e4m3; the result is scaled in float32 and rounded to the input's dtype.

    On CUDA this is `torch._scaled_mm` with scales by rows (Hopper or later, bfloat16 results); elsewhere the same numbers are
    multiplied in float32, which defines what the former computes.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantise(linear.weight.detach())
        self.register_buffer("weight", weight)  # [out, in]
        self.register_buffer("scale", scale.T.contiguous())  # [1, out]
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        values, scale = quantise(x.flatten(0, -2))
        if x.is_cuda:
            out = self.scaled_product(values, scale, x.dtype)
        else:
            out = (values.float() @ self.weight.float().T * scale * self.scale + self.bias.float()).to(x.dtype)
        return out.unflatten(0, x.shape[:-1])

    def scaled_product(self, values: Float[Tensor, "n i"], scale: Float[Tensor, "n 1"], dtype: torch.dtype) -> Float[Tensor, "n o"]:
        """The whole product and its scaling as one kernel."""
        return torch._scaled_mm(
            values, self.weight.T, scale, self.scale, bias=self.bias, out_dtype=dtype, use_fast_accum=True
        )


def to_fp8(module: nn.Module, names: tuple[str, ...]) -> None:
    """Replaces the linear layers of `module` at these dotted paths.

    Raises:
      ValueError: a width is not a multiple of 16, which the fp8 product needs.
    """
    for name in names:
        linear = module.get_submodule(name)
        if linear.in_features % 16 or linear.out_features % 16:
            raise ValueError(f"fp8: {name} is {linear.in_features} -> {linear.out_features}; both must be multiples of 16")
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, Linear8(linear))
