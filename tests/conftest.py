"""Eight virtual CPU devices for the whole suite; full float32 matrix products, as torch has them on CPU."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # the plugin, if it is there, compiles without a GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax

jax.config.update("jax_num_cpu_devices", 8)
# Warpgroups of an interpreted kernel wait for one another: were their programs enqueued, some would never begin.
jax.config.update("jax_cpu_enable_async_dispatch", False)
