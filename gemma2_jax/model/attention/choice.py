"""The implementations of attention, what each can do, and the choice between them.

All compute the same (`kernels.reference`). An implementation that is asked for by name and cannot do what the model
needs raises an error that says what it lacks; "auto" takes the fastest that can, and says what the faster ones lack.

The softcap of attention scores, softcap * tanh(score / softcap), is applied by each: in `xla._scores` and
`xla._add_keys`, in `kernels.tiles.Settings.softcap_tanh` (forward and backward), in `kernels.decode` and in
`kernels.reference.apply_softcap`. That of logits is in `Gemma2.logits` and `loss._chunk_loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

from gemma2_jax.config import ComputeConfig
from gemma2_jax.kernels.limits import MOSAIC, Limits
from gemma2_jax.kernels.tile_sizes import Tiles
from gemma2_jax.model.attention import mosaic as attention_mosaic, xla as attention_xla
from gemma2_jax.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """A way to compute attention.

    Attributes:
      attend: attention of a sequence to itself, with the signature of `attention.xla.attend`.
      attend_cached: attention of one token of each row to a cache, with that of `attention.xla.attend_cached`.
      limits: what it can do.
    """

    attend: Callable
    attend_cached: Callable
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What is known of the kernels from running them on the devices at hand: see `cluster.kernel_records`.

    Attributes:
      was_run: whether they were; on devices that are only described they cannot be.
      fault: why they must not be used, as a verb and its object; empty where they agree with their meaning.
      time_ratio: the time that they take over that of XLA's attention; None where they were not timed.
      tiles: what they loop over; None for the built-in ones.
      tiles_source: where these come from, to follow "tiles".
    """

    was_run: bool = False
    fault: str = ""
    time_ratio: float | None = None
    tiles: Tiles | None = None
    tiles_source: str = ""

    @property
    def slowness(self) -> str:
        """Why they are not the fastest; empty where they are, or nobody knows."""
        if self.time_ratio is None or self.time_ratio <= 1:
            return ""
        return f"was timed on this device and takes {self.time_ratio:.2f} of xla's time"

    @property
    def speed(self) -> str:
        """How fast they are, to follow "the fastest here"."""
        if not self.was_run:
            return ""
        if self.time_ratio is None:
            return ", by design: not yet timed on this device, which python -m gemma2_jax.check does"
        return f", in {self.time_ratio:.2f} of xla's time"


# In the order of their speed, the fastest at the top.
IMPLEMENTATIONS = {
    "mosaic": Implementation(
        attend=attention_mosaic.attend, attend_cached=attention_mosaic.attend_cached, limits=MOSAIC
    ),
    "xla": Implementation(attend=attention_xla.attend, attend_cached=attention_xla.attend_cached),
}


def choose_attention(
    model: ModelConfig, compute: ComputeConfig, device, examine: Callable[[], Experience] = Experience
) -> tuple[Implementation, str]:
    """The implementation for a model on devices like this one, and a description: "xla (as asked)".

    `examine` says what is known of the kernels there, and is asked only where they would be used.

    Raises ValueError where `compute.attention` names one that lacks what the model or the device needs, or is known to
    fail there.
    """
    lacking: dict[str, str] = {}
    for name, implementation in IMPLEMENTATIONS.items():
        lack = implementation.limits.find_lack(
            architecture=device_architecture(device),
            dtype=compute.dtype,
            width=model.head_width,
            softcap=model.attn_softcap,
        )
        if lack:
            lacking[name] = lack
    name, experience = compute.attention, Experience()
    if "mosaic" not in lacking and name in ("auto", "mosaic"):
        experience = examine()
        if fault := experience.fault or (experience.slowness if name == "auto" else ""):
            lacking["mosaic"] = fault
    if name == "auto":
        name = next(name for name in IMPLEMENTATIONS if name not in lacking)
        speed = experience.speed if name == "mosaic" else ""
        lacks = [f"{name} {lack}" for name, lack in lacking.items()]
        reason = "; ".join([f"the fastest here{speed}", *lacks])
    elif name in lacking:
        able = " or ".join(choice for choice in ("auto", *IMPLEMENTATIONS) if choice not in lacking)
        raise ValueError(f"compute.attention {name} {lacking[name]}; use {able}")
    else:
        reason = "as asked"
    implementation = IMPLEMENTATIONS[name]
    if name == "xla":
        implementation = _blocked_xla(attention_xla.BLOCKS.get(device.platform, 512))
    elif experience.tiles_source:
        reason += f"; tiles {experience.tiles_source}"
        if experience.tiles:
            implementation = _tiled_mosaic(experience.tiles)
    return implementation, f"{name} ({reason})"


@cache
def _blocked_xla(block: int) -> Implementation:
    """The same object for each model, so that one compiled program serves all of a shape."""
    implementation = IMPLEMENTATIONS["xla"]
    return replace(implementation, attend=partial(implementation.attend, block=block))


@cache
def _tiled_mosaic(tiles: Tiles) -> Implementation:
    """The kernels with tiles other than the built-in ones; the same object for each model."""
    from gemma2_jax.kernels.attention import attention
    from gemma2_jax.kernels.decode import decode
    from gemma2_jax.kernels.tiles import Build

    implementation, build = IMPLEMENTATIONS["mosaic"], Build(tiles=tiles)
    return replace(
        implementation,
        attend=partial(implementation.attend, kernel=partial(attention, build=build)),
        attend_cached=partial(implementation.attend_cached, kernel=partial(decode, build=build)),
    )


def device_architecture(device) -> str:
    """What a program is compiled for: the architecture of a GPU, such as "sm_90", or else the platform."""
    capability = getattr(device, "compute_capability", None)
    return f"sm_{str(capability).replace('.', '')}" if capability else device.platform
