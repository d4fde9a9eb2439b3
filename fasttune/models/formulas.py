"""Which blocks have a formula, written out."""

from fasttune.models.flux import DoubleBlock, SingleBlock
from fasttune.models.flux_formulas import DOUBLE, SINGLE
from fasttune.models.fused import Formula
from fasttune.models.layers import Block
from fasttune.models.unet import ResnetBlock, TransformerBlock
from fasttune.models.unet_formulas import RESNET, TRANSFORMER

FORMULAS: dict[type[Block], Formula] = {
    DoubleBlock: DOUBLE,
    SingleBlock: SINGLE,
    TransformerBlock: TRANSFORMER,
    ResnetBlock: RESNET,
}
