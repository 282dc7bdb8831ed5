"""Recognizes folders and files that this program does not read, and says what to do about each.

`KINDS` is the table: a kind has a name, a way to find it by names of files, by config.json or by the first bytes of a
file, and the sentence that the user gets. Another kind is another row. Formats that are read are listed in
`opening`, which asks here before it opens what other programs wrote; so no row may match a folder that can be read.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import filter as fnfilter
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from gemma2_jax.convert.files import memory, orbax, safetensors, torch_dist
from gemma2_jax.convert.formats import deepmind, megatron

MODEL_FILES = (safetensors.MODEL, "pytorch_model.bin", "pytorch_model_fsdp.bin")  # of several, the first is read
_READ_FILES = (*(name + end for name in MODEL_FILES for end in ("", ".index.json")), "adapter_config.json")
_MOST_NAMES = 10_000  # how many names of a folder are looked at


@dataclass(frozen=True)
class Folder:
    """What is looked at: the names of a folder, the beginnings of its files, and its config.json."""

    path: Path
    only: str = ""  # the file that the user named, if it was a file

    @cached_property
    def _entries(self) -> dict[str, bool]:
        """Whether each name is a folder."""
        with os.scandir(self.path) as entries:
            found = {entry.name: Path(entry).is_dir() for entry in islice(entries, _MOST_NAMES)}
        return {self.only: False} if self.only else found

    @cached_property
    def files(self) -> list[str]:
        """The names of its files, sorted."""
        return sorted(name for name, is_folder in self._entries.items() if not is_folder)

    @cached_property
    def folders(self) -> list[str]:
        """The names of its folders, sorted."""
        return sorted(name for name, is_folder in self._entries.items() if is_folder)

    @property
    def is_read(self) -> bool:
        """Whether there is a file by which some format is recognized, so that other files beside it do not matter."""
        return any(name in self._entries for name in (*_READ_FILES, megatron.TRACKER))

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json; empty if there is none, or if it is damaged, which opening the folder reports."""
        try:
            return safetensors.read_json(self.path / "config.json") if "config.json" in self._entries else {}
        except (ValueError, OSError):
            return {}

    def beginning(self, name: str) -> bytes:
        """The first bytes of a file; none of a pipe or a device."""
        path = self.path / name
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(200)


@dataclass(frozen=True)
class Kind:
    """A kind of folder or file that is not read."""

    name: str
    find: Callable[[Folder], str | None]  # returns what replaces {found} in the sentence; None: it is another kind
    said: str  # the rest of the sentence, which begins with the path


def refuse_foreign(path: Path) -> None:
    """Raises ValueError if a folder or a file is of a known kind that this program does not read."""
    folder = Folder(path) if path.is_dir() else Folder(path.parent, only=path.name)
    for kind in KINDS:
        found = kind.find(folder)
        if found is not None:
            raise ValueError(f"{path} {kind.said.format(found=found, path=path)}")


def _files(*patterns: str) -> Callable[[Folder], str | None]:
    """Finds a file by its name, where nothing beside it is read."""

    def find(folder: Folder) -> str | None:
        found = [name for pattern in patterns for name in fnfilter(folder.files, pattern)]
        return found[0] if found and not folder.is_read else None

    return find


def _beginning(*texts: bytes) -> Callable[[Folder], str | None]:
    """Finds a file of weights or of a tokenizer that begins with one of these texts, in lower case."""
    kinds = ("*.safetensors", "*.bin", "*.gguf", "*.h5", "*.ckpt", "*.msgpack", "tokenizer.json", "tokenizer.model")

    def find(folder: Folder) -> str | None:
        names = [name for kind in kinds for name in fnfilter(folder.files, kind)][:200]
        return next((name for name in names if folder.beginning(name).lower().startswith(texts)), None)

    return find


