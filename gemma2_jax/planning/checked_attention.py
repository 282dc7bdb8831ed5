"""The attention kernels of a run against float32 and beside XLA's attention, as rows of the table of a checkup."""

from dataclasses import replace
from functools import partial

import jax
from jax.sharding import Mesh

from gemma2_jax.cluster import kernel_records
from gemma2_jax.cluster.findings import Row, skip
from gemma2_jax.cluster.kernel_check import Candidate, Finding, Spec, check_kernels, local_shape
from gemma2_jax.cluster.kernel_records import Tuning
from gemma2_jax.config import Config
from gemma2_jax.kernels.limits import MOSAIC
from gemma2_jax.kernels.tile_sizes import DIRECTIONS, TILES
from gemma2_jax.model.attention.choice import device_architecture

_INTERPRETER_SECONDS = 450  # for which the interpreter may take to run a case


def check_attention(config: Config, mesh: Mesh, *, tunes: bool) -> list[Row]:
    """The attention kernels against float32, and timed where they are for the devices; kept for runs to read.

    `tunes` has their tiles timed first.
    """
    device = jax.local_devices()[0]
    find_lack = partial(
        MOSAIC.find_lack, dtype="bfloat16", width=config.model.head_width, softcap=config.model.attn_softcap
    )
    lack = find_lack(architecture=device_architecture(device))
    is_interpreted = device.platform == "cpu" and not find_lack()
    if lack and not is_interpreted:
        return [skip("attention kernels", f"mosaic {lack}")]
    shape = local_shape(config.model, mesh.shape["tensor"])
    if is_interpreted:
        findings = check_kernels(Spec(shape=shape, interpret=True), run_seconds=_INTERPRETER_SECONDS)
        where = "in Pallas's interpreter, in place of a GPU"
        return [
            *(_describe_finding(finding, where) for finding in findings),
            skip("times of kernels", f"mosaic {lack}" + (", so that no tiles are timed" if tunes else "")),
        ]
    spec = Spec(shape=shape, device=kernel_records.name_device(device), timed=True)
    if tunes:
        tuning = kernel_records.tune(spec, device)
        rows, record = describe_tuning(tuning, shape.width), tuning.record
    else:
        choice = kernel_records.find_tiles(spec, device)
        rows = [Row(subject="tiles of kernels", found=choice.source)]
        record = kernel_records.run_check(replace(spec, tiles=choice.tiles), device)
    return [*rows, *(_describe_finding(finding, "") for finding in record.findings)]


def describe_tuning(tuning: Tuning, width: int) -> list[Row]:
    """What was found of the tiles of each kernel, and which of them are taken."""
    rows = [Row(subject="tiles of kernels", found=tuning.choice.source)]
    for direction in DIRECTIONS:
        built_in = Candidate(direction=direction, tile=getattr(TILES[width], direction))
        found = [each for each in tuning.findings if each.case.startswith(f"{direction} ")]
        times = {each.case: each.kernel_seconds for each in found if each.kernel_seconds is not None}
        left_out = [str(each) for each in found if each.case not in times]
        shown = [
            f"{case} {seconds * 1e3:.3f} ms" + (" (built in)" if case == str(built_in) else "")
            for case, seconds in sorted(times.items(), key=lambda item: item[1])
        ]
        row = Row(
            subject=f"tiles of {direction}",
            found=", ".join(shown),
            reason=f"left out: {'; '.join(left_out)}" if left_out else "",
            numbers={f"{case} seconds": seconds for case, seconds in times.items()},
        )
        rows.append(row if times else replace(row, verdict="skipped", reason=row.reason or "none was timed"))
    return rows


def _describe_finding(finding: Finding, where: str) -> Row:
    subject = f"attention kernels, {finding.part}"
    found = finding.case + (f", {where}" if where else "")
    if finding.kernel_seconds is not None and finding.xla_seconds is not None:
        ratio = finding.kernel_seconds / finding.xla_seconds
        found += f": {finding.kernel_seconds * 1e3:.3f} ms, XLA's attention {finding.xla_seconds * 1e3:.3f} ms"
        numbers = {"kernel_seconds": finding.kernel_seconds, "xla_seconds": finding.xla_seconds}
        if ratio <= 1:
            return Row(subject=subject, found=found, numbers=numbers)
        advice = "compute.attention auto takes XLA's then"
        reason = f"{ratio:.2f} of XLA's time"
        return Row(subject=subject, found=found, verdict="slow", reason=reason, advice=advice, numbers=numbers)
    if finding.verdict in ("not checked", "was not timed"):
        return skip(subject, str(finding))
    if not finding.is_fault:
        return Row(subject=subject, found=f"{found}: agrees with float32, the same bits twice")
    reason = f"{finding.verdict}: {finding.detail}"
    advice = "compute.attention auto takes XLA's instead; update the driver and CUDA, or report it with this table"
    return Row(subject=subject, found=found, verdict="wrong", reason=reason, advice=advice)
