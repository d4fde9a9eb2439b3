"""Decoding: any file Pillow reads becomes an upright 8-bit sRGB image, or is refused with a reason.

What this handles that `Image.open(path).convert("RGB")` gets wrong: EXIF orientation, transparency
(which would show whatever colour hides under it), 16-bit gray (which Pillow clips to white), colours
in another profile than sRGB, and animations (of which one frame would silently be taken).
"""

import functools
import io
import logging
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, TiffImagePlugin
from torch import Tensor

from fasttune.data.buckets import CropPlan
from fasttune.data.formats import opened_formats
from fasttune.errors import DatasetError

log = logging.getLogger(__name__)

MAX_PIXELS = 2**28
"""Larger images are refused: 2^28 pixels are 805 MB decoded."""
ENCODING_VERSION = 1
"""Part of every latent's key; raised when decoding or resizing gives other pixels."""

# Pillow's own limit warns from 89 megapixels on, which phones exceed. `_open` refuses more than
# MAX_PIXELS from the header alone, before anything is decoded.
Image.MAX_IMAGE_PIXELS = None

ORIENTATION_TAG = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(DatasetError):
    """An image that cannot be used, and why."""

    def __init__(self, path: str, reason: str, *, lasting: bool) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.lasting = lasting
        """The file itself is at fault: trying again before it changes is of no use."""


def measure(path: str) -> tuple[int, int]:
    """(width, height) after EXIF orientation, from the header. Raises BadImageError."""
    image = _open(path)
    with image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(path: str) -> Image.Image:
    """An upright RGB image in sRGB. Raises BadImageError for what cannot be read completely.

    Rejected: letting libjpeg reduce large JPEGs while it decodes them (Pillow's draft mode). It
    is 3 times as fast, but even reduced to no less than twice the size that is needed the pixels
    differ by 1 to 2.4 of 255 RMS, and by up to 51 at edges (photographs of scikit-image).
    """
    image = _open(path)
    try:
        with image:
            turn = _orientation(image)
            image.load()
            rgb = _to_rgb(image, path)
    except BadImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, IndexError, ...
        raise _bad(path, error) from error
    return rgb.transpose(TRANSPOSE[turn]) if turn in TRANSPOSE else rgb


def crop_and_resize(image: Image.Image, crop_plan: CropPlan) -> Tensor:
    """(3, target_height, target_width) uint8, Lanczos.

    Only the pixels of the crop are computed; but for rounding they are those of resizing the whole
    image first.
    """
    p = crop_plan
    x, y = image.width / p.resize_width, image.height / p.resize_height
    box = (p.left * x, p.top * y, (p.left + p.target_width) * x, (p.top + p.target_height) * y)
    box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
    resized = image.resize((p.target_width, p.target_height), Image.Resampling.LANCZOS, box=box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _bad(path: str, error: Exception) -> BadImageError:
    if isinstance(error, OSError) and error.errno is not None:
        return BadImageError(path, f"cannot be opened: {error.strerror}", lasting=False)
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImageError(path, "is not an image that Pillow can read", lasting=True)
    return BadImageError(path, f"is damaged or cut off ({error})", lasting=True)


def _open(path: str) -> Image.Image:
    """Header alone, with everything refused that can be seen there."""
    try:
        image = Image.open(path, formats=opened_formats())
    except Exception as error:  # as in load_image
        raise _bad(path, error) from error
    try:
        if image.width * image.height > MAX_PIXELS:
            reason = f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read"
            raise BadImageError(path, reason, lasting=True)
        # Phones write MPO: a JPEG with a second view or a depth map behind the photo.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            reason = f"has {frames} frames (an animation or several pages); save the one you want"
            raise BadImageError(path, reason, lasting=True)
    except BadImageError:
        image.close()
        raise
    except Exception as error:  # as in load_image
        image.close()
        raise _bad(path, error) from error
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    try:
        turn = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF: any error, and the picture is fine without
        log.debug("unreadable EXIF in %s", getattr(image, "filename", "image"))
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


def _to_rgb(image: Image.Image, path: str) -> Image.Image:
    mode, profile = image.mode, image.info.get("icc_profile")
    if mode.startswith("I") or mode == "F":
        return _deep_gray_to_rgb(image, path)
    if mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        if mode in ("RGB", "RGBA", "P", "PA"):
            rgba = _to_srgb(rgba, profile)
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if mode in ("P", "YCbCr", "HSV", "1"):
        return _to_srgb(image.convert("RGB"), profile)
    if mode in ("RGB", "L", "CMYK", "LAB"):
        converted = _to_srgb(image, profile)
        if converted.mode == "LAB":
            raise BadImageError(path, "is in CIELAB; convert it to RGB", lasting=True)
        return converted.convert("RGB")
    raise BadImageError(path, f"has the unsupported mode {mode}", lasting=True)


def _deep_gray_to_rgb(image: Image.Image, path: str) -> Image.Image:
    """Gray of 9 to 16 bits: its white becomes 255. Pillow's convert would clip all above 255.

    White follows from the depth that the file states, not from its largest value: a dark
    picture stays dark.
    """
    white = _white(image)
    if white is None:
        reason = "has 32-bit pixels without a defined white; convert it to 8 or 16 bits"
        raise BadImageError(path, reason, lasting=True)
    values = np.asarray(image).astype(np.int64)
    gray = ((values.clip(0, white) * 255 + white // 2) // white).astype(np.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        gray = np.where(values == clear, np.uint8(255), gray)
    return Image.fromarray(gray).convert("RGB")


def _white(image: Image.Image) -> int | None:
    """The value of white in gray of more than 8 bits; None where nothing defines it."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0]
        return (1 << bits) - 1 if 8 < bits <= 16 else None
    # These end at 16 bits; Pillow scales fewer up to them (PPM, JPEG 2000) and calls some I.
    scaled = image.format in ("PNG", "PPM", "JPEG2000") and image.mode != "F"
    return 65535 if scaled else None


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """Colours of an embedded profile to sRGB; unchanged without one, or if it is unusable."""
    if not isinstance(profile, bytes) or not profile:
        return image
    transform = _transform(profile, image.mode)
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode in ("RGB", "RGBA") and "sRGB" in ImageCms.getProfileDescription(source):
            return None
        output = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, output)
    except (ImageCms.PyCMSError, OSError) as error:
        log.info("an embedded colour profile is unusable and ignored (%s)", error)
        return None
