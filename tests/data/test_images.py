"""Every kind of image file, compared with what the picture was before it was written."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from fasttune.data import images
from fasttune.data.buckets import Buckets, CropPlan, plan
from fasttune.data.images import BadImageError, crop_and_resize, load_image, measure

ORIENTED = {  # EXIF orientation -> what a viewer does to the stored pixels, as numpy operations
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, k=-1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, k=1),
}


def photo(width: int = 40, height: int = 24) -> np.ndarray:
    """Smooth colours that differ in every corner, (height, width, 3) uint8."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 128 + 0 * x], -1).astype("u1")


def loaded(path: Path) -> np.ndarray:
    image = load_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "tiff", "webp"])
def test_lossless_files_come_back_exactly(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    options = {"lossless": True} if extension == "webp" else {}
    Image.fromarray(photo()).save(path, **options)
    np.testing.assert_array_equal(loaded(path), photo())
    assert measure(str(path)) == (40, 24)


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "avif"])
def test_lossy_files_come_back_nearly(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    Image.fromarray(photo()).save(path, quality=95)
    assert np.abs(loaded(path).astype(int) - photo()).mean() < 4


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_exif_orientation(tmp_path: Path, turn: int, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(photo()).save(path, exif=exif, quality=98)
    expected = ORIENTED[turn](photo())
    assert np.abs(loaded(path).astype(int) - expected).mean() < 2
    assert measure(str(path)) == (expected.shape[1], expected.shape[0])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_leaves_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photo()).save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff", quality=95)
    assert loaded(path).shape == (24, 40, 3)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_alpha_goes_on_white(tmp_path: Path, extension: str) -> None:
    rgba = np.dstack([photo(), np.full((24, 40), 51, "u1")])
    rgba[:12, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / f"a.{extension}")
    result = loaded(tmp_path / f"a.{extension}").astype(float)
    assert (result[:12] == 255).all()
    np.testing.assert_allclose(result[12:], photo()[12:] * 0.2 + 255 * 0.8, atol=1)


def test_palette_transparency_goes_on_white(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [1, 0]], "u1"), mode=None).convert("P")
    image.putpalette([200, 10, 10, 20, 60, 220])
    image.putdata([0, 1, 1, 0])
    for name, transparency in (("a.png", 0), ("b.png", bytes([0, 255])), ("c.gif", 0)):
        image.save(tmp_path / name, transparency=transparency)
        result = loaded(tmp_path / name)
        np.testing.assert_array_equal(result[0, 0], [255, 255, 255], err_msg=name)
        np.testing.assert_array_equal(result[0, 1], [20, 60, 220], err_msg=name)


def test_gray_with_alpha_and_transparent_gray_go_on_white(tmp_path: Path) -> None:
    la = Image.merge("LA", [Image.new("L", (2, 1), 40), Image.new("L", (2, 1), 0)])
    la.putpixel((1, 0), (40, 255))
    la.save(tmp_path / "la.png")
    np.testing.assert_array_equal(loaded(tmp_path / "la.png")[0], [[255] * 3, [40] * 3])
    gray = Image.new("L", (2, 1), 7)
    gray.putpixel((1, 0), 90)
    gray.save(tmp_path / "l.png", transparency=7)
    np.testing.assert_array_equal(loaded(tmp_path / "l.png")[0], [[255] * 3, [90] * 3])
    Image.fromarray(photo()).save(tmp_path / "rgb.png", transparency=tuple(photo()[0, 0].tolist()))
    np.testing.assert_array_equal(loaded(tmp_path / "rgb.png")[0, 0], [255] * 3)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path: Path, extension: str) -> None:
    values = np.linspace(0, 65535, 40 * 24).astype("u2").reshape(24, 40)
    path = tmp_path / f"a.{extension}"
    Image.fromarray(values).save(path)
    expected = np.repeat(np.round(values / 257.0)[..., None], 3, axis=2)
    np.testing.assert_allclose(loaded(path), expected, atol=0.5)
    assert loaded(path).max() == 255


def test_16_bit_big_endian_tiff(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 8 * 4).astype("u2").reshape(4, 8)
    image = Image.frombytes("I;16B", (8, 4), values.astype(">u2").tobytes())
    image.save(tmp_path / "a.tif")
    np.testing.assert_allclose(loaded(tmp_path / "a.tif")[..., 1], values / 257.0, atol=0.51)


