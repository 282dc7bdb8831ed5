"""Checkpoints that Megatron wrote, torch's reading of them, and functions that write similar ones."""

import argparse
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from gemma2_jax.convert.checkpoints import Checkpoint, read_array
from gemma2_jax.convert.job import Format, Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import GEMMA2_TINY, ModelConfig

FIXTURES = Path(__file__).parent / "fixtures" / "megatron"
HF = {dtype: FIXTURES / "hf" / f"A_{dtype}" for dtype in ("f32", "bf16")}
ONE = FIXTURES / "torch_dist" / "A_f32_tp1pp1"
PEFT = FIXTURES / "peft" / "A_f32_lora_hfpeft"
LORA, DORA = (FIXTURES / "peft" / f"A_f32_{kind}_tp1pp1" for kind in ("lora", "dora"))
STACKED = "decoder.layers."
HEAD = "output_layer.weight"
TINY = replace(GEMMA2_TINY, layers=1, width=4, mlp_width=4, heads=4, kv_heads=2, head_width=2, vocab_size=6, window=8)


Tensors = dict[str, np.ndarray]


def hf_twin(name: str) -> Path:
    """The Hugging Face model that a fixture was converted from."""
    return HF["bf16" if "bf16" in name else "f32"]


def twin_model(name: str) -> ModelConfig:
    model = open_checkpoint(hf_twin(name)).model
    assert model
    return model


def convert(source: Checkpoint | Path, target: Path, to: Format, **options) -> Path:
    write_checkpoint(
        Job(source=source if isinstance(source, Checkpoint) else open_checkpoint(source), to=to, **options), target
    )
    return target


def load_tensors(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def bits(tensors: Tensors) -> dict[str, tuple]:
    return {name: (str(x.dtype), x.shape, x.tobytes()) for name, x in tensors.items()}


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def as_numpy(tensors: dict[str, torch.Tensor]) -> Tensors:
    """Torch's tensors as arrays; bfloat16, which NumPy lacks, goes through its bits."""
    return {
        name: np.frombuffer(torch_bytes(x), jnp.bfloat16 if x.dtype == torch.bfloat16 else x.numpy().dtype).reshape(
            tuple(x.shape)
        )
        for name, x in tensors.items()
    }


def without_warnings(function, *args, **options):
    """Calls a function of torch.distributed, which warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def load_torch_dist(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder, as torch reads them."""
    with open(folder / ".metadata", "rb") as file:
        entries = pickle.load(file).state_dict_metadata
    state = {name: torch.empty(x.size, dtype=x.properties.dtype) for name, x in entries.items() if hasattr(x, "size")}
    without_warnings(dcp.load, state, checkpoint_id=str(folder), no_dist=True)
    return state


def load_rank_files(folder: Path) -> dict[str, dict]:
    return {
        file.parent.name: torch.load(file, weights_only=False)
        for file in sorted(folder.glob("iter_*/*/model_optim_rng.pt"))
    }


def qkv_rows(c: ModelConfig) -> list[tuple[str, int]]:
    """The projection and its row for each row of Megatron's qkv: for each kv head its query heads, its k and its v."""
    rows = []
    for g in range(c.kv_heads):
        for n in range(g * c.heads // c.kv_heads, (g + 1) * c.heads // c.kv_heads):
            rows += [("q", n * c.head_width + h) for h in range(c.head_width)]
        rows += [(x, g * c.head_width + h) for x in "kv" for h in range(c.head_width)]
    return rows


def assert_same_parts(source: Checkpoint, twin: Checkpoint, seed: int = 0) -> None:
    """Asserts that random parts of every array equal the same parts of another checkpoint."""
    rng = np.random.default_rng(seed)
    for path, x in source.shapes.items():
        for _ in range(10):
            start = [int(rng.integers(size)) for size in x.shape]
            index = tuple(slice(a, int(rng.integers(a + 1, size + 1))) for a, size in zip(start, x.shape, strict=True))
            part, expected = (np.ascontiguousarray(read_array(x, path, index)) for x in (source, twin))
            assert bits({path: part}) == bits({path: expected}), (path, index)


def save_torch_dist(folder: Path, state: dict, like: Path | None = None, common: dict | None = None) -> Path:
    """Saves a checkpoint with torch, a chunk for each tensor, and copies the small files of the checkpoint `like`."""
    iteration = folder / "iter_0000000"
    planner = DefaultSavePlanner(flatten_state_dict=False)
    without_warnings(dcp.save, state, checkpoint_id=str(iteration), no_dist=True, planner=planner)
    for name in ("metadata.json", "run_config.yaml"):
        if like and (like / "iter_0000000" / name).exists():
            shutil.copyfile(like / "iter_0000000" / name, iteration / name)
    if common is not None:
        torch.save(common, iteration / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("0")
    return folder


def pad_embedding(rows: int, name: str = "embedding.word_embeddings.weight") -> Callable[[dict], dict]:
    """A change of a state that adds rows to the embedding, as `name`."""
    return lambda state: state | {name: torch.cat([state["embedding.word_embeddings.weight"], torch.randn(rows, 64)])}


def save_legacy(folder: Path, files: dict[str, dict]) -> Path:
    """Saves a checkpoint of the legacy format with the content of each rank's file."""
    for rank, content in files.items():
        rank_folder = folder / "iter_0000010" / rank
        rank_folder.mkdir(parents=True)
        torch.save(content, rank_folder / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@contextmanager
def changed_ranks(tmp_path: Path, name: str = "A_bf16_tp2pp2"):
    """Yields the content of a fixture's rank files to be changed, and writes it to `tmp_path`/it afterwards."""
    files = {rank: dict(content) for rank, content in load_rank_files(FIXTURES / "legacy" / name).items()}
    for content in files.values():
        args = vars(content["args"])
        content["args"] = argparse.Namespace(**{key: x for key, x in args.items() if isinstance(x, int | None)})
        content["model"] = {key: x.clone() if hasattr(x, "clone") else x for key, x in content["model"].items()}
    yield files
    shutil.rmtree(tmp_path / "it", ignore_errors=True)
    save_legacy(tmp_path / "it", files)


class Hostile:
    """A pickle that would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
