"""The shapes that attention has in Gemma 2, by name: what kernels are tested, compiled and timed on."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The attention of one device.

    Attributes:
      heads: query heads.
      kv_heads: key/value heads.
      width: head width.
      scale, softcap: scores are softcap * tanh(scale * q.k / softcap).
      window: how many tokens a local layer sees; every other layer is local.
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float = 50.0
    window: int = 4096


SHAPES = {
    "2b": Shape(heads=8, kv_heads=4, width=256, scale=256**-0.5),
    "9b": Shape(heads=16, kv_heads=8, width=256, scale=256**-0.5),
    "27b": Shape(heads=32, kv_heads=16, width=128, scale=144**-0.5),
    "2b, tensor 2": Shape(heads=4, kv_heads=2, width=256, scale=256**-0.5),
    "2b, tensor 8": Shape(heads=1, kv_heads=1, width=256, scale=256**-0.5),
    "9b, tensor 8": Shape(heads=2, kv_heads=1, width=256, scale=256**-0.5),
    "27b, tensor 8": Shape(heads=4, kv_heads=2, width=128, scale=144**-0.5),
}
