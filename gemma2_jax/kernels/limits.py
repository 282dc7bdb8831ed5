"""What the kernels can do, as data that can be read without importing them."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What an implementation of attention can do; None stands for anything.

    Every implementation here can do windows, packed segments, any number of query heads to a key/value head and
    sequences of any length, forward and backward.

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
        """Says in words, as a verb and its object, why this cannot do what is asked; None where it can."""
        if architecture and self.architectures and architecture not in self.architectures:
            return f"is for {' and '.join(self.architectures)} GPUs, and this is {architecture}"
        if self.dtypes and dtype not in self.dtypes:
            return f"takes {' and '.join(self.dtypes)}, and not {dtype}"
        if self.widths and width not in self.widths:
            return f"has heads of width {', '.join(map(str, self.widths))}, and not {width}"
        if self.softcap and (softcap is None or not 0 < softcap <= self.softcap):
            asked = "there is none" if softcap is None else f"not one of {softcap:g}"
            return f"has no running maximum and so needs a soft cap of at most {self.softcap:g}; {asked}"
        return None


# exp of a score of 60, summed over a million keys, is far from what float32 and bfloat16 can hold.
MOSAIC = Limits(architectures=("sm_90",), dtypes=("bfloat16",), widths=(64, 128, 256), softcap=60.0)
