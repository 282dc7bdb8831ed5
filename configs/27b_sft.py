"""Fine-tunes all weights of Gemma 2 27B, with Megatron-Bridge's defaults.

python -m gemma2_jax.train --config 27b_sft --data.train 'dialogues/*.jsonl'
"""

from gemma2_jax.config import Config, MeshConfig
from gemma2_jax.model_config import GEMMA2_27B
from gemma2_jax.recipes import finetune


def config() -> Config:
    return finetune("27b_sft", GEMMA2_27B, "google/gemma-2-27b", "sft", mesh=MeshConfig(stage=2, tensor=8))
