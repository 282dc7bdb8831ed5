"""The versions of what computes, and pairs of them that are known not to work, each with the report that says so."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata

from gemma2_jax.cluster import platforms
from gemma2_jax.cluster.findings import Row

_PACKAGES = {
    "jax": ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    "CUDA runtime": ("nvidia-cuda-runtime-cu12", "nvidia-cuda-runtime"),
    "ptxas": ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc"),
    "NCCL": ("nvidia-nccl-cu12", "nvidia-nccl-cu13"),
}
_JAX = "https://github.com/jax-ml/jax"

type Versions = Mapping[str, str]  # by package; the driver is "driver"


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Versions that are known not to work.

    Attributes:
      subject: the row of the table that it belongs to.
      applies: whether these versions are such.
      text: what happens with them.
      advice: what to do.
      source: who reported it.
      is_certain: whether it strikes every run; else it is only said.
    """

    subject: str
    applies: Callable[[Versions], bool]
    text: str
    advice: str
    source: str
    is_certain: bool = True


def parse_version(text: str) -> tuple[int, ...]:
    """A version as numbers that compare: "12.9.86" is (12, 9, 86)."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:4])


def _between(package: str, first: str, after: str) -> Callable[[Versions], bool]:
    """Whether a package is there, of a version from `first` on and before `after`."""
    return lambda versions: (
        package in versions and parse_version(first) <= parse_version(versions[package]) < parse_version(after)
    )


def _differ_in_version(versions: Versions) -> bool:
    """Whether jaxlib and a CUDA plugin of it have not the same first three numbers."""
    plugins = [version for name, version in versions.items() if re.fullmatch(r"jax-cuda\d+-(plugin|pjrt)", name)]
    wanted = parse_version(versions.get("jaxlib", ""))[:3]
    return any(parse_version(version)[:3] != wanted for version in plugins)


def _lacks_driver(plugin: str, least: int) -> Callable[[Versions], bool]:
    """Whether the driver is older than what a plugin needs."""
    return lambda versions: plugin in versions and "driver" in versions and parse_version(versions["driver"]) < (least,)


TROUBLES = (
    Trouble(
        subject="jax",
        applies=_differ_in_version,
        text="jaxlib and its CUDA plugin are of different versions, which crashes or lacks calls",
        advice="pip install 'gemma2-jax[cuda13]' (or cuda12) again, so that all have the version of jaxlib",
        source=f"{_JAX}/issues/24901",
    ),
    Trouble(
        subject="driver",
        applies=_lacks_driver("jax-cuda13-plugin", 580),
        text="CUDA 13 needs a driver of version 580 or later",
        advice="update the driver, or install gemma2-jax[cuda12] in place of cuda13",
        source="https://github.com/NVIDIA/cutlass/issues/2866",
    ),
    Trouble(
        subject="ptxas",
        applies=_between("nvidia-cuda-nvcc-cu12", "12", "12.6.85"),
        text="ptxas of CUDA up to 12.6.2 miscompiles clamped indices",
        advice="pip install -U 'nvidia-cuda-nvcc-cu12>=12.9.86'",
        source=f"{_JAX}/pull/25091",
    ),
    Trouble(
        subject="CUDA runtime",
        applies=_between("nvidia-cuda-runtime-cu12", "12.8", "12.9.79"),
        text="jax's own Mosaic kernels refuse causal masks with CUDA 12.8 to 12.9.0, whose ptxas miscompiles them",
        advice="install gemma2-jax[cuda13], or CUDA 12.9.1; the rows of the kernels say whether ours are right",
        source=f"{_JAX}/blob/jax-v0.11.2/jax/experimental/pallas/ops/gpu/attention_mgpu.py",
        is_certain=False,
    ),
    *(
        Trouble(
            subject="NCCL",
            applies=_between(package, "2.30.7", "2.31.2"),
            text="a pipeline of another program hung with NCCL 2.30.7, and did not with 2.31.2",
            advice=f"if a run with mesh.stage hangs, pip install -U '{package}>=2.31.2'",
            source="https://github.com/NVIDIA/jaxpp/issues/11",
            is_certain=False,
        )
        for package in _PACKAGES["NCCL"]
    ),
)


def find_versions() -> dict[str, str]:
    """The versions of the packages that are installed, and of the driver if there is one."""
    versions = {}
    for package in (package for packages in _PACKAGES.values() for package in packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    driver = platforms.find_driver()
    return versions | ({"driver": driver} if driver else {})


def check_software(versions: Versions) -> list[Row]:
    """A row for each part of what computes."""
    rows = []
    for subject, packages in {"driver": ("driver",), **_PACKAGES}.items():
        found = ", ".join(f"{name} {versions[name]}" for name in packages if name in versions)
        troubles = [trouble for trouble in TROUBLES if trouble.subject == subject and trouble.applies(versions)]
        if not found:
            missing = "no NVIDIA driver is loaded" if subject == "driver" else "no package of it is installed"
            rows.append(Row(subject=subject, found="", verdict="skipped", reason=missing))
            continue
        certain = any(trouble.is_certain for trouble in troubles)
        rows.append(
            Row(
                subject=subject,
                found=found,
                verdict="wrong" if certain else "ok",
                reason="; ".join(trouble.text for trouble in troubles),
                advice="; ".join(f"{trouble.advice} ({trouble.source})" for trouble in troubles),
            )
        )
    return rows
