"""What the kernels can do, as data: read without importing them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an implementation of attention can do; None stands for anything.

    Windows, packed segments, any number of query heads to a key/value head, and lengths of any size, forward and
    backward, are what every implementation here can do.

    Attributes:
      architectures: the devices it is for, such as "sm_90" for a compute capability of 9.0, or platforms.
      dtypes: names of the dtypes of queries, keys and values.
      widths: head widths.
      softcap: where this is a number, scores need a soft cap, and the number is the largest.
    """

    architectures: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    widths: tuple[int, ...] | None = None
    softcap: float | None = None

    def find_lack(
        self, *, dtype: str, width: int, softcap: float | None, architecture: str | None = None
    ) -> str | None:
        """Says in words what is missing for what is asked; None where nothing is."""
        if architecture and self.architectures and architecture not in self.architectures:
            return f"{architecture}: it is for {' and '.join(self.architectures)}"
        if self.dtypes and dtype not in self.dtypes:
            return f"{dtype}: it takes {' and '.join(self.dtypes)}"
        if self.widths and width not in self.widths:
            return f"heads of width {width}: it has {', '.join(map(str, self.widths))}"
        if self.softcap and (softcap is None or not 0 < softcap <= self.softcap):
            asked = "scores without a soft cap" if softcap is None else f"a soft cap of {softcap:g}"
            return f"{asked}: having no running maximum, it needs one, up to {self.softcap:g}"
        return None


# exp of a score of 60, summed over a million keys, is far from what float32 and bfloat16 can hold.
MOSAIC = Limits(architectures=("sm_90",), dtypes=("bfloat16",), widths=(64, 128, 256), softcap=60.0)
