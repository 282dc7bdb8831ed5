"""Hugging Face folders as other programs leave them, and Orbax trees: what tests of converting make and change."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import torch
from etils import epath
from safetensors.torch import load_file, save_file

from gemma2_jax.convert.formats import table

State = dict[str, torch.Tensor]
Edit = Callable[[Path], object]  # changes a folder


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The same bits in NumPy, bfloat16 too."""
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.detach().numpy()


def rewrite(update: Callable[[State], State]) -> Edit:
    """Changes the state dict of a folder."""

    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(update(state), folder / "model.safetensors", {"format": "pt"})

    return edit


def rename(update: Callable[[str], str]) -> Edit:
    """Renames the tensors of a folder."""
    return rewrite(lambda state: {update(name): tensor for name, tensor in state.items()})


def extend(**tensors: torch.Tensor) -> Edit:
    """Adds tensors, whose names have two underscores for each dot."""
    return rewrite(lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()})


def configure(**values) -> Edit:
    """Changes keys of config.json."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def chain(*edits: Edit) -> Edit:
    """Makes several changes, one after another."""

    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def save_head(update: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Adds an output matrix made from the embedding."""
    return rewrite(lambda state: state | {table.HEAD: update(state["model.embed_tokens.weight"]).clone()})


def save_bin(folder: Path) -> None:
    """Saves the tensors as pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def save_shards(suffix: str = "safetensors", listed: tuple[str, ...] = (), unlisted: tuple[str, ...] = ()):
    """Splits the file into two with an index, which lists more or fewer tensors than the files have."""

    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        stem = "model" if suffix == "safetensors" else "pytorch_model"
        weight_map = {}
        for number, names in enumerate([list(state)[::2], list(state)[1::2]], 1):
            file = f"{stem}-{number:05}-of-00002.{suffix}"
            part = {name: state[name] for name in names}
            if suffix == "bin":
                torch.save(part, folder / file)
            else:
                save_file(part, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        weight_map |= dict.fromkeys(listed, file)
        weight_map = {name: file for name, file in weight_map.items() if name not in unlisted}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()

    return edit


def save_base_class(folder: Path) -> None:
    """What Gemma2Model.save_pretrained writes."""
    rename(lambda name: name.removeprefix("model."))(folder)
    configure(architectures=["Gemma2Model"])(folder)


def save_tree(folder: Path, tree: dict, **options) -> None:
    """Saves an Orbax checkpoint."""
    handler = ocp.PyTreeCheckpointHandler(**options)
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(tree))
    handler.finalize(epath.Path(folder))
    handler.close()


def deepmind_tree(arrays: dict[str, np.ndarray], transposed: bool, padding: int = 0) -> dict[str, np.ndarray]:
    """The nested parameters of google-deepmind/gemma, by paths, written out by hand."""
    embedding = arrays["embedding"]
    tree = {
        "embedder/input_embedding": np.concatenate([embedding, embedding[:padding] * 0 + 1]),
        "final_norm/scale": arrays["final_norm/w"],
    }
    for layer in range(len(arrays["blocks/attn/q/w"])):
        at = {path.removeprefix("blocks/"): w[layer] for path, w in arrays.items() if path.startswith("blocks/")}
        gate_up = np.stack([at["mlp/gate/w"], at["mlp/up/w"]])
        tree |= {
            f"layer_{layer}/{name}": np.ascontiguousarray(w)
            for name, w in {
                "attn/q_einsum/w": at["attn/q/w"].transpose(1, 0, 2),
                "attn/kv_einsum/w": np.stack([at["attn/k/w"], at["attn/v/w"]]).transpose(0, 2, 1, 3),
                "attn/attn_vec_einsum/w": at["attn/o/w"],
                "mlp/gating_einsum": gate_up.transpose(0, 2, 1) if transposed else gate_up,
                "mlp/linear": at["mlp/down/w"],
                "pre_attention_norm/scale": at["pre_attn_norm/w"],
                "post_attention_norm/scale": at["post_attn_norm/w"],
                "pre_ffw_norm/scale": at["pre_mlp_norm/w"],
                "post_ffw_norm/scale": at["post_mlp_norm/w"],
            }.items()
        }
    return tree


def kaggle_tree(tree: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The same with Kaggle's names: a dict by long names, of dicts by the last part."""
    flat = {}
    for path, w in tree.items():
        name, _, leaf = f"transformer/{path}{'/w' if '/mlp/' in path else ''}".rpartition("/")
        flat.setdefault(name, {})[leaf] = w
    return flat
