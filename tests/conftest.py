"""Fixtures that several test files share: tiny model bundles and folders of images."""

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from fasttune import environment

ROOT = Path(__file__).parents[1]

# Before triton is imported: its kernels run on the CPU in every test.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault(environment.AOTRITON, "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: threads of torch's would share them
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in [n for n in os.environ if n.startswith("PYTEST_XDIST_")]:
        del os.environ[name]  # children that run pytest themselves are nobody's workers


def pytest_collection_finish() -> None:
    """What was imported stays, and need not be looked through in every collection of garbage."""
    gc.collect()
    gc.freeze()


def load_module(path: Path) -> ModuleType:
    """A module from a file outside the packages, such as a benchmark."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    """The command line adds a console handler, which would write to a later test's stderr."""
    yield
    for name in ("fasttune", None):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            if isinstance(handler, logging.NullHandler) or getattr(handler, "is_console", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_models() -> ModuleType:
    """benchmarks/tiny_models.py, for tests that write bundles of their own."""
    return load_module(ROOT / "benchmarks" / "tiny_models.py")


@pytest.fixture(scope="session")
def tiny_sdxl(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SDXL. Shared by the session: copy it before changing it."""
    return tiny_models.write_tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="session")
def tiny_flux(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random FLUX.1-dev. Shared by the session: copy it before changing it."""
    return tiny_models.write_tiny_flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="session")
def tiny_sd1(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SD 1.5. Shared by the session: copy it before changing it."""
    return tiny_models.write_tiny_sd1(tmp_path_factory.mktemp("sd1") / "model")


@pytest.fixture(scope="session")
def tiny_sd2(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SD 2.1 (v-prediction). Shared: copy it before changing it."""
    return tiny_models.write_tiny_sd2(tmp_path_factory.mktemp("sd2") / "model")


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Factory: image_folder(count=4, sizes=((96, 64), ...), captions=True, name="images").

    Writes photo-like PNGs (gradient, disc, grain) of the given (width, height), cycled, each with
    a caption in a .txt beside it, and returns the folder.
    """

    def write(
        count: int = 4,
        sizes: tuple[tuple[int, int], ...] = ((96, 64), (64, 96), (80, 80)),
        captions: bool = True,
        name: str = "images",
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            rng = np.random.default_rng(index)
            width, height = sizes[index % len(sizes)]
            y, x = np.mgrid[0:height, 0:width].astype(np.float64)
            x, y = x / width, y / height
            tint = rng.uniform(40, 200, size=3)
            disc = ((x - rng.uniform(0.3, 0.7)) ** 2 + (y - rng.uniform(0.3, 0.7)) ** 2) < 0.05
            pixels = tint * (0.5 + 0.5 * (x + y) / 2)[..., None]
            pixels = np.where(disc[..., None], 255 - tint, pixels)
            pixels = pixels + rng.normal(0, 4, size=pixels.shape)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"image_{index:03d}.png")
            if captions:
                text = f"a photo of the {('red', 'blue')[index % 2]} disc number {index}"
                (folder / f"image_{index:03d}.txt").write_text(text + "\n", encoding="utf-8")
        return folder

    return write
