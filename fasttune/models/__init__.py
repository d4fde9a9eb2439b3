"""The model families, written out."""

from fasttune.models.autoencoder import AUTOENCODER
from fasttune.models.flux import FLUX
from fasttune.models.spec import ModelSpec
from fasttune.models.stable_diffusion import SD1, SD2, SDXL

MODELS: dict[str, ModelSpec] = {
    "flux": FLUX,
    "sdxl": SDXL,
    "sd1": SD1,
    "sd2": SD2,
    "autoencoder": AUTOENCODER,
}
