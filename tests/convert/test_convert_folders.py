"""Model folders that people bring: read bit for bit, or named for what they are with what to do."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers
from etils import epath
from flax.traverse_util import unflatten_dict
from peers import BITING, hf_model
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter, save as save_distributed

from gemma2_jax.config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B
from gemma2_jax.convert import recognition
from gemma2_jax.convert.checkpoints import open_checkpoint, read_array
from gemma2_jax.convert.formats import deepmind, table
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.writing import write_checkpoint

MODEL = BITING["2b"]
INDEX = "model.safetensors.index.json"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> transformers.Gemma2ForCausalLM:
    return hf_model(MODEL).bfloat16()


@pytest.fixture(scope="module")
def arrays(model) -> dict[str, np.ndarray]:
    state = {name: _numpy(tensor) for name, tensor in model.state_dict().items()}
    return table.from_hf({name: tensor for name, tensor in state.items() if name != table.HEAD}, MODEL)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """The model as transformers saves it; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "gemma"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "gemma"))


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.detach().numpy()


def _assert_same(folder: Path, arrays: dict[str, np.ndarray], **options) -> tuple[str, ...]:
    """Asserts that the folder has these arrays, bit for bit; gives the notes."""
    found = open_checkpoint(folder, **options)
    assert found.shapes.keys() == arrays.keys()
    for path, wanted in arrays.items():
        read = read_array(found, path, tuple(slice(0, size) for size in wanted.shape))
        assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape), path
        assert read.tobytes() == wanted.tobytes(), path
    return found.notes


def _edit(change: Callable[[State], State | None]) -> Callable[[Path], None]:
    """Changes the state dict of a folder."""

    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        save_file(change(state) or state, folder / "model.safetensors", {"format": "pt"})

    return edit


def _rename(change: Callable[[str], str]) -> Callable[[Path], None]:
    return _edit(lambda state: {change(name): tensor for name, tensor in state.items()})


def _add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return _edit(lambda state: state | {name.replace("__", "."): tensor for name, tensor in tensors.items()})


