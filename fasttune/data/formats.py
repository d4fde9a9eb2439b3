"""What a file is by its ending: an image that Pillow reads, one that is refused by name, text, or
something else, which is counted."""

import functools

from PIL import Image, features

COMMON = (".jpg", ".png", ".webp", ".avif", ".tif", ".bmp", ".gif", ".jp2", ".tga")
"""Shown where all of them would be too many."""

NOT_PICTURES = frozenset(
    {"BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "WMF"}
)
"""Formats of Pillow that hold drawings, films or measurements. Left out whatever a file is called:
EPS would start Ghostscript, and the others need handlers that are not there."""

_RAW = (
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw "
    ".rw2 .rwl .sr2 .srf .srw .x3f"
)
_FILM = ".3gp .avi .flc .fli .flv .gifv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv"
_DRAWING = ".ai .cdr .emf .eps .indd .pdf .ps .svg .svgz .wmf"
_OTHER = {
    ".bpg": "BPG",
    ".clip": "Clip Studio",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    ".heic": "HEIC",
    ".heif": "HEIF",
    ".hif": "HEIF",
    ".jxl": "JPEG XL",
    ".jxr": "JPEG XR",
    ".kra": "Krita",
    ".psb": "PSB",
    ".wdp": "JPEG XR",
    ".xcf": "GIMP",
}
_REFUSED = {
    **dict.fromkeys(_RAW.split(), "is a camera's raw file; develop it to PNG, TIFF or JPEG"),
    **dict.fromkeys(_FILM.split(), "is a film; save the frames you want as images"),
    **dict.fromkeys(_DRAWING.split(), "is a drawing or document; export it as PNG"),
    **{
        extension: f"{name} is not supported; convert it to PNG, JPEG or WebP"
        for extension, name in _OTHER.items()
    },
}
_TEXT = frozenset(
    ".caption .csv .htm .html .ini .json .jsonl .log .md .parquet .toml .tsv .txt .xml .yaml .yml".split()
)


@functools.cache
def readable() -> frozenset[str]:
    """Lower-case endings of the images that are read: all that Pillow, and plug-ins that were
    imported before, can open, without `NOT_PICTURES`."""
    registered = Image.registered_extensions()
    opened = {
        extension
        for extension, name in registered.items()
        if name in Image.OPEN and name not in NOT_PICTURES
    }
    return frozenset(opened | {".avif", ".mpo"})  # the one by name below, the other a JPEG


@functools.cache
def opened_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that a file may have inside, the frequent ones first."""
    readable()  # loads the plug-ins
    first = ["JPEG", "PNG", "WEBP"]
    others = [name for name in Image.ID if name not in NOT_PICTURES and name not in first]
    return (*(name for name in first if name in Image.OPEN), *others)


def refusal(extension: str) -> str | None:
    """Why files of this (lower-case) ending are refused unopened; None if they are not."""
    if extension == ".avif" and not features.check("avif"):
        return "this Pillow is built without AVIF; install a newer Pillow or convert the file"
    return None if extension in readable() else _REFUSED.get(extension)


def is_picture(extension: str) -> bool:
    """Whether files of this (lower-case) ending are read, or refused by name."""
    return extension in readable() or extension in _REFUSED


def is_text(extension: str) -> bool:
    """Whether it is an ending of captions, tables and notes, which nobody expects to be trained on."""
    return extension in _TEXT
