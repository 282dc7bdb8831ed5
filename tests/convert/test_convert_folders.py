"""Model folders that people bring: read bit for bit, with what was passed over said."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import unflatten_dict
from peers import BITING, hf_model
from safetensors.torch import load_file, save_file
from strange_folders import (
    Edit,
    chain,
    configure,
    deepmind_tree,
    extend,
    kaggle_tree,
    rename,
    rewrite,
    save_base_class,
    save_bin,
    save_head,
    save_shards,
    save_tree,
    to_numpy,
)
from test_sentencepiece import make_model, save_model

from gemma2_jax.convert.checkpoints import read_array
from gemma2_jax.convert.formats import deepmind, table
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B

MODEL = BITING["2b"]


@pytest.fixture(scope="module")
def model() -> transformers.Gemma2ForCausalLM:
    return hf_model(MODEL).bfloat16()


@pytest.fixture(scope="module")
def arrays(model) -> dict[str, np.ndarray]:
    state = {name: to_numpy(tensor) for name, tensor in model.state_dict().items()}
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


def _assert_same(folder: Path, arrays: dict[str, np.ndarray], **options) -> tuple[str, ...]:
    """Asserts that the folder has these arrays, bit for bit; gives the notes."""
    found = open_checkpoint(folder, **options)
    assert found.shapes.keys() == arrays.keys()
    for path, wanted in arrays.items():
        read = read_array(found, path, tuple(slice(0, size) for size in wanted.shape))
        assert (read.dtype, read.shape) == (wanted.dtype, wanted.shape), path
        assert read.tobytes() == wanted.tobytes(), path
    return found.notes


BUFFERS = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
READ: dict[str, tuple[Edit, str]] = {
    "as it is": (lambda folder: None, ""),
    "a head equal to the embedding": (save_head(lambda head: head), ""),
    "a head in float32": (save_head(torch.Tensor.float), ""),
    "an untied config": (configure(tie_word_embeddings=False), "its config unties the output matrix"),
    "an untied config with an equal head": (
        chain(configure(tie_word_embeddings=False), save_head(torch.Tensor.float)),
        "its config unties the output matrix",
    ),
    "a head and no embedding": (
        rename(lambda name: name.replace("model.embed_tokens.weight", table.HEAD)),
        "it holds lm_head.weight and no model.embed_tokens.weight, which is the same matrix",
    ),
    "a head in the index alone": (save_shards(listed=(table.HEAD,)), ""),
    "a head in the file alone": (chain(save_head(lambda head: head), save_shards(unlisted=(table.HEAD,))), ""),
    "Gemma2Model": (save_base_class, "embed_tokens.weight is read as model.embed_tokens.weight"),
    "torch.compile": (rename("_orig_mod.{}".format), "_orig_mod.model.embed_tokens.weight is read as"),
    "DataParallel": (chain(save_head(lambda head: head), rename("module.{}".format)), "is read as"),
    "both, and inside": (
        rename(lambda name: "module._orig_mod." + name.replace("layers.", "layers._orig_mod.module.")),
        "is read as",
    ),
    "FSDP and checkpointing inside": (
        rename(lambda name: name.replace("layers.1.", "layers.1._fsdp_wrapped_module._checkpoint_wrapped_module.")),
        "is read as",
    ),
    "compiled Gemma2Model": (
        chain(save_base_class, rename("_orig_mod.{}".format)),
        "_orig_mod.embed_tokens.weight is read as model.embed_tokens.weight",
    ),
    "a trainer's class around it": (
        chain(save_head(lambda head: head), rename("policy.{}".format)),
        "policy.lm_head.weight is read as lm_head.weight",
    ),
    "buffers of old versions": (
        rewrite(lambda state: state | BUFFERS),
        "passed over 3 buffers that follow from the config: model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
    "buffers of another dtype": (extend(model__rotary_emb__inv_freq=torch.ones(8, dtype=torch.float64)), "passed over"),
    "pytorch_model.bin": (save_bin, ""),
    "pytorch_model.bin in shards": (save_shards("bin"), ""),
    "pytorch_model.bin with a tied head": (
        lambda folder: chain(
            save_bin,
            lambda at: torch.save(
                (state := torch.load(at / "pytorch_model.bin"))
                | {table.HEAD: state["model.embed_tokens.weight"]},
                at / "pytorch_model.bin",
            ),
        )(folder),
        "",
    ),
    "pytorch_model.bin of views": (
        lambda folder: chain(
            save_bin,
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
        chain(save_bin, lambda at: (at / "pytorch_model.bin").rename(at / "pytorch_model_fsdp.bin")),
        "",
    ),
    "both kinds of file": (
        chain(lambda at: shutil.copy(at / "model.safetensors", at / "kept"), save_bin,
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
DROPPED: dict[str, tuple[Edit, str, str]] = {
    "a value head": (extend(**VALUE_HEAD), "v_head.*", r"has a value head, .* \(v_head.summary.* --drop 'v_head\.\*'"),
    "a reward model": (extend(score__weight=torch.ones(1, 36)), "score.*", r"reward model's head .* --drop 'score\."),
    "a wrapped one": (
        chain(extend(score__weight=torch.ones(1, 36)), rename("module.{}".format)), "module.score.*", "--drop 'score"
    ),
    "an untied head": (
        save_head(lambda head: head.index_fill(0, torch.tensor([3]), 1)), "*lm_head.weight",
        r"lm_head\.weight is not the embedding \(it differs from the embedding in 1 of 384 rows\), so that the model "
        r"has an untied head; .*; python -m gemma2_jax.convert \S+ NEW --drop '\*lm_head\.weight' --to hf takes the",
    ),
    "a longer head": (
        save_head(lambda head: torch.cat([head, head[:2]])), table.HEAD, r"it has shape \(386, 36\) where the emb"
    ),
    "an unknown tensor": (extend(extra=torch.ones(2)), "ext?a", "has unexpected extra; check"),
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
    tree = deepmind_tree(arrays, transposed, padding=128)
    nested = unflatten_dict(tree, sep="/")
    content = {"flat": kaggle_tree(tree), "nested": nested, "state": {"params": nested}}[naming]
    top = tmp_path / "1"
    save_tree(top / "gemma2-2b", content, **options)
    save_model(top, make_model().SerializeToString())
    with pytest.raises(ValueError, match="the shapes of neither Gemma 2 2B, 9B nor 27B; give --hf-config"):
        open_checkpoint(top)
    notes = _assert_same(top, arrays, hf_config=saved)
    assert notes == (
        "the last 128 rows of its embedding pad a vocabulary of 384, and are left out",
        f"{top} has tokenizer.model and no tokenizer.json, which is made from it",
    )
    _assert_same(top / "gemma2-2b", arrays, model=MODEL)
    shutil.copy(saved / "config.json", top / "gemma2-2b")
    found = open_checkpoint(top / "gemma2-2b")
    assert (found.format, found.model, found.hf is not None) == ("deepmind", MODEL, True)
    write_checkpoint(Job(source=open_checkpoint(top, hf_config=saved), to="hf"), tmp_path / "hf")
    _assert_same(tmp_path / "hf", arrays)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == (top / "tokenizer.model").read_bytes()


def test_another_tree_of_that_layout_is_refused(saved, arrays, tmp_path):
    tree = deepmind_tree(arrays, True)
    tree["layer_0/attn/_key_norm/scale"] = tree["final_norm/scale"]
    save_tree(tmp_path / "gemma3", kaggle_tree(tree))
    with pytest.raises(ValueError, match="has unexpected layer_0/attn/_key_norm/scale"):
        open_checkpoint(tmp_path / "gemma3", hf_config=saved)


@pytest.mark.parametrize("size", [GEMMA2_2B, GEMMA2_9B, GEMMA2_27B], ids=["2b", "9b", "27b"])
def test_a_size_is_known_by_its_shapes(size):
    layout = "D F" if size == GEMMA2_2B else "F D"
    shapes = table.tensor_shapes(deepmind._rows(layout), size) | {deepmind._EMBEDDING: (256_128, size.width)}
    assert deepmind._find_size(shapes) == size
    assert deepmind._find_size(shapes | {"extra": (1,)}) is None
    assert deepmind._find_size(shapes | {deepmind._EMBEDDING: (262_144, size.width)}) is None


def test_the_top_folder_of_nemo_2_is_opened(saved, arrays, tmp_path):
    write_checkpoint(Job(source=open_checkpoint(saved), to="megatron"), tmp_path / "megatron")
    top = tmp_path / "nemo"
    (top / "context" / "nemo_tokenizer").mkdir(parents=True)
    (top / "context" / "nemo_tokenizer" / "tokenizer.json").write_text("{}")
    (tmp_path / "megatron" / "iter_0000000").rename(top / "weights")
    (top / "weights" / "run_config.yaml").unlink()
    with pytest.raises(ValueError, match=r"nemo does not say its config .*; give --hf-config"):
        open_checkpoint(top)
    _assert_same(top, arrays, hf_config=saved)
    assert open_checkpoint(top, model=MODEL).tokenizer == top / "context" / "nemo_tokenizer"