def _newest_checkpoint(folder: Folder) -> str | None:
    numbers = [int(name.removeprefix("checkpoint-")) for name in fnfilter(folder.folders, "checkpoint-[0-9]*")
               if re.fullmatch(r"checkpoint-[0-9]{1,12}", name)]  # fmt: skip
    return f"checkpoint-{max(numbers)}" if numbers and not folder.is_read else None


def _deepspeed(folder: Folder) -> str | None:
    states = fnfilter(folder.files, "*_model_states.pt") + fnfilter(folder.files, "*_optim_states.pt")
    found = fnfilter(folder.folders, "global_step*") + states
    return found[0] if found and not folder.is_read else None


def _fsdp(folder: Folder) -> str | None:
    """A folder of torch.distributed.checkpoint with names that are not Megatron's, or one that holds such a folder."""
    if folder.is_read:
        return None
    for name in (".", *fnfilter(folder.folders, "pytorch_model_fsdp_*"), *fnfilter(folder.folders, "model")):
        path = folder.path / name
        if (path / torch_dist.METADATA).is_file() and not (path / megatron.BACKEND_FILE).exists():
            try:
                names = memory.read_bounded(path / torch_dist.METADATA, 1 << 26)
            except (ValueError, OSError):
                return None
            return None if b"decoder.layers." in names or b".layers." not in names else str(path)
    return None


_GEMMAS = {
    "gemma": "the first Gemma",
    "gemma3": "Gemma 3",
    "gemma3_text": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "gemma4": "Gemma 4",
    "recurrentgemma": "RecurrentGemma",
    "recurrent_gemma": "RecurrentGemma",
    "paligemma": "PaliGemma, which sees images",
    "shieldgemma2": "ShieldGemma 2, which is a Gemma 3",
    "t5gemma": "T5Gemma, an encoder and a decoder",
    "vaultgemma": "VaultGemma",
}


def _other_gemma(folder: Folder) -> str | None:
    kind = folder.config.get("model_type")
    return f"{_GEMMAS[kind]} (model_type {kind})" if isinstance(kind, str) and kind in _GEMMAS else None


_QUANTIZED_NAME = re.compile(
    r"-(?:unsloth-)?bnb-[48]bit$|-(?:GPTQ|AWQ|FP8|INT[48]|W[48]A(?:16|8)|quantized\.|[2-8]bit|EXL2|HQQ)\b.*$",
    re.IGNORECASE,
)


def _quantized(folder: Folder) -> str | None:
    if "adapter_config.json" in folder.files:
        return None
    config = folder.config.get("quantization_config")
    method = config.get("quant_method", "?") if isinstance(config, dict) else None
    if isinstance(config, dict) and method == "bitsandbytes":
        method = f"bitsandbytes in {8 if config.get('load_in_8bit') else 4} bits"
    mlx = folder.config.get("quantization")
    if method is None and isinstance(mlx, dict) and "bits" in mlx:
        method = f"MLX in {str(mlx['bits'])[:10]} bits"
    found = fnfilter(folder.files, "quantize_config.json") + fnfilter(folder.files, "quant_config.json")
    if method is None and found:
        method = f"{found[0]} is there"
    if method is None:
        return None
    cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", str(folder.path))  # a folder of the Hub's cache
    name = f"{cached[1]}/{cached[2]}" if cached else folder.config.get("_name_or_path") or folder.path.name
    shorter = _QUANTIZED_NAME.sub("", name) if isinstance(name, str) and len(name) < 200 else name
    return f"({str(method)[:60]}){'' if shorter == name else f': {shorter}'}"


def _only_config(folder: Folder) -> str | None:
    weights = [name for name in folder.files if not name.endswith((".json", ".md", ".jinja", ".model", ".txt"))]
    others = [name for name in weights if not name.startswith(".")]
    is_model = folder.config.get("model_type") == "gemma2"
    return "config.json" if is_model and not (others or folder.folders or folder.is_read) else None


