"""Rotary position embedding in three dimensions (time, height, width), interleaved pairs, and patches: both are pure index work."""

import torch
from jaxtyping import Float
from torch import Tensor

Tables = tuple[Float[Tensor, "n 1 e"], Float[Tensor, "n 1 e"]]  # cosines, and sines that are negative at even channels


class Rope:
    """Tables of every token of whole frames on one grid.

    All that does not change while a stream runs is computed here once, so that `tables` may be captured in a CUDA graph.
    """

    def __init__(self, head_dim: int, rows: int, columns: int, device: torch.device | str, theta: float = 10_000.0):
        spatial = 2 * (head_dim // 6)  # channels that turn with height, and with width: 42 of 128
        frequencies = []
        for width in (head_dim - 2 * spatial, spatial, spatial):
            exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
            frequencies.append((theta**-exponent).float())
        row = torch.arange(rows).repeat_interleave(columns).float()
        column = torch.arange(columns).repeat(rows).float()
        place = torch.cat([row[:, None] * frequencies[1], column[:, None] * frequencies[2]], dim=1)
        self.time_frequency = frequencies[0].to(device)
        self.place_angle = place.to(device)  # [rows columns, pairs of height and width]

    def tables(self, times: Float[Tensor, "f"]) -> Tables:
        """Tables for n = f x rows x columns tokens, frame by frame.

        Args:
          times: every frame's place in time; a float, since it may be relative to the current chunk.
        """
        frames, places = times.shape[0], self.place_angle.shape[0]
        time = (times[:, None] * self.time_frequency)[:, None].expand(-1, places, -1)
        angle = torch.cat([time, self.place_angle.expand(frames, -1, -1)], dim=-1).flatten(0, 1)
        cos, sin = angle.cos(), angle.sin()
        return torch.stack([cos, cos], dim=-1).flatten(1)[:, None], torch.stack([-sin, sin], dim=-1).flatten(1)[:, None]


def rotate(x: Float[Tensor, "*b n h e"], tables: Tables) -> Float[Tensor, "*b n h e"]:
    """Turns each pair (2i, 2i + 1) of channels by its token's angle, in float32.

    Written with the pair's other channel read beside its own, so that the compiler makes one elementwise kernel without a concatenation.
    """
    cos, sin = tables
    other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + other.float() * sin).to(x.dtype)


def patchify(x: Float[Tensor, "*b h w c"], patch: int) -> Float[Tensor, "*b n p"]:
    """Cuts [h, w] into patch x patch tokens, row by row; a token's values run row, column, channel."""
    x = x.unflatten(-2, (-1, patch)).unflatten(-4, (-1, patch)).transpose(-3, -4)  # [.., rows, columns, patch, patch, c]
    return x.flatten(-3).flatten(-3, -2)


def unpatchify(x: Float[Tensor, "*b n p"], patch: int, rows: int, columns: int) -> Float[Tensor, "*b h w c"]:
    """The inverse of `patchify` for a grid of rows x columns tokens."""
    x = x.unflatten(-1, (patch, patch, -1)).unflatten(-4, (rows, columns)).transpose(-3, -4)
    return x.flatten(-3, -2).flatten(-4, -3)
