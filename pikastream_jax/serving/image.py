"""The reference picture: a file or a face of the gallery, as the pixels that the model takes."""

import importlib.resources
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from pikastream_jax.serving.errors import ServeError

MIN_SIDE = 64  # pixels; below this there is no face to see
MAX_PIXELS = 40_000_000  # checked before decoding, so that a small file cannot fill the memory
BACKDROP = (128, 128, 128)  # neutral grey behind transparent pictures


def avatar_names() -> list[str]:
    """Names of the shipped avatars, sorted."""
    gallery = _gallery()
    files = [path.name for path in gallery.iterdir()] if gallery.is_dir() else []
    return sorted(name.removesuffix(".png") for name in files if name.endswith(".png"))


def avatar_path(name: str | None) -> Path:
    """The picture of avatar `name`; None: the first one.

    Raises:
      ServeError: no avatar has that name.
    """
    names = avatar_names()
    if not names:
        raise ServeError("no avatars are installed; give --image FILE")
    if name is None:
        name = names[0]
    if name not in names:
        raise ServeError(f"no avatar is called {name!r}; choose one of {', '.join(names)}")
    return Path(str(_gallery() / f"{name}.png"))


def load_image(path: Path | io.BytesIO, formats: Sequence[str] | None = None) -> Image.Image:
    """Decodes a picture: EXIF rotation applied, transparency on neutral grey, RGB.

    Args:
      path: a file, or one that is open.
      formats: what it may be, of Pillow's names; anything that Pillow reads by default.

    Raises:
      ServeError: it cannot be read, is no picture, or is too small or too large.
    """
    name = path if isinstance(path, Path) else "upload"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            picture = Image.open(path, formats=formats)
        with picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ServeError(
                    f"image {name} has {width}x{height} pixels; the limit is {MAX_PIXELS // 10**6} million, so shrink it"
                )
            if min(width, height) < MIN_SIDE:
                raise ServeError(
                    f"image {name} has {width}x{height} pixels; each side needs at least {MIN_SIDE}, so give a larger one"
                )
            image = ImageOps.exif_transpose(picture)
            image.load()
    except Image.DecompressionBombError as error:
        raise ServeError(f"image {name} has far more than {MAX_PIXELS // 10**6} million pixels; shrink it") from error
    except Image.UnidentifiedImageError as error:
        raise ServeError(f"{name} is not an image; give PNG, JPEG or WebP") from error
    except FileNotFoundError as error:
        raise ServeError(f"cannot read image {name}: {error.strerror}") from error
    except IsADirectoryError as error:
        raise ServeError(f"image {name} is a directory; give a file") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's decoders raise all three on damaged files
        raise ServeError(f"cannot read image {name}: {getattr(error, 'strerror', None) or error}") from error
    if image.mode.startswith(("I", "F")):  # 16-bit grey, which Pillow would clip instead of scale
        levels = np.asarray(image, np.float32)
        image = Image.fromarray((levels / max(255.0, float(levels.max())) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKDROP, 255)), image)
    return image.convert("RGB")


def reference_pixels(image: Image.Image, height: int, width: int) -> UInt8[np.ndarray, "height width 3"]:
    """The largest middle part of an RGB picture that has the aspect of `height` x `width`, resized to that."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS), np.uint8)


def _gallery():
    return importlib.resources.files("pikastream_jax") / "assets" / "avatars"
