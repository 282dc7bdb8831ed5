"""What is found of a machine: versions that do not go together, GPUs as nvidia-smi tells of them, disks, rates."""

import errno
import subprocess
from collections.abc import Sequence
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gemma2_jax.cluster import devices, disks, gpus, rates, software
from gemma2_jax.cluster.findings import Row
from gemma2_jax.config import MeshConfig
from gemma2_jax.mesh import make_mesh

VERSIONS = {
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "jax-cuda12-plugin": "0.11.2",
    "jax-cuda12-pjrt": "0.11.2",
    "nvidia-cuda-runtime-cu12": "12.9.79",
    "nvidia-cuda-nvcc-cu12": "12.9.86",
    "nvidia-nccl-cu12": "2.31.2",
    "driver": "570.86.15",
}


def by_subject(rows: Sequence[Row]) -> dict[str, Row]:
    return {row.subject: row for row in rows}


def test_sound_versions_are_ok():
    rows = software.check_software(VERSIONS)
    assert [row.subject for row in rows] == ["driver", "jax", "CUDA runtime", "ptxas", "NCCL"]
    assert all(row.judgment == "ok" and not row.advice for row in rows), rows


@pytest.mark.parametrize(
    ("change", "subject", "judgment"),
    [
        ({"jax-cuda12-pjrt": "0.11.1"}, "jax", "wrong (jaxlib and its CUDA plugin are of different versions"),
        ({"jax-cuda13-plugin": "0.11.2"}, "driver", "wrong (CUDA 13 needs a driver of version 580 or later"),
        ({"jax-cuda13-plugin": "0.11.2", "driver": "580.65.06"}, "driver", "ok"),
        ({"nvidia-cuda-nvcc-cu12": "12.6.77"}, "ptxas", "wrong (ptxas of CUDA up to 12.6.2"),
        ({"nvidia-cuda-nvcc-cu12": "12.6.85"}, "ptxas", "ok"),
        ({"nvidia-cuda-runtime-cu12": "12.8.90"}, "CUDA runtime", "ok (jax's own Mosaic kernels refuse causal masks"),
        ({"nvidia-cuda-runtime-cu12": "12.6.77"}, "CUDA runtime", "ok"),
        ({"nvidia-nccl-cu12": "2.30.7"}, "NCCL", "ok (a pipeline of another program hung with NCCL 2.30.7"),
    ],
)
def test_versions_that_do_not_work_are_said_with_their_source(change, subject, judgment):
    row = by_subject(software.check_software(VERSIONS | change))[subject]
    assert row.judgment.startswith(judgment) and (row.judgment == "ok") == (judgment == "ok")
    assert (row.judgment == "ok") or "(https://github.com/" in row.advice


def test_what_is_not_installed_is_skipped():
    rows = by_subject(software.check_software({"jax": "0.11.2", "jaxlib": "0.11.2"}))
    assert rows["driver"].judgment == "skipped (no NVIDIA driver is loaded)" and rows["jax"].verdict == "ok"
    assert rows["NCCL"].judgment == "skipped (no package of it is installed)"


H100 = "NVIDIA H100 80GB HBM3, 81559, {used}, 345, 1980, Default, Enabled, {errors}"
PEERS = """ \tGPU0\tGPU1\t
 GPU0\tX\tOK\t
 GPU1\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  NS   = Not supported
"""


def fake_smi(lines: Sequence[str], peers: str = PEERS):
    """What stands for nvidia-smi on a host with these GPUs."""

    def run(arguments: Sequence[str]) -> str:
        return peers if arguments[0] == "topo" else "".join(f"{i}, {line}\n" for i, line in enumerate(lines))

    return run


SOUND = [H100.format(used=4, errors=0)] * 2


def test_sound_gpus_are_ok():
    rows = gpus.check_gpus(fake_smi(SOUND))
    assert [(row.subject, row.judgment) for row in rows] == [
        (subject, "ok") for subject in ("GPUs", "clocks", "memory errors", "GPU memory", "peer access")
    ]
    assert rows[0].found == "2 x NVIDIA H100 80GB HBM3" and rows[1].found == "up to 1980 MHz; now, at rest, 345"
    assert rows[3].found == "81,555 of 81,559 MiB free, of the fullest"


