"""Folders that are not read: each is named for what it is, in a sentence with what to do."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from peers import BITING, hf_model
from safetensors.torch import load_file
from strange_folders import Edit, chain, configure, extend, rename, rewrite, save_bin, save_shards, save_tree
from torch.distributed.checkpoint import FileSystemWriter, save as save_distributed

from gemma2_jax.convert import recognition
from gemma2_jax.convert.opening import open_checkpoint

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model as transformers saves it; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "gemma"
    hf_model(BITING["2b"]).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "gemma"))


def _empty(*names: str, keep: tuple[str, ...] = ("config.json",)) -> Edit:
    """Leaves files of these names, with a word in them, and `keep`; a name that ends with a slash is a folder."""

    def edit(folder: Path) -> None:
        for file in folder.iterdir():
            if file.name not in keep:
                file.unlink()
        for name in names:
            path = folder / name
            (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_text("word")

    return edit


def _write(name: str, text: str | dict) -> Edit:
    return lambda folder: (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def _tree(*keys: str) -> Edit:
    """An Orbax checkpoint of small arrays under these paths, in the folder that is named before a colon."""

    def edit(folder: Path) -> None:
        where, _, names = " ".join(keys).partition(":")
        tree = unflatten_dict({name: np.ones(2, np.float32) for name in names.split()}, sep="/")
        save_tree(folder / where, tree)

    return edit


def _fsdp(folder: Path) -> None:
    """What accelerate saves with SHARDED_STATE_DICT: a dict in a dict."""
    state = {"model": load_file(folder / "model.safetensors")}
    _empty("trainer_state.json")(folder)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that there is one process
        save_distributed(state, storage_writer=FileSystemWriter(folder / "pytorch_model_fsdp_0"), no_dist=True)


def _move_into_subfolder(folder: Path) -> None:
    files = list(folder.iterdir())
    (folder / "final").mkdir()
    for file in files:
        file.rename(folder / "final" / file.name)


def _cached(folder: Path) -> None:
    _empty("blobs/", "refs/main", "snapshots/", keep=())(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
FOREIGN: dict[str, tuple[str, Edit, str]] = {
    "git-lfs": ("pointers of git-lfs", _write("model.safetensors", POINTER),
                "model.safetensors is a pointer of git-lfs; run `git lfs install` and `git lfs pull`"),
    "git-lfs, tokenizer": ("pointers of git-lfs", _write("tokenizer.model", POINTER), "tokenizer.model is a pointer"),
    "git-lfs, one shard": ("pointers of git-lfs", chain(save_shards(), _write("model-00002-of-00002.safetensors",
                           POINTER)), "model-00002-of-00002.safetensors is a pointer"),
    "a login": ("web pages in place of files", _write("model.safetensors", "<!DOCTYPE html><html>"), "a web page in"),
    "a cache": ("folders of the Hub's cache", _cached, "name the folder in its snapshots/"),
    "Keras": ("presets of Keras", chain(_empty("metadata.json", "task.json", "model.weights.h5", "tokenizer.json"),
              _write("config.json", {"module": "keras_hub.src.models.gemma.gemma_backbone", "class_name": "x",
                                     "registered_name": "keras_hub>GemmaBackbone"})), "export_to_transformers"),
    **{kind: ("other generations of Gemma", configure(model_type=kind), rf"model_type {kind}\); this program has Ge")
       for kind in ("gemma", "gemma3", "gemma3_text", "recurrent_gemma", "paligemma", "gemma3n", "t5gemma")},
    "bnb 4": ("quantized models", chain(configure(quantization_config={"quant_method": "bitsandbytes",
              "load_in_4bit": True}, _name_or_path="unsloth/gemma-2-2b-bnb-4bit")),
              r"take the model before it was quantized \(bitsandbytes in 4 bits\): unsloth/gemma-2-2b$"),
    "bnb 8": ("quantized models", configure(quantization_config={"quant_method": "bitsandbytes",
              "load_in_8bit": True}), r"\(bitsandbytes in 8 bits\)$"),
    **{method: ("quantized models", configure(quantization_config={"quant_method": method},
                _name_or_path=f"neuralmagic/gemma-2-9b-it-{name}"), rf"\({method}\): neuralmagic/gemma-2-9b-it$")
       for method, name in {"gptq": "GPTQ-Int4", "awq": "AWQ", "fp8": "FP8", "compressed-tensors": "quantized.w4a16",
                            "torchao": "INT4", "hqq": "HQQ-4bit"}.items()},
    "old GPTQ": ("quantized models", _write("quantize_config.json", {"bits": 4}), "quantize_config.json is there"),
    "MLX": ("quantized models", configure(quantization={"group_size": 64, "bits": 4}), r"\(MLX in 4 bits\)"),
    "a trainer": ("outputs of transformers' Trainer", _empty("checkpoint-500/model.safetensors", "checkpoint-x/",
                  "checkpoint-1000/model.safetensors", "checkpoint-90/", "runs/"),
                  r"newest is .*/checkpoint-1000: python -m gemma2_jax\.convert .*/checkpoint-1000 OUT --to FORMAT$"),
    "ZeRO": ("checkpoints of DeepSpeed", _empty("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
             r"DeepSpeed's shards \(global_step500\); .* zero_to_fp32\.py"),
    "ZeRO, inner": ("checkpoints of DeepSpeed", _empty("zero_pp_rank_0_mp_rank_00_model_states.pt",
                    "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed's shards"),
    "ZeRO, rank": ("checkpoints of DeepSpeed", _empty("mp_rank_00_model_states.pt"), "DeepSpeed's shards"),
    "FSDP": ("shards of FSDP", _fsdp, "accelerate merge-weights .*/pytorch_model_fsdp_0 OUT"),
    "FSDP, inner": ("shards of FSDP", chain(_fsdp, lambda at: [file.rename(at / file.name) for file in
                    (at / "pytorch_model_fsdp_0").iterdir()]), "dcp_to_torch_save"),
    "verl": ("shards of verl", _empty("model_world_size_8_rank_0.pt"), "verl.model_merger"),
    "FSDP's ranks": ("shards of verl", _empty("pytorch_model_fsdp_rank0.bin"), "a file for each rank"),
    "gemma_pytorch": ("gemma_pytorch", _empty("model.ckpt", "tokenizer.model", keep=()), "google/gemma-2-2b"),
    "gemma.cpp": ("gemma.cpp", _empty("2.0-2b-it-sfp.sbs", keep=()), "is of gemma.cpp"),
    "MediaPipe": ("MediaPipe", _empty("gemma2-2b-it-cpu-int8.task", keep=()), "for MediaPipe or LiteRT"),
    "ONNX": ("ONNX", _empty("model.onnx", "model.onnx_data"), "a graph and not a checkpoint"),
    "ONNX of transformers.js": ("ONNX", _empty("onnx/model_q4.onnx"), "is ONNX"),
    "OpenVINO": ("OpenVINO", _empty("openvino_model.xml", "openvino_model.bin"), "openvino_model"),
    "MLC": ("OpenVINO", _empty("mlc-chat-config.json", "params_shard_0.bin"), "mlc-chat-config.json"),
    "Flax": ("weights of transformers' Flax", _empty("flax_model.msgpack"), "Flax or TensorFlow classes only"),
    "NeMo 1": ("archives", _empty("gemma2.nemo", keep=()), "unpack it"),
    "SageMaker": ("archives", _empty("model.tar.gz", keep=()), "unpack it"),
    "EasyDeL": ("EasyDeL", _empty("easydel-model.parameters"), "to_torch"),
    "EasyDeL, sharded": ("EasyDeL", _empty("tensorstore_index.json", "model/"), "to_torch"),
    "MaxText": ("Orbax trees", chain(_empty(keep=()), _tree("0/items: params/params/token_embedder/embedding step")),
                "an Orbax checkpoint in 0/items, of MaxText, which stores other values"),
    "tunix": ("Orbax trees", chain(_empty(keep=()), _tree("7/model_params: layers/0/attn/q_einsum/w/value")),
              "an Orbax checkpoint in 7/model_params, of tunix"),
    "EasyDeL's tree": ("Orbax trees", chain(_empty(), _tree("m: model/layers/0/self_attn/q_proj/kernel")), "EasyDeL"),
    "a part of ours": ("Orbax trees", chain(_empty(keep=()), _tree(": embedding blocks/attn/q/w")), "of this prog"),
    "a stranger's tree": ("Orbax trees", chain(_empty(keep=()), _tree("x: w/kernel")), r"first array is w/kernel\)"),
    "an adapter alone": ("adapters without", _empty("adapter_model.safetensors"), "no adapter_config.json"),
    "no index": ("shards without", chain(save_shards(), lambda at: (at / INDEX).unlink()), "download that file too"),
    "renamed": ("safetensors under", lambda at: (at / "model.safetensors").rename(at / "gemma.safetensors"),
                "weights in gemma.safetensors, and the name is model.safetensors"),
    "model.pt": ("state dicts under", _empty("model.pt"), "rename it to pytorch_model.bin"),
    "a subfolder": ("folders with a model in", _move_into_subfolder, "holds no model itself; name .*/gemma/final$"),
    "no weights": ("configs without", _empty("tokenizer.json", "README.md", ".gitattributes",
                   keep=("config.json",)), "config.json and no weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_it_is_named_with_what_to_do(folder, case):
    _, edit, said = FOREIGN[case]
    edit(folder)
    with pytest.raises(ValueError, match=said) as refused:
        open_checkpoint(folder)
    assert str(refused.value).startswith(f"{folder} ") and len(str(refused.value)) < 600 + 2 * len(str(folder))


def test_every_kind_is_found():
    kinds = {kind.name: [case for case, (name, *_) in FOREIGN.items() if kind.name.startswith(name)]
             for kind in recognition.KINDS}  # fmt: skip
    assert [name for name, cases in kinds.items() if not cases] == []
    page = " ".join((Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text().split())
    assert [name for name in kinds if name not in page] == []


SIGNS: dict[str, tuple[Edit, str]] = {
    "ZeRO-3": (
        rewrite(lambda state: {name: tensor[:0] for name, tensor in state.items()}),
        r"35 of 35 tensors have no elements, .* DeepSpeed ZeRO-3 .* zero_to_fp32\.py",
    ),
    "an adapter within": (extend(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 36)), "merge_and_unload"),
    "flat shards": (rewrite(lambda state: {"_fsdp_wrapped_module._flat_param": torch.ones(9)}), "FULL_STATE_DICT"),
    "bitsandbytes": (extend(model__layers__0__mlp__up_proj__weight__absmax=torch.ones(9)), "bitsandbytes' packed"),
    "GPTQ": (extend(model__layers__0__mlp__up_proj__qweight=torch.ones(9, dtype=torch.int32)), "GPTQ's or AWQ's"),
    "FP8": (
        rewrite(lambda state: state | {"model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "stored as float8_e4m3fn; .* before it was quantized",
    ),
    "gemma_pytorch": (extend(model__layers__0__self_attn__qkv_proj__weight=torch.ones(9)), "gemma_pytorch"),
    "Gemma 3": (extend(model__layers__0__self_attn__q_norm__weight=torch.ones(9)), "which Gemma 3 has"),
    "one name twice": (
        rewrite(lambda state: state | {"module.model.norm.weight": state["model.norm.weight"].clone()}),
        r"holds model\.norm\.weight twice, as model\.norm\.weight and as module\.model\.norm\.weight",
    ),
    "an untied head without an embedding": (
        chain(rename(lambda n: n.replace("model.embed_tokens", "lm_head")), configure(tie_word_embeddings=False)),
        r"lacks model\.embed_tokens\.weight",
    ),
    "a training state's pickle": (
        lambda at: [save_bin(at), torch.save({"epoch": 3, "state": {}}, at / "pytorch_model.bin")],
        "pytorch_model.bin holds 'epoch', which is no tensor",
    ),
    "a whole model's pickle": (
        lambda at: [save_bin(at), torch.save(torch.nn.Linear(1, 1), at / "pytorch_model.bin")],
        "names 'torch.nn.modules.linear.Linear'",
    ),
    "an index of other files": (
        chain(save_shards("bin"), _write("pytorch_model.bin.index.json", {"weight_map": {"a": "../x.bin"}})),
        r"lists '\.\./x\.bin'; an index may only name bin files",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SIGNS)
def test_tensors_tell_what_a_folder_is(folder, case):
    edit, said = SIGNS[case]
    edit(folder)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.gguf", "is no GGUF file, or is damaged: it does not begin as one"),
        ("a.sbs", "gemma.cpp"),
        ("model.ckpt", "gemma_pytorch"),
        ("a.task", "MediaPipe"),
        ("a.nemo", "unpack"),
        ("model.safetensors", "is a file; name the folder that holds it, {}$"),
        ("gemma.safetensors", "is a file; name the folder that holds it, {}$"),
    ],
)
def test_files_are_named_too(folder, name, said):
    (folder / name).write_text("word")
    with pytest.raises(ValueError, match=said.format(folder)):
        open_checkpoint(folder / name)
