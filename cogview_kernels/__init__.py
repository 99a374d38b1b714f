"""CUDA kernels for CogView's three-region sparse attention and PB-relax LayerNorm."""

from cogview_kernels.attention.function import three_region_attention
from cogview_kernels.attention.layout import ThreeRegionLayout, sample_pivots
from cogview_kernels.backends import KernelUnavailable
from cogview_kernels.norm.function import (
    PBRelaxLayerNorm,
    patch,
    pb_relax_layer_norm,
    sandwich_residual,
)

__version__ = "0.1.0"

__all__ = [
    "KernelUnavailable",
    "PBRelaxLayerNorm",
    "ThreeRegionLayout",
    "patch",
    "pb_relax_layer_norm",
    "sample_pivots",
    "sandwich_residual",
    "three_region_attention",
]