def test_16_bit_rgb_png(tmp_path: Path) -> None:
    """Written by hand, because Pillow cannot: three 16-bit samples a pixel, big-endian."""
    import struct
    import zlib

    values = (photo().astype(int) * 257).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", 40, 24, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    np.testing.assert_allclose(loaded(tmp_path / "a.png"), photo(), atol=1)


def test_32_bit_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0.5, "f4")).save(tmp_path / "f.tif")
    with pytest.raises(BadImageError, match="32-bit pixels"):
        load_image(str(tmp_path / "f.tif"))


def test_dark_integers_are_not_taken_for_16_bit(tmp_path: Path) -> None:
    """8-bit values in 32-bit pixels would come out almost black."""
    Image.fromarray(np.arange(256, dtype="i4").reshape(16, 16)).save(tmp_path / "i.tif")
    with pytest.raises(BadImageError, match="32-bit pixels"):
        load_image(str(tmp_path / "i.tif"))
    dark = (np.arange(256) * 64).astype("u2").reshape(16, 16)  # a quarter of 16 bits: stays so
    Image.fromarray(dark).save(tmp_path / "d.png")
    assert loaded(tmp_path / "d.png").max() == 64


def test_gray_of_other_depths_follows_the_file(tmp_path: Path) -> None:
    values = np.array([0, 341, 682, 1023], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 1023\n" + values.tobytes())
    np.testing.assert_array_equal(loaded(tmp_path / "a.pgm")[0, :, 0], [0, 85, 170, 255])
    # a TIFF of 12 bits a pixel, by hand: two pixels in three bytes
    entries = [(256, 4, 2), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 4, 1), (279, 4, 3)]
    ifd = len(entries).to_bytes(2, "little")
    for tag, kind, value in entries:
        ifd += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        ifd += value.to_bytes(4, "little")
    pixels = bytes([0xFF, 0xF5, 0x55, 0])  # 4095 and 1365
    (tmp_path / "a.tif").write_bytes(b"II*\0\x0c\0\0\0" + pixels + ifd + bytes(4))
    np.testing.assert_array_equal(loaded(tmp_path / "a.tif")[0, :, 0], [255, 85])