def _inner_models(folder: Folder) -> str | None:
    """The folders within, of which each holds a model in Hugging Face's format."""
    path = folder.path
    if folder.only or folder.is_read or {"config.json", *fnfilter(folder.files, "*.gguf")} & {*folder.files}:
        return None
    if megatron.iteration_folder(path) or deepmind.find_root(path):
        return None
    names = [name + end for name in MODEL_FILES for end in ("", ".index.json")]
    found = [
        inner
        for inner in folder.folders[:200]
        if (path / inner / "config.json").is_file() and any((path / inner / name).is_file() for name in names)
    ]
    return " or ".join(str(path / inner) for inner in found[:3]) or None


def _renamed(folder: Folder) -> str | None:
    numbered = fnfilter(folder.files, "model-?????-of-?????.safetensors")
    found = fnfilter(folder.files, "*.safetensors")
    return found[0] if found and not (numbered or folder.is_read or folder.only) else None


def _without_index(folder: Folder) -> str | None:
    found = fnfilter(folder.files, "model-?????-of-?????.safetensors")
    alone = found and not (folder.is_read or folder.only)
    return f"{found[0]} and no model.safetensors.index.json" if alone else None


# The arrays of trees that other programs have, whose paths tell them apart.
_TREES: tuple[tuple[str, str], ...] = (
    (r"(.*/)?token_embedder/embedding(/value)?", "MaxText, which stores other values (norms plus 1, an embedding times "
     "sqrt(width), scaled queries); convert it with MaxText's checkpoint_conversion/to_huggingface.py"),
    (r"(.*/)?layers/\d+/attn/(q_einsum|kv_einsum)/.*", "tunix; save it with tunix's "
     "save_lora_merged_model_as_safetensors, which writes Hugging Face's files"),
    (r"(.*/)?layers/\d+/self_attn/q_proj/kernel(/.*)?", "EasyDeL; save it with its model.to_torch().save_pretrained"),
    (r"(.*/)?blocks/attn/q(/.*)?", "this program; name the folder that it lies in, with config.json or config.txt"),
)  # fmt: skip


def _other_tree(folder: Folder) -> str | None:
    """An Orbax checkpoint, in the folder or up to three levels below, of a tree that no format has."""
    if folder.only or folder.is_read or deepmind.find_root(folder.path):
        return None
    for root in orbax.find_roots(folder.path):
        paths = orbax.list_paths(root)
        unknown = (
            f"a program that this one does not know (its first array is {next(iter(paths), 'none')[:100]}); save "
            "its weights in Hugging Face's format"
        )
        said = next((said for form, said in _TREES if any(re.fullmatch(form, path) for path in paths)), unknown)
        return f"of {said}" if root == folder.path else f"in {root.relative_to(folder.path)}, of {said}"
    return None


