# An image for GPU nodes: the package with JAX for CUDA 13, and nothing of the machine's own. From the repository's root:
#   docker build --tag gemma2-jax:latest .
#   docker run --gpus all --shm-size 16g --volume "$PWD/runs:/gemma2/runs" gemma2-jax:latest \
#     python -m gemma2_jax.train --config 2b_lora --init google/gemma-2-2b
# CUDA's libraries come with JAX's wheels, so that the base needs none; the node needs a driver of at least 580.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1

WORKDIR /opt/gemma2_jax
COPY pyproject.toml README.md LICENSE ./
COPY gemma2_jax gemma2_jax
COPY configs configs
COPY convert convert
# JAX brings CUDA with it, so that its version is pinned here; the other packages are in the ranges of pyproject.toml.
RUN pip install "/opt/gemma2_jax[cuda13]" jax==0.11.2 \
    && useradd --create-home --uid 1000 gemma \
    && install --directory --owner=gemma /gemma2

# gemma, as a number, which Kubernetes checks.
USER 1000
WORKDIR /gemma2
CMD ["python", "-m", "gemma2_jax.train", "--help"]