def test_postscript_is_not_run_whatever_it_is_called(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(BadImageError, match="not an image that Pillow can read"):
        measure(str(tmp_path / "a.png"))


def test_one_bit_and_plain_palette(tmp_path: Path) -> None:
    Image.new("1", (3, 3), 1).save(tmp_path / "a.png")
    assert (loaded(tmp_path / "a.png") == 255).all()
    Image.fromarray(photo()).quantize(64).save(tmp_path / "b.png")
    assert np.abs(loaded(tmp_path / "b.png").astype(int) - photo()).mean() < 15


def test_cmyk_jpeg(tmp_path: Path) -> None:
    ink = np.zeros((8, 8, 4), "u1")
    ink[:, :4] = (255, 0, 0, 0)
    ink[:, 4:] = (0, 0, 255, 0)
    Image.fromarray(ink, mode=None).save(tmp_path / "a.png")  # RGBA container of the same bytes
    Image.frombytes("CMYK", (8, 8), ink.tobytes()).save(tmp_path / "a.jpg", quality=98)
    result = loaded(tmp_path / "a.jpg").astype(int)
    assert np.abs(result[:, 1] - [0, 255, 255]).max() < 12  # cyan, not its complement
    assert np.abs(result[:, 6] - [255, 255, 0]).max() < 12


def wide_gamut_profile() -> bytes:
    """A copy of sRGB with red and green exchanged: any colour shows whether it was applied."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for index in range(int.from_bytes(data[128:132], "big")):
        start = 132 + 12 * index
        tags[bytes(data[start : start + 4])] = start
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    data[red + 4 : red + 12], data[green + 4 : green + 12] = (
        data[green + 4 : green + 12],
        data[red + 4 : red + 12],
    )
    desc = tags[b"desc"]
    offset = int.from_bytes(data[desc + 4 : desc + 8], "big")
    size = int.from_bytes(data[desc + 8 : desc + 12], "big")
    text = data[offset : offset + size]
    data[offset : offset + size] = text.replace(
        "sRGB".encode("utf-16-be"), "xGRB".encode("utf-16-be")
    )
    return bytes(data)


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_of_another_profile_become_srgb(tmp_path: Path, alpha: bool) -> None:
    colour = (200, 40, 90, 255) if alpha else (200, 40, 90)
    image = Image.new("RGBA" if alpha else "RGB", (4, 4), colour)
    image.save(tmp_path / "a.png", icc_profile=wide_gamut_profile())
    assert np.abs(loaded(tmp_path / "a.png")[0, 0].astype(int) - [40, 200, 90]).max() <= 1
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "b.png", icc_profile=srgb)
    np.testing.assert_array_equal(loaded(tmp_path / "b.png")[0, 0], [200, 40, 90])
    image.save(tmp_path / "c.png", icc_profile=b"no profile at all")
    np.testing.assert_array_equal(loaded(tmp_path / "c.png")[0, 0], [200, 40, 90])


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_animations_are_refused_and_single_frames_are_not(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    path = tmp_path / f"a.{extension}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    for read in (measure, load_image):
        with pytest.raises(BadImageError, match="3 frames") as caught:
            read(str(path))
        assert caught.value.path == str(path)
        assert caught.value.lasting
    frames[1].save(path)
    assert np.abs(loaded(path)[0, 0].astype(int) - [0, 255, 0]).max() < 6


def test_phone_jpegs_with_a_second_view_are_read(tmp_path: Path) -> None:
    first, second = Image.fromarray(photo()), Image.new("RGB", (40, 24))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], quality=95)
    assert np.abs(loaded(tmp_path / "a.jpg").astype(int) - photo()).mean() < 4


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def as_text(path: Path) -> None:
    path.write_text("not an image\n" * 50)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [(cut, "damaged or cut off"), (empty, "Pillow can read"), (as_text, "Pillow can read")],
)
@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_damaged_files(
    tmp_path: Path, damage: Callable[[Path], None], reason: str, extension: str
) -> None:
    path = tmp_path / f"a.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), "u1")
    Image.fromarray(noise).save(path)
    damage(path)
    with pytest.raises(BadImageError, match=reason) as caught:
        load_image(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.lasting


def test_a_missing_file_may_come_back(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="No such file") as caught:
        load_image(str(tmp_path / "a.png"))
    assert not caught.value.lasting


def test_enormous_images_are_refused_from_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 24 - 1)
    with pytest.raises(BadImageError, match="40 x 24 pixels"):
        measure(str(tmp_path / "a.png"))
    # and Pillow's own, lower limit is off: this is 100 megapixels of nothing
    buffer = io.BytesIO()
    Image.new("1", (10000, 10000)).save(buffer, "PNG")
    (tmp_path / "b.png").write_bytes(buffer.getvalue())
    monkeypatch.setattr(images, "MAX_PIXELS", 2**28)
    assert measure(str(tmp_path / "b.png")) == (10000, 10000)


@pytest.mark.parametrize("size", [(640, 427), (300, 451), (64, 64), (50, 70)])
def test_crop_equals_resizing_the_whole_image_first(size: tuple[int, int]) -> None:
    width, height = size
    # Contrast low enough that Lanczos' overshoot is not clipped between Pillow's two passes, of
    # which it runs either first, depending on the size.
    image = Image.fromarray(np.random.default_rng(1).integers(90, 166, (height, width, 3), "u1"))
    buckets = Buckets(sizes=((64, 64),), log_aspects=(0.0,))
    p = plan(width, height, buckets=buckets, crop="random", seed=3, name="x")
    whole = np.asarray(image.resize((p.resize_width, p.resize_height), Image.Resampling.LANCZOS))
    expected = whole[p.top : p.top + 64, p.left : p.left + 64]
    result = crop_and_resize(image, p)
    assert result.shape == (3, 64, 64)
    # rounded to 8 bits after each pass
    assert np.abs(result.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2


def test_an_unscaled_crop_is_exact() -> None:
    p = CropPlan(40, 24, 7, 3, 16, 16)
    result = crop_and_resize(Image.fromarray(photo()), p)
    np.testing.assert_array_equal(result.permute(1, 2, 0).numpy(), photo()[3:19, 7:23])
