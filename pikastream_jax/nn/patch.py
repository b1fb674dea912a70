"""Pictures to tokens and back: pure reshapes."""

from jaxtyping import Array, Float


def patchify(x: Float[Array, "*b h w c"], patch: int) -> Float[Array, "*b n p"]:
    """Cuts [h, w] into patch x patch tokens, row by row; a token's values run row, column, channel."""
    *batch, h, w, c = x.shape
    # A patch's row of pixels stays whole, which keeps the copy's innermost run long.
    x = x.reshape(-1, h // patch, patch, w // patch, patch * c).swapaxes(2, 3)
    return x.reshape(*batch, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(x: Float[Array, "*b n p"], patch: int, rows: int, columns: int) -> Float[Array, "*b h w c"]:
    """The inverse of `patchify` (pixel shuffle) for a grid of rows x columns tokens."""
    *batch, _, width = x.shape
    c = width // (patch * patch)
    x = x.reshape(-1, rows, columns, patch, patch * c).swapaxes(2, 3)
    return x.reshape(*batch, rows * patch, columns * patch, c)