_HUGGING_FACE = "take the same model's Hugging Face repository (google/gemma-2-2b, -9b, -27b, or -it)"
KINDS: tuple[Kind, ...] = (
    Kind("pointers of git-lfs", _beginning(b"version https://git-lfs"),
         "was cloned without its large files: {found} is a pointer of git-lfs; run `git lfs install` and `git lfs "
         "pull` in the clone"),
    Kind("web pages in place of files", _beginning(b"<!doctype html", b"<html"),
         "has a web page in place of {found}, such as a login or an error; download it again with `hf download`"),
    Kind("folders of the Hub's cache", lambda f: "snapshots" if {"blobs", "snapshots"} <= {*f.folders} else None,
         "is a folder of the Hub's cache; name the folder in its {found}/, or the Hub id"),
    Kind("presets of Keras", lambda f: "" if "registered_name" in f.config else _files("*.weights.h5", "*.keras")(f),
         "is a preset of Keras; write Hugging Face's files with keras_hub's export_to_transformers, or "
         f"{_HUGGING_FACE}"),
    Kind("other generations of Gemma", _other_gemma,
         "is {found}; this program has Gemma 2 only (model_type gemma2)"),
    Kind("quantized models (bitsandbytes, GPTQ, AWQ, FP8, compressed-tensors, MLX)", _quantized,
         "is quantized, and rounded weights are not the model's; take the model before it was quantized {found}"),
    Kind("outputs of transformers' Trainer", _newest_checkpoint,
         "holds checkpoints of transformers' Trainer and no weights itself; the newest is {path}/{found}: python -m "
         "gemma2_jax.convert {path}/{found} OUT --to FORMAT"),
    Kind("checkpoints of DeepSpeed", _deepspeed,
         "holds DeepSpeed's shards ({found}); join them with the zero_to_fp32.py that DeepSpeed left beside its "
         "global_step folder (python zero_to_fp32.py . OUT --safe_serialization), and copy config.json to OUT"),
    Kind("shards of FSDP", _fsdp,
         "holds FSDP's shards; join them with `accelerate merge-weights {found} OUT`, or with dcp_to_torch_save of "
         "torch.distributed.checkpoint.format_utils into OUT/pytorch_model.bin, and copy config.json to OUT"),
    Kind("shards of verl and of FSDP's ranks", _files("model_world_size_*_rank_*.pt", "pytorch_model_fsdp*_rank*.bin"),
         "holds a file for each rank of FSDP ({found}); join them with the program that wrote them: verl's is `python "
         "-m verl.model_merger merge --backend fsdp`"),
    Kind("gemma_pytorch", _files("model*.ckpt"), "is of gemma_pytorch ({found}); " f"{_HUGGING_FACE}"),
    Kind("gemma.cpp", _files("*.sbs"), "is of gemma.cpp ({found}), whose weights are compressed; " f"{_HUGGING_FACE}"),
    Kind("MediaPipe, TFLite and LiteRT", _files("*.task", "*.tflite", "*.litertlm"),
         "is for MediaPipe or LiteRT ({found}), whose weights are quantized; " f"{_HUGGING_FACE}"),
    Kind("ONNX", lambda f: _files("*.onnx", "*.onnx_data")(f) or ("onnx" if f.folders == ["onnx"] and not f.is_read
                                                                 else None),
         "is ONNX ({found}), a graph and not a checkpoint; " f"{_HUGGING_FACE}"),
    Kind("OpenVINO, MLC and CTranslate2", _files("openvino_model.*", "mlc-chat-config.json", "ndarray-cache.json",
                                                 "shared_vocabulary.*"),
         "is compiled for an inference program ({found}); take the model that it was made from"),
    Kind("weights of transformers' Flax and TensorFlow classes", _files("flax_model*.msgpack", "tf_model*.h5"),
         "has weights of transformers' Flax or TensorFlow classes only ({found}); " f"{_HUGGING_FACE}"),
    Kind("archives", _files("*.nemo", "*.tar", "*.tar.gz", "*.tgz", "*.zip"),
         "is an archive ({found}); unpack it, and name the folder that comes out"),
    Kind("EasyDeL", _files("easydel-model.parameters*", "tensorstore_index.json"),
         "is of EasyDeL ({found}); save it with its model.to_torch().save_pretrained"),
    Kind("Orbax trees of MaxText, tunix and EasyDeL", _other_tree, "holds an Orbax checkpoint {found}"),
    Kind("adapters without their config", _files("adapter_model.safetensors", "adapter_model.bin"),
         "has an adapter's weights ({found}) and no adapter_config.json; download that file too"),
    Kind("shards without their index", _without_index, "has {found}; download that file too"),
    Kind("safetensors under another name", _renamed,
         "has weights in {found}, and the name is model.safetensors; rename it, beside its config.json"),
    Kind("state dicts under another name", _files("model.pt", "model.pth", "pytorch_model.pt", "model.bin", "*.pth"),
         "has {found}; if it is a state dict (torch.save of model.state_dict()), rename it to pytorch_model.bin, "
         "beside its config.json"),
    Kind("folders with a model in a subfolder", _inner_models, "holds no model itself; name {found}"),
    Kind("configs without weights", _only_config,
         "has {found} and no weights; download them too (`hf download`), or name it as --hf-config where only the "
         "config is needed"),
)  # fmt: skip