def _configure(**values) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _steps(*edits: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def _with_head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return _edit(lambda state: state | {table.HEAD: change(state["model.embed_tokens.weight"]).clone()})


def _to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _to_shards(suffix: str = "safetensors", listed: tuple[str, ...] = (), unlisted: tuple[str, ...] = ()):
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


def _base_class(folder: Path) -> None:
    """What Gemma2Model.save_pretrained writes."""
    _rename(lambda name: name.removeprefix("model."))(folder)
    _configure(architectures=["Gemma2Model"])(folder)


BUFFERS = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
READ: dict[str, tuple[Callable[[Path], object], str]] = {
    "as it is": (lambda folder: None, ""),
    "a head equal to the embedding": (_with_head(lambda head: head), ""),
    "a head in float32": (_with_head(torch.Tensor.float), ""),
    "an untied config": (_configure(tie_word_embeddings=False), "its config unties the output matrix"),
    "an untied config with an equal head": (
        _steps(_configure(tie_word_embeddings=False), _with_head(torch.Tensor.float)),
        "its config unties the output matrix",
    ),
    "a head in the index alone": (_to_shards(listed=(table.HEAD,)), ""),
    "a head in the file alone": (_steps(_with_head(lambda head: head), _to_shards(unlisted=(table.HEAD,))), ""),
    "Gemma2Model": (_base_class, "embed_tokens.weight is read as model.embed_tokens.weight"),
    "torch.compile": (_rename("_orig_mod.{}".format), "_orig_mod.model.embed_tokens.weight is read as"),
    "DataParallel": (_steps(_with_head(lambda head: head), _rename("module.{}".format)), "is read as"),
    "both, and inside": (
        _rename(lambda name: "module._orig_mod." + name.replace("layers.", "layers._orig_mod.module.")),
        "is read as",
    ),
    "FSDP and checkpointing inside": (
        _rename(lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.")),
        "is read as",
    ),
    "compiled Gemma2Model": (
        _steps(_base_class, _rename("_orig_mod.{}".format)),
        "_orig_mod.embed_tokens.weight is read as model.embed_tokens.weight",
    ),
    "a trainer's class around it": (
        _steps(_with_head(lambda head: head), _rename("policy.{}".format)),
        "policy.lm_head.weight is read as lm_head.weight",
    ),
    "buffers of old versions": (
        _edit(lambda state: state | BUFFERS),
        "passed over 3 buffers that follow from the config: model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
    "buffers of another dtype": (_add(model__rotary_emb__inv_freq=torch.ones(8, dtype=torch.float64)), "passed over"),
    "pytorch_model.bin": (_to_bin, ""),
    "pytorch_model.bin in shards": (_to_shards("bin"), ""),
    "pytorch_model.bin with a tied head": (
        lambda folder: _steps(
            _to_bin,
            lambda at: torch.save(
                (state := torch.load(at / "pytorch_model.bin"))
                | {table.HEAD: state["model.embed_tokens.weight"]},
                at / "pytorch_model.bin",
            ),
        )(folder),
        "",
    ),
    "pytorch_model.bin of views": (
        lambda folder: _steps(
            _to_bin,
            lambda at: torch.save(
                {
                    name: torch.stack([tensor, tensor], -1)[..., 1]
                    for name, tensor in torch.load(at / "pytorch_model.bin").items()
                },
                at / "pytorch_model.bin",
            ),
        )(folder),
        "",
    ),
    "FSDP's full state dict": (
        _steps(_to_bin, lambda at: (at / "pytorch_model.bin").rename(at / "pytorch_model_fsdp.bin")),
        "",
    ),
    "both kinds of file": (
        _steps(lambda at: shutil.copy(at / "model.safetensors", at / "kept"), _to_bin,
               lambda at: (at / "kept").rename(at / "model.safetensors")),
        "pytorch_model.bin was not read, as model.safetensors is there",
    ),
    "what a trainer leaves beside it": (
        lambda at: [(at / "checkpoint-9").mkdir(), (at / "training_args.bin").write_bytes(b"x"),
                    (at / "global_step9").mkdir(), (at / "q.gguf").touch(), (at / "onnx").mkdir()],
        "",
    ),
    "MLX without quantization": (
        lambda at: save_file(load_file(at / "model.safetensors"), at / "model.safetensors", {"format": "mlx"}), ""
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_it_is_read_bit_for_bit(folder, arrays, case):
    edit, said = READ[case]
    edit(folder)
    notes = " | ".join(_assert_same(folder, arrays))
    assert (said in notes) if said else not notes, notes


VALUE_HEAD = {"v_head__summary__weight": torch.ones(1, 36), "v_head__summary__bias": torch.ones(1)}
DROPPED: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a value head": (_add(**VALUE_HEAD), "v_head.*", r"has a value head, .* \(v_head.summary.* --drop 'v_head\.\*'"),
    "a reward model": (_add(score__weight=torch.ones(1, 36)), "score.*", r"reward model's head .* --drop 'score\.\*'"),
    "a wrapped one": (
        _steps(_add(score__weight=torch.ones(1, 36)), _rename("module.{}".format)), "module.score.*", "--drop 'score"
    ),
    "an untied head": (
        _with_head(lambda head: head.index_fill(0, torch.tensor([3]), 1)), "*lm_head.weight",
        r"lm_head\.weight is not the embedding \(it differs from the embedding in 1 of 384 rows\), so that the model "
        r"has an untied head; .*; --drop '\*lm_head\.weight'",
    ),
    "a longer head": (
        _with_head(lambda head: torch.cat([head, head[:2]])), table.HEAD, r"it has shape \(386, 36\) where the emb"
    ),
    "an unknown tensor": (_add(extra=torch.ones(2)), "ext?a", "has unexpected extra; check"),
}  # fmt: skip


@pytest.mark.parametrize("case", DROPPED)
def test_heads_are_named_and_left_out_when_asked(folder, arrays, case):
    edit, pattern, said = DROPPED[case]
    edit(folder)
    with pytest.raises(ValueError, match=said):
        open_checkpoint(folder)
    assert "left out, as --drop asks: " in _assert_same(folder, arrays, drop=(pattern,))[-1]
    with pytest.raises(ValueError, match=r"--drop 'v_hed\.\*' fits none of the \d+ tensors of"):
        open_checkpoint(folder, drop=(pattern, "v_hed.*"))


def _empty(*names: str, keep: tuple[str, ...] = ("config.json",)) -> Callable[[Path], None]:
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


def _write(name: str, text: str | dict) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text if isinstance(text, str) else json.dumps(text))


def _tree(*keys: str) -> Callable[[Path], object]:
    """An Orbax checkpoint of small arrays under these paths, in the folder that is named before a colon."""

    def edit(folder: Path) -> None:
        where, _, names = " ".join(keys).partition(":")
        tree = unflatten_dict({name: np.ones(2, np.float32) for name in names.split()}, sep="/")
        _save_tree(folder / where, tree)

    return edit


def _save_tree(folder: Path, tree: dict, **options) -> None:
    handler = ocp.PyTreeCheckpointHandler(**options)
    handler.save(epath.Path(folder), args=ocp.args.PyTreeSave(tree))
    handler.finalize(epath.Path(folder))
    handler.close()


def _fsdp(folder: Path) -> None:
    """What accelerate saves with SHARDED_STATE_DICT: a dict in a dict."""
    state = {"model": load_file(folder / "model.safetensors")}
    _empty("trainer_state.json")(folder)
    with warnings.catch_warnings(category=UserWarning, action="ignore"):  # that there is one process
        save_distributed(state, storage_writer=FileSystemWriter(folder / "pytorch_model_fsdp_0"), no_dist=True)


def _cached(folder: Path) -> None:
    _empty("blobs/", "refs/main", "snapshots/", keep=())(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
FOREIGN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "git-lfs": ("pointers of git-lfs", _write("model.safetensors", POINTER),
                "model.safetensors is a pointer of git-lfs; run `git lfs install` and `git lfs pull`"),
    "git-lfs, tokenizer": ("pointers of git-lfs", _write("tokenizer.model", POINTER), "tokenizer.model is a pointer"),
    "git-lfs, one shard": ("pointers of git-lfs", _steps(_to_shards(), _write("model-00002-of-00002.safetensors",
                           POINTER)), "model-00002-of-00002.safetensors is a pointer"),
    "a login": ("web pages in place of files", _write("model.safetensors", "<!DOCTYPE html><html>"), "a web page in"),
    "a cache": ("folders of the Hub's cache", _cached, "name the folder in its snapshots/"),
    "Keras": ("presets of Keras", _steps(_empty("metadata.json", "task.json", "model.weights.h5", "tokenizer.json"),
              _write("config.json", {"module": "keras_hub.src.models.gemma.gemma_backbone", "class_name": "x",
                                     "registered_name": "keras_hub>GemmaBackbone"})), "export_to_transformers"),
    **{kind: ("other generations of Gemma", _configure(model_type=kind), rf"model_type {kind}\); this program has Ge")
       for kind in ("gemma", "gemma3", "gemma3_text", "recurrent_gemma", "paligemma", "gemma3n", "t5gemma")},
    "bnb 4": ("quantized models", _steps(_configure(quantization_config={"quant_method": "bitsandbytes",
              "load_in_4bit": True}, _name_or_path="unsloth/gemma-2-2b-bnb-4bit")),
              r"take the model before it was quantized \(bitsandbytes in 4 bits\): unsloth/gemma-2-2b$"),
    "bnb 8": ("quantized models", _configure(quantization_config={"quant_method": "bitsandbytes",
              "load_in_8bit": True}), r"\(bitsandbytes in 8 bits\)$"),
    **{method: ("quantized models", _configure(quantization_config={"quant_method": method},
                _name_or_path=f"neuralmagic/gemma-2-9b-it-{name}"), rf"\({method}\): neuralmagic/gemma-2-9b-it$")
       for method, name in {"gptq": "GPTQ-Int4", "awq": "AWQ", "fp8": "FP8", "compressed-tensors": "quantized.w4a16",
                            "torchao": "INT4", "hqq": "HQQ-4bit"}.items()},
    "old GPTQ": ("quantized models", _write("quantize_config.json", {"bits": 4}), "quantize_config.json is there"),
    "MLX": ("quantized models", _configure(quantization={"group_size": 64, "bits": 4}), r"\(MLX in 4 bits\)"),
    "a trainer": ("outputs of transformers' Trainer", _empty("checkpoint-500/model.safetensors", "checkpoint-x/",
                  "checkpoint-1000/model.safetensors", "checkpoint-90/", "runs/"),
                  r"newest is .*/checkpoint-1000: python -m gemma2_jax\.convert .*/checkpoint-1000 OUT --to FORMAT$"),
    "ZeRO": ("checkpoints of DeepSpeed", _empty("global_step500/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
             r"DeepSpeed's shards \(global_step500\); .* zero_to_fp32\.py"),
    "ZeRO, inner": ("checkpoints of DeepSpeed", _empty("zero_pp_rank_0_mp_rank_00_model_states.pt",
                    "zero_pp_rank_0_mp_rank_00_optim_states.pt"), "DeepSpeed's shards"),
    "ZeRO, rank": ("checkpoints of DeepSpeed", _empty("mp_rank_00_model_states.pt"), "DeepSpeed's shards"),
    "FSDP": ("shards of FSDP", _fsdp, "accelerate merge-weights .*/pytorch_model_fsdp_0 OUT"),
    "FSDP, inner": ("shards of FSDP", _steps(_fsdp, lambda at: [file.rename(at / file.name) for file in
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
    "MaxText": ("Orbax trees", _steps(_empty(keep=()), _tree("0/items: params/params/token_embedder/embedding step")),
                "an Orbax checkpoint in 0/items, of MaxText, which stores other values"),
    "tunix": ("Orbax trees", _steps(_empty(keep=()), _tree("7/model_params: layers/0/attn/q_einsum/w/value")),
              "an Orbax checkpoint in 7/model_params, of tunix"),
    "EasyDeL's tree": ("Orbax trees", _steps(_empty(), _tree("m: model/layers/0/self_attn/q_proj/kernel")), "EasyDeL"),
    "a part of ours": ("Orbax trees", _steps(_empty(keep=()), _tree(": embedding blocks/attn/q/w")), "of this program"),
    "a stranger's tree": ("Orbax trees", _steps(_empty(keep=()), _tree("x: w/kernel")), r"first array is w/kernel\)"),
    "no index": ("shards without", _steps(_to_shards(), lambda at: (at / INDEX).unlink()), "download that file too"),
    "renamed": ("safetensors under", lambda at: (at / "model.safetensors").rename(at / "gemma.safetensors"),
                "weights in gemma.safetensors, and the name is model.safetensors"),
    "model.pt": ("state dicts under", _empty("model.pt"), "rename it to pytorch_model.bin"),
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


SIGNS: dict[str, tuple[Callable[[Path], object], str]] = {
    "ZeRO-3": (
        _edit(lambda state: {name: tensor[:0] for name, tensor in state.items()}),
        r"35 of 35 tensors have no elements, .* DeepSpeed ZeRO-3 .* zero_to_fp32\.py",
    ),
    "an adapter within": (_add(model__layers__0__mlp__up_proj__lora_A__weight=torch.ones(2, 36)), "merge_and_unload"),
    "flat shards": (_edit(lambda state: {"_fsdp_wrapped_module._flat_param": torch.ones(9)}), "FULL_STATE_DICT"),
    "bitsandbytes": (_add(model__layers__0__mlp__up_proj__weight__absmax=torch.ones(9)), "bitsandbytes' packed"),
    "GPTQ": (_add(model__layers__0__mlp__up_proj__qweight=torch.ones(9, dtype=torch.int32)), "GPTQ's or AWQ's"),
    "FP8": (
        _edit(lambda state: state | {"model.norm.weight": state["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "stored as float8_e4m3fn; .* before it was quantized",
    ),
    "gemma_pytorch": (_add(model__layers__0__self_attn__qkv_proj__weight=torch.ones(9)), "gemma_pytorch"),
    "Gemma 3": (_add(model__layers__0__self_attn__q_norm__weight=torch.ones(9)), "which Gemma 3 has"),
    "one name twice": (
        _edit(lambda state: state | {"module.model.norm.weight": state["model.norm.weight"].clone()}),
        r"holds model\.norm\.weight twice, as model\.norm\.weight and as module\.model\.norm\.weight",
    ),
    "a training state's pickle": (
        lambda at: [_to_bin(at), torch.save({"epoch": 3, "state": {}}, at / "pytorch_model.bin")],
        "pytorch_model.bin holds 'epoch', which is no tensor",
    ),
    "a whole model's pickle": (
        lambda at: [_to_bin(at), torch.save(torch.nn.Linear(1, 1), at / "pytorch_model.bin")],
        "names 'torch.nn.modules.linear.Linear'",
    ),
    "an index of other files": (
        _steps(_to_shards("bin"), _write("pytorch_model.bin.index.json", {"weight_map": {"a": "../x.bin"}})),
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


def _deepmind_tree(arrays: dict[str, np.ndarray], transposed: bool, padding: int = 0) -> dict[str, np.ndarray]:
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


def _kaggle_tree(tree: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The same with Kaggle's names: a dict by long names, of dicts by the last part."""
    flat = {}
    for path, w in tree.items():
        name, _, leaf = f"transformer/{path}{'/w' if '/mlp/' in path else ''}".rpartition("/")
        flat.setdefault(name, {})[leaf] = w
    return flat


@pytest.mark.parametrize(
    ("naming", "transposed", "options"),
    [
        ("flat", False, dict(use_ocdbt=True)),
        ("flat", True, dict(use_ocdbt=False)),
        ("nested", True, dict(use_ocdbt=True, use_zarr3=True)),
        ("state", False, dict(use_ocdbt=True)),
    ],
)
def test_the_layout_of_google_deepmind_is_read(saved, arrays, tmp_path, naming, transposed, options):
    tree = _deepmind_tree(arrays, transposed, padding=128)
    nested = unflatten_dict(tree, sep="/")
    content = {"flat": _kaggle_tree(tree), "nested": nested, "state": {"params": nested}}[naming]
    top = tmp_path / "1"
    _save_tree(top / "gemma2-2b", content, **options)
    (top / "tokenizer.model").write_text("pieces")
    with pytest.raises(ValueError, match="the shapes of neither Gemma 2 2B, 9B nor 27B; give --hf-config"):
        open_checkpoint(top)
    notes = _assert_same(top, arrays, hf_config=saved)
    assert notes == ("the last 128 rows of its embedding pad a vocabulary of 384, and are left out",)
    _assert_same(top / "gemma2-2b", arrays, model=MODEL)
    shutil.copy(saved / "config.json", top / "gemma2-2b")
    found = open_checkpoint(top / "gemma2-2b")
    assert (found.format, found.model, found.hf is not None) == ("deepmind", MODEL, True)
    write_checkpoint(Job(source=open_checkpoint(top, hf_config=saved), to="hf"), tmp_path / "hf")
    _assert_same(tmp_path / "hf", arrays)
    assert (tmp_path / "hf" / "tokenizer.model").read_text() == "pieces"


def test_another_tree_of_that_layout_is_refused(saved, arrays, tmp_path):
    tree = _deepmind_tree(arrays, True)
    tree["layer_0/attn/_key_norm/scale"] = tree["final_norm/scale"]
    _save_tree(tmp_path / "gemma3", _kaggle_tree(tree))
    with pytest.raises(ValueError, match="has unexpected layer_0/attn/_key_norm/scale"):
        open_checkpoint(tmp_path / "gemma3", hf_config=saved)


@pytest.mark.parametrize("size", [GEMMA2_2B, GEMMA2_9B, GEMMA2_27B], ids=["2b", "9b", "27b"])
def test_a_size_is_known_by_its_shapes(size):
    layout = "D F" if size == GEMMA2_2B else "F D"
    shapes = table.tensor_shapes(deepmind._rows(layout), size) | {deepmind._EMBEDDING: (256_128, size.width)}
    assert deepmind._find_size(shapes) == size
    assert deepmind._find_size(shapes | {"extra": (1,)}) is None
    assert deepmind._find_size(shapes | {deepmind._EMBEDDING: (262_144, size.width)}) is None
