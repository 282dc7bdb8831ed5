"""Gemma 2 in JAX and Flax NNX: train, convert and run."""

import os

# On CPU, jaxlib 0.11.2 computes some fused sums with the YNNPACK library from memory that was never written, so that
# results differ from run to run and are NaN at times (`test_sums_are_repeatable` shows it). Leaves it to matrix
# products alone, unless the caller's XLA_FLAGS say otherwise. Must be set before the first compilation.
_FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"
if _FUSIONS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FUSIONS}=LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT".strip()

# On GPU, JAX takes three quarters of the memory unless told otherwise; the rest of 95% is for CUDA and NCCL.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
