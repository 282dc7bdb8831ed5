"""Which implementation of attention a run has: what each can do, and the choice between them.

All mean the same (`kernels.reference`). One that is named and cannot do what is asked raises, saying what it lacks;
"auto" takes the first that can, and says why not an earlier one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from gemma2_jax.config import ComputeConfig, ModelConfig
from gemma2_jax.kernels.limits import MOSAIC, Limits
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A way to compute attention.

    Attributes:
      attend: of a sequence to itself, as `attention_xla.attend`.
      attend_cached: of one token of each row to a cache, as `attention_xla.attend_cached`.
      limits: what it can do.
    """

    attend: Callable
    attend_cached: Callable
    limits: Limits = field(default_factory=Limits)


# The fastest first.
IMPLEMENTATIONS = {
    "mosaic": Implementation(
        attend=attention_mosaic.attend, attend_cached=attention_mosaic.attend_cached, limits=MOSAIC
    ),
    "xla": Implementation(attend=attention_xla.attend, attend_cached=attention_xla.attend_cached),
}


def choose_attention(model: ModelConfig, compute: ComputeConfig, device) -> tuple[Implementation, str]:
    """The implementation for a model on such devices, and in words which it is and why.

    Raises ValueError where `compute.attention` names one that lacks what the model or the device needs.
    """
    lacking: dict[str, str] = {}
    for name, way in IMPLEMENTATIONS.items():
        lack = way.limits.find_lack(
            architecture=device_architecture(device),
            dtype=compute.dtype,
            width=model.head_width,
            softcap=model.attn_softcap,
        )
        if lack:
            lacking[name] = lack
    name = compute.attention
    if name == "auto":
        name = next(name for name in IMPLEMENTATIONS if name not in lacking)
        reason = "; ".join(["the fastest here", *(f"{other} lacks {lack}" for other, lack in lacking.items())])
    elif name in lacking:
        able = " or ".join(other for other in ("auto", *IMPLEMENTATIONS) if other not in lacking)
        raise ValueError(f"compute.attention {name} lacks {lacking[name]}; use {able}")
    else:
        reason = "as asked"
    way = IMPLEMENTATIONS[name]
    if name == "xla":
        way = replace(way, attend=partial(way.attend, block=attention_xla.BLOCKS.get(device.platform, 512)))
    return way, f"{name} ({reason})"


def device_architecture(device) -> str:
    """What a program is compiled for: sm_90 and the like of a GPU, or the platform."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else device.platform
