"""Which tiles the attention kernels are the fastest with on a device: each legal one is checked, and then timed.

It is done in the process of `kernel_program`, as checks are: a kernel that hangs or breaks there is left out by name,
and those after it get another process. Nothing here imports JAX.
"""

from collections.abc import Sequence
from dataclasses import replace

from gemma2_jax.cluster.kernel_check import RUN_SECONDS, Candidate, Finding, Part, Spec, follow_process
from gemma2_jax.kernels.tile_sizes import DIRECTIONS, TILES, Tiles, list_legal

_LEAST_GAIN = 0.98  # of the built-in tile's time, which a faster one must be below


def list_candidates(width: int) -> tuple[Candidate, ...]:
    """Every legal tile of every direction; of each direction the built-in one is the first."""
    return tuple(
        Candidate(direction=direction, tile=tile) for direction in DIRECTIONS for tile in list_legal(width, direction)
    )


def try_candidates(
    spec: Spec,
    *,
    run_seconds: float = RUN_SECONDS,
    program: Sequence[str] = ("-m", "gemma2_jax.cluster.kernel_program"),
) -> list[Finding]:
    """What is found of each of the candidates of `spec`: that it "was timed", or why it is left out.

    `run_seconds` and `program` are as in `check_kernels`.
    """
    findings: list[Finding] = []
    left = list(spec.candidates)
    while left:
        parts: list[Part] = list(dict.fromkeys(candidate.part for candidate in left))
        found = list(follow_process(replace(spec, candidates=tuple(left)), parts, run_seconds, program))
        findings += [finding for finding in found if finding.verdict != "agrees"]
        ended = found[-1] if found and found[-1].verdict not in ("agrees", "differs", "was timed") else None
        if ended is None:
            break
        names = [str(candidate) for candidate in left]
        if ended.case in names:
            left = left[names.index(ended.case) + 1 :]
        else:  # it ended before it came to a kernel of that part
            left = [candidate for candidate in left if candidate.part != ended.part]
    return findings


def choose_tiles(width: int, findings: Sequence[Finding]) -> Tiles:
    """The fastest tiles of what was timed; of a direction the built-in ones, unless others are faster beyond noise."""
    times = {finding.case: finding.kernel_seconds for finding in findings if finding.verdict == "was timed"}
    chosen = {}
    for direction in DIRECTIONS:
        built_in = getattr(TILES[width], direction)
        timed = [
            (seconds, tile)
            for tile in list_legal(width, direction)
            if (seconds := times.get(str(Candidate(direction=direction, tile=tile)))) is not None
        ]
        seconds, fastest = min(timed, key=lambda pair: pair[0], default=(0.0, built_in))
        usual = {tile: seconds for seconds, tile in timed}.get(built_in)
        chosen[direction] = fastest if usual is None or seconds < _LEAST_GAIN * usual else built_in
    return Tiles(**chosen)