@pytest.mark.parametrize(
    ("lines", "peers", "subject", "judgment"),
    [
        ([SOUND[0], SOUND[0].replace("H100", "H200")], PEERS, "GPUs", "slow (they are of several kinds"),
        ([SOUND[0], SOUND[0].replace("Default", "Exclusive_Process")], PEERS, "GPUs", "wrong (their compute mode is"),
        ([SOUND[0], SOUND[0].replace("1980", "990")], PEERS, "clocks", "slow (one may reach 990 MHz only, 50%"),
        ([SOUND[0], H100.format(used=4, errors=2)], PEERS, "memory errors", "wrong (errors that were not corrected"),
        (
            [SOUND[0], H100.format(used=70000, errors=0)],
            PEERS,
            "GPU memory",
            "wrong (others take some of it: GPU 1: 70,",
        ),
        (SOUND, PEERS.replace("OK\t\n GPU1", "NS\t\n GPU1"), "peer access", "slow (GPU0 and GPU1 (NS): what they"),
        (SOUND, "\x1b[4mnothing\x1b[0m", "peer access", "skipped (nvidia-smi topo prints no matrix"),
        (SOUND[:1], PEERS, "peer access", "skipped (there is one GPU)"),
        (["NVIDIA GH200, [N/A], [N/A], [N/A], [N/A], [N/A], [Not Supported], N/A"], PEERS, "GPU memory", "skipped ("),
        (["NVIDIA GH200, [N/A], [N/A], [N/A], [N/A], [N/A], [Not Supported], N/A"], PEERS, "clocks", "skipped ("),
        (["NVIDIA H100, 81559, 4"], PEERS, "memory errors", "ok"),
        ([], PEERS, "GPUs", "skipped (nvidia-smi lists none)"),
    ],
)
def test_gpus_that_are_not_as_they_should_be(lines, peers, subject, judgment):
    assert by_subject(gpus.check_gpus(fake_smi(lines, peers)))[subject].judgment.startswith(judgment)


def test_colored_matrices_are_read():
    colored = PEERS.replace("\tGPU0\tGPU1", "\t\x1b[4mGPU0\tGPU1\x1b[0m").replace("OK\t\n GPU1", "CNS\t\n GPU1")
    assert gpus.parse_peers(colored) == [("GPU0", "GPU1", "CNS")]


@pytest.mark.parametrize(
    ("script", "judgment"),
    [
        (None, "skipped (there is no nvidia-smi)"),
        ("echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9",
         "wrong (nvidia-smi failed: NVIDIA-SMI has failed because it could not communicate with the driver)"),
        ("exec sleep 60", "wrong (nvidia-smi did not answer within 0.5 s; the driver may hang: see dmesg)"),
    ],
)  # fmt: skip
def test_nvidia_smi_may_fail(script, judgment, tmp_path, monkeypatch):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "_SECONDS", 0.5)
    (row,) = gpus.check_gpus()
    assert row.judgment == judgment


def test_a_disk_needs_room_for_every_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "_MOST_BYTES", 1 << 20)
    workdir = tmp_path / "runs" / "new"
    row = disks.check_disk(workdir, checkpoint_bytes=1000, kept=2)
    assert row.verdict == "ok" and row.found.startswith(f"{tmp_path}: ") and row.numbers["write_bytes_per_second"] > 0
    assert not [*tmp_path.iterdir()], "what was written is deleted, and no folder made"
    free = disks.shutil.disk_usage(tmp_path).free
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    row = disks.check_disk(workdir, checkpoint_bytes=free // 2, kept=2)
    assert row.verdict == "wrong" and row.reason == f"{(free // 2 * 3 - free) / 1e9:,.1f} GB too little"
    monkeypatch.setattr(disks, "measure_writing", lambda folder, size: 1.0)
    assert disks.check_disk(workdir, 1200, 2).judgment == "slow (2.0 times the 600 s that are still fine)"

    def refuse(folder, size):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(disks, "measure_writing", refuse)
    assert disks.check_disk(workdir, 1200, 2).judgment == "wrong (it cannot be written to: Permission denied)"


def test_reading_is_bounded(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    file.write_bytes(bytes(1 << 20))
    row = disks.check_reading([file, file])
    assert row.found.startswith("2 file(s) of 0.00 GB at ") and row.numbers["read_bytes_per_second"] > 0
    monkeypatch.setattr(disks, "_READ_BYTES", 1)
    monkeypatch.setattr(disks, "_BLOCK", 1 << 10)
    assert disks.measure_reading([file, tmp_path / "is not opened"]) > 0


@pytest.mark.parametrize(
    ("kind", "memory", "link"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12, 450e9),
        ("NVIDIA H100 PCIe", 2.0e12, None),
        ("NVIDIA H200", 4.8e12, 450e9),
        ("NVIDIA A100-SXM4-80GB", None, None),
    ],
)
def test_bandwidths_of_devices(kind, memory, link):
    peak = devices.find_peak(kind)
    assert peak and (peak.memory_bandwidth, peak.link_bandwidth) == (memory, link)
    assert devices.find_peak(f"{kind} MIG 1g.10gb") is None


def judge(*values: float, peak: float | None = 1000.0) -> str:
    return rates._judge_rates("s", list(values), "TFLOP/s", peak, 0.55).judgment


def test_rates_are_held_against_the_data_sheet_and_one_another():
    assert judge(700, 710) == "ok" and judge(1, 100, peak=None) == "ok"
    assert judge(500) == "slow (50% of the data sheet, and 55% is to be expected)"
    assert judge(700, 600, 700) == "slow (device 1 reaches 86% of the fastest, and every step waits for it)"


SMALL = rates.Sizes(product=16, copied=1 << 12, sent=1 << 10, least=0.001, rounds=1)


def test_devices_are_measured():
    product, copy = rates.check_devices(SMALL)
    assert product.subject == "product of 16 x 16 in float32" and product.verdict == copy.verdict == "ok"
    assert 0 < copy.numbers["slowest GB/s"] <= copy.numbers["fastest GB/s"]


def test_bus_bandwidth_is_as_nccl_tests_define_it(monkeypatch):
    """Of collectives that take a second; their results are those of the devices along the axis."""
    results = {}

    def measure(run, array, **options) -> float:
        results[len(results)] = jax.device_get(run(array))
        return 1.0

    monkeypatch.setattr(rates, "measure_seconds", measure)
    mesh = make_mesh(MeshConfig(data=2, tensor=4), jax.devices())
    row, tensor = rates.check_collectives(mesh, SMALL)
    assert row.subject == "collectives over data (2)" and tensor.subject == "collectives over tensor (4)"
    sent = SMALL.sent / 1e9
    # 2 (n - 1) / n of the buffer; (n - 1) / n of the result, which is n buffers; the buffer.
    assert tensor.numbers == pytest.approx(
        {"all-reduce GB/s": 1.5 * sent, "all-gather GB/s": 3 * sent, "permute GB/s": sent}
    )
    reduced, gathered, permuted = (results[number] for number in (3, 4, 5))
    assert jnp.all(reduced == 4) and len(gathered) == 4 * len(permuted) == 4 * 8 * SMALL.sent // 4
    assert rates.check_collectives(make_mesh(MeshConfig(data=1), jax.devices()[:1]), SMALL)[0].verdict == "skipped"


def test_a_slow_link_is_said(monkeypatch):
    peak = SimpleNamespace(link_bandwidth=450e9)
    monkeypatch.setattr(rates, "find_peak", lambda kind: peak)
    monkeypatch.setattr(rates, "measure_collective", lambda mesh, axis, name, sizes: 100e9)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    (row,) = rates.check_collectives(mesh, SMALL)
    assert row.judgment == "slow (all-reduce reaches 22% of a link)" and row.found.endswith("; a link has 450")


def test_the_real_nvidia_smi_is_asked_for_fields_that_it_knows():
    """Where there is one: a field that it does not know makes it fail."""
    try:
        subprocess.run(["nvidia-smi"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no nvidia-smi here")
    assert all(row.verdict != "wrong" or "failed" not in row.reason for row in gpus.check_gpus())
