"""GGUF files, both ways: what is written is what llama.cpp's own converter writes, what is read is what was written.

The gguf library reads the files that are written here, and its map from Hugging Face's names to GGUF's is the one that
llama.cpp's converter uses. `test_llama_cpp` runs the files.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from peers import BITING
from safetensors.numpy import load_file, save_file

from gemma2_jax.convert import verify
from gemma2_jax.convert.checkpoints import Checkpoint, read_array
from gemma2_jax.convert.files import gguf as files, safetensors
from gemma2_jax.convert.formats import gguf as formats, table
from gemma2_jax.convert.formats.companions import load_tokenizer
from gemma2_jax.convert.formats.hf_config import model_config
from gemma2_jax.convert.formats.peft_config import peft_config
from gemma2_jax.convert.job import Job
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.convert.writing import write_checkpoint
from gemma2_jax.model_config import GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, AdapterConfig, ModelConfig

TINY = Path(__file__).parents[2] / "assets/tiny-gemma2"
TENSORS = load_file(TINY / "model.safetensors")
CONFIG = model_config(json.loads((TINY / "config.json").read_text()))
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, CONFIG.layers)
KINDS = {"float32": Kind.F32, "bfloat16": Kind.BF16, "float16": Kind.F16, "q8_0": Kind.Q8_0}


def gguf_name(name: str) -> str:
    found = NAMES.get_name(name, try_suffixes=(".weight",))
    assert found is not None
    return found


def write(source: Path | Checkpoint, target: Path, to="gguf", **options) -> Path:
    source = open_checkpoint(source) if isinstance(source, Path) else source
    write_checkpoint(Job(source=source, to=to, **options), target)
    return target


def fields(path: Path) -> dict[str, object]:
    """The key-value pairs of a file as the library reads them."""
    reader = gguf.GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def all_arrays(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {
        path: read_array(checkpoint, path, (slice(None),) * len(shape.shape))
        for path, shape in checkpoint.shapes.items()
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """The tiny model in every dtype."""
    folder = tmp_path_factory.mktemp("gguf")
    return {dtype: write(TINY, folder / f"{dtype}.gguf", dtype=dtype) for dtype in KINDS}


@pytest.mark.parametrize("dtype", KINDS)
def test_tensors_are_those_of_llama_cpp_s_converter(written, dtype):
    """Norms are 1 + w in float32; matrices are cast, or quantized by the library, from the stored values."""
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(written[dtype]).tensors}
    assert set(read) == {gguf_name(name) for name in TENSORS}
    for name, tensor in TENSORS.items():
        found, exact = read[gguf_name(name)], tensor.astype(np.float32)
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        if name.endswith("norm.weight"):
            assert found.tensor_type == Kind.F32
            expected = exact + 1
        else:
            assert found.tensor_type == KINDS[dtype]
            expected = gguf.quantize(exact, Kind.Q8_0) if dtype == "q8_0" else exact.astype(dtype)
        assert found.data.tobytes() == expected.tobytes()


def test_what_is_stored_is_written_as_it_is(written, tmp_path):
    assert write(TINY, tmp_path / "bfloat16.gguf").read_bytes() == written["bfloat16"].read_bytes()


def test_keys_are_those_of_llama_cpp_s_converter(written):
    found = fields(written["q8_0"])
    tokenizer = json.loads((TINY / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    assert list(vocab) == found.pop("tokenizer.ggml.tokens")
    assert [" ".join(pair) for pair in tokenizer["model"]["merges"]] == found.pop("tokenizer.ggml.merges")
    assert found.pop("tokenizer.ggml.token_type") == [3] * 6 + [1] * (len(vocab) - 6)
    assert json.loads(str(found.pop("tokenizer.huggingface.json"))) == tokenizer
    assert found.pop("tokenizer.chat_template") == (TINY / "chat_template.jinja").read_text()
    floats = {key: found.pop(key) for key, value in list(found.items()) if isinstance(value, float)}
    assert found == {
        "general.architecture": "gemma2",
        "general.type": "model",
        "general.name": "tiny-gemma2",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "gemma2.block_count": 6,
        "gemma2.context_length": 512,
        "gemma2.embedding_length": 192,
        "gemma2.feed_forward_length": 576,
        "gemma2.attention.head_count": 4,
        "gemma2.attention.head_count_kv": 2,
        "gemma2.attention.key_length": 64,
        "gemma2.attention.value_length": 64,
        "gemma2.attention.sliding_window": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }
    assert floats == {
        "gemma2.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "gemma2.attn_logit_softcapping": 50,
        "gemma2.final_logit_softcapping": 30,
        "gemma2.rope.freq_base": 10_000,
    }


def test_quantizing_explains_no_more_than_it_changes(written, tmp_path):
    shutil.copytree(TINY, tmp_path / "tuned")
    noise = np.random.default_rng(0)
    tuned = {
        name: (w.astype(np.float32) * noise.normal(1, 0.02, w.shape)).astype(w.dtype) if w.ndim > 1 else w
        for name, w in TENSORS.items()
    }
    save_file(tuned, tmp_path / "tuned" / "model.safetensors")
    for folder, said, sentence in (
        (TINY, {"but for what Q8_0 rounds", "in bfloat16"}, "the first, stored otherwise: the embedding and all proj"),
        (tmp_path / "tuned", {"", "in bfloat16"}, "All projections differ by little (relative L2 0.02"),
    ):
        arrays = verify.compare_checkpoints(open_checkpoint(written["q8_0"]), open_checkpoint(folder))
        assert {array.explanation for array in arrays} == said and sentence in verify.conclude(arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_keeps_every_bit_but_those_of_norms_that_nothing_computes_with(written, dtype, tmp_path):
    back = open_checkpoint(write(written[dtype], tmp_path / "hf", "hf"))
    assert back.model == CONFIG
    for name, tensor in load_file(back.path / "model.safetensors").items():
        expected = TENSORS[name].astype(tensor.dtype)
        if name.endswith("norm.weight"):
            assert tensor.dtype == np.float32
            tensor, expected = tensor + 1, expected + 1
        assert tensor.tobytes() == expected.tobytes()
    theirs, ours = load_tokenizer(TINY), load_tokenizer(back.path)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.chat_template == theirs.chat_template
    assert [ours.bos_token, ours.eos_token, ours.pad_token, ours.unk_token] == ["<bos>", "<eos>", "<pad>", "<unk>"]
    hf = json.loads((back.path / "config.json").read_text())
    assert [hf[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [2, 1, 0]


def test_one_plus_w_has_every_bit_after_a_round_trip():
    """And w itself is what it was where bfloat16 holds it and it is not tiny."""
    numbers = np.random.default_rng(0)
    scales = np.float32(2) ** np.arange(-40, 6)
    w = np.concatenate([numbers.normal(0, scale, 2000) for scale in scales]).astype(np.float32)
    again = (np.float32(1) + w) - np.float32(1)
    assert (np.float32(1) + again).tobytes() == (np.float32(1) + w).tobytes()
    assert (again != w).any()
    exact = w.astype(ml_dtypes.bfloat16).astype(np.float32)
    exact = exact[np.abs(exact) >= 2.0**-16]
    assert ((np.float32(1) + exact) - np.float32(1)).tobytes() == exact.tobytes()


def test_quantized_tensors_are_the_values_that_they_encode(written, tmp_path):
    arrays = all_arrays(checkpoint := open_checkpoint(written["q8_0"]))
    row = next(row for row in formats.MODEL if row.path == "blocks/attn/q/w")
    for tensor in gguf.GGUFReader(written["q8_0"]).tensors:
        if "attn_q" in tensor.name:
            layer = int(tensor.name.split(".")[1])
            expected = gguf.dequantize(tensor.data, Kind.Q8_0)
            np.testing.assert_array_equal(row.to_tensor(arrays[row.path][layer]), expected)
    assert "43 of its 68 tensors are quantized (Q8_0)" in checkpoint.notes[0]
    rows = read_array(checkpoint, "embedding", (slice(7, 9), slice(None)))
    np.testing.assert_array_equal(rows, arrays["embedding"][7:9])


K_QUANTS = [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q2_K, Kind.Q3_K, Kind.Q4_0, Kind.Q5_1, Kind.IQ4_XS]


def test_k_quants_are_read_as_the_library_dequantizes_them(tmp_path):
    config = replace(CONFIG, layers=1, width=256, mlp_width=256, heads=4, kv_heads=4, head_width=64, vocab_size=16)
    path, numbers = tmp_path / "k.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma2")
    for key, value in formats.model_metadata(config, "k", "float32").items():
        if key != "general.architecture":
            (writer.add_float32 if isinstance(value, float) else
             writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)  # fmt: skip
    expected = {}
    for number, (name, shape) in enumerate(table.tensor_shapes(formats.MODEL, config).items()):
        if len(shape) == 1:
            writer.add_tensor(name, numbers.normal(size=shape).astype(np.float32))
            continue
        kind = K_QUANTS[number % len(K_QUANTS)]
        blocks = numbers.integers(0, 60, gguf.quant_shape_to_byte_shape(shape, kind), dtype=np.uint8)
        writer.add_tensor(name, blocks, raw_dtype=kind)
        expected[name] = gguf.dequantize(blocks, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    arrays = all_arrays(open_checkpoint(path))
    for row in formats.MODEL:
        for name, tensor in row.to_tensors(arrays[row.path]):
            if name in expected:
                np.testing.assert_array_equal(tensor, expected[name])


@pytest.mark.parametrize("config", [GEMMA2_2B, GEMMA2_9B, GEMMA2_27B, CONFIG])
def test_llama_cpp_scales_queries_as_the_models_do(config):
    formats.check_model(config, None, "the model")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BITING["27b"], "query_pre_attn_scalar 5, which no key of a GGUF file says: of 2 layers llama.cpp assumes 8"),
        (replace(GEMMA2_27B, query_pre_attn_scalar=128), "of 46 layers llama.cpp assumes 144"),
        (replace(CONFIG, attn_softcap=None), "has no attn_softcap, and llama.cpp always caps"),
    ],
)
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(config: ModelConfig, message):
    with pytest.raises(ValueError, match=message):
        formats.check_model(config, None, "the model")


LORA = AdapterConfig(kind="lora", rank=3, alpha=7.5, targets=tuple(table.PROJECTIONS))
ADAPTERS = {
    "lora": LORA,
    "rslora": replace(LORA, rank=4, rslora=True, alpha=6.0),
    "part": replace(LORA, targets=("attn/v", "mlp/down")),
}


def peft_folder(folder: Path, adapter: AdapterConfig, base: Path | str = TINY) -> Path:
    """A PEFT adapter with random tensors, on the tiny model."""
    folder.mkdir()
    shapes, numbers = table.tensor_shapes(table.table_rows(adapter, CONFIG.layers), CONFIG), np.random.default_rng(0)
    save_file(
        {name: numbers.normal(size=shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    safetensors.write_json(folder / "adapter_config.json", peft_config(adapter, str(base), CONFIG.layers))
    return folder


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_what_llama_cpp_s_converter_makes_of_it_and_comes_back(name, tmp_path):
    adapter = ADAPTERS[name]
    peft = peft_folder(tmp_path / "peft", adapter)
    path = write(peft, tmp_path / "lora.gguf", "gguf-adapter")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    tensors = load_file(peft / "adapter_model.safetensors")
    assert len(read) == len(tensors)
    for key, tensor in tensors.items():
        projection, part = key.removeprefix("base_model.model.").split(".lora_")
        found = read[f"{gguf_name(projection + '.weight')}.lora_{part[0].lower()}"]
        assert found.tensor_type == Kind.F32
        assert tuple(reversed(found.shape.tolist())) == tensor.shape
        assert found.data.tobytes() == tensor.tobytes()
    alpha = fields(path)["adapter.lora.alpha"]
    assert fields(path) == {
        "general.architecture": "gemma2",
        "general.type": "adapter",
        "general.quantization_version": 2,
        "general.base_model.count": 1,
        "general.base_model.0.name": str(TINY),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    assert alpha / adapter.rank == adapter.scale  # as llama.cpp scales
    back = open_checkpoint(write(path, tmp_path / "back", "peft"))
    assert back.adapter.scale == adapter.scale
    assert load_file(back.path / "adapter_model.safetensors").keys() == tensors.keys()
    for key, tensor in load_file(back.path / "adapter_model.safetensors").items():
        assert tensor.tobytes() == tensors[key].tobytes()


def test_an_adapter_finds_its_model_in_a_gguf_file(written, tmp_path):
    source = open_checkpoint(peft_folder(tmp_path / "peft", LORA, written["float32"]))
    lora = open_checkpoint(write(source, tmp_path / "lora.gguf", "gguf-adapter"))
    assert source.has_weights and lora.has_weights and lora.tokenizer == written["float32"]


def test_a_merged_adapter_is_quantized_from_float32(tmp_path):
    peft = open_checkpoint(peft_folder(tmp_path / "peft", LORA))
    write(peft, tmp_path / "hf", "hf", merge=True, dtype="float32")
    write(peft, tmp_path / "merged.gguf", merge=True, dtype="q8_0")
    merged = load_file(tmp_path / "hf/model.safetensors")
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "merged.gguf").tensors}
    for name in ("model.layers.5.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert read[gguf_name(name)].data.tobytes() == gguf.quantize(merged[name], Kind.Q8_0).tobytes()


def altered(target: Path, changes: dict[str, object]) -> Path:
    """A file of the tiny model's shape with some keys changed, or without them where the value is None; all zeros."""
    metadata = formats.model_metadata(CONFIG, "tiny", "bfloat16") | {"tokenizer.ggml.model": "gpt2"} | changes
    wanted = {}
    for row in formats.MODEL:
        dtype = "float32" if formats.is_norm(row.path) else "bfloat16"
        wanted |= dict.fromkeys(row.names(CONFIG.layers), files.Wanted(table.tensor_shape(row, CONFIG), dtype))
    parts = (np.zeros(want.shape, want.dtype) for want in wanted.values())
    present = {key: value for key, value in metadata.items() if value is not None}
    files.write_gguf(target, present, wanted, parts, lambda size: None)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma3"}, r"general\.architecture is 'gemma3'; this program has 'gemma2' only"),
        ({"general.type": "mmproj"}, "general.type is 'mmproj'"),
        ({"split.count": 3}, "is one of 3 parts of a model; put them together with llama-gguf-split --merge"),
        ({"gemma2.attention.sliding_window": None}, r"gemma2\.attention\.sliding_window is missing"),
        ({"gemma2.block_count": "6"}, r"gemma2\.block_count is '6'; it must be a number"),
        ({"gemma2.attention.head_count": [4] * 6}, "head_count is Array"),
        ({"gemma2.attention.value_length": 32}, "value_length is 32; Gemma 2's is 64"),
        ({"gemma2.rope.scaling.type": "yarn"}, "rope.scaling.type is 'yarn'; Gemma 2's is 'none'"),
        ({"gemma2.block_count": 5}, "has unexpected blk.5.attn_norm.weight"),
        ({"gemma2.embedding_length": 384}, r"has shape \(4096, 192\) where its config expects \(4096, 384\)"),
        ({"general.type": "adapter"}, "adapter.type is None; this program reads 'lora'"),
        ({"general.type": "adapter", "adapter.type": "lora"}, "adapter.lora.alpha is None"),
        ({"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 1.0}, "has no LoRA of Gemma 2"),
    ],
)
def test_what_is_no_gemma_2_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        open_checkpoint(altered(tmp_path / "altered.gguf", changes))


def test_a_file_of_llama_cpp_s_own_converter_is_read_without_its_tokenizer(tmp_path):
    """It has no tokenizer.json and does not say the base of RoPE."""
    path = altered(tmp_path / "theirs.gguf", {"gemma2.rope.freq_base": None})
    checkpoint = open_checkpoint(path)
    assert checkpoint.model == CONFIG and checkpoint.tokenizer is None
    assert "its tokenizer ('gpt2') is not read" in checkpoint.notes[0]
    given = open_checkpoint(path, hf_config=TINY)
    assert given.tokenizer == TINY and given.notes == ()
    with pytest.raises(ValueError, match="has no tokenizer, and a GGUF file has one in it"):
        Job(source=checkpoint, to="gguf")


def test_a_folder_with_one_file_is_that_file(written, tmp_path):
    shutil.copy(written["bfloat16"], tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).format == "gguf"
    shutil.copy(written["bfloat16"], tmp_path / "b.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one of them: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("options", "name", "message"),
    [
        ({"to": "hf", "dtype": "q8_0"}, "out", "--dtype q8_0 goes with --to gguf only"),
        ({"to": "gguf"}, "out", "write a file whose name ends in .gguf"),
        ({"to": "orbax"}, "out.gguf", "write a file whose name ends in .gguf"),
        (
            {"to": "gguf-adapter"},
            "out.gguf",
            "has no adapter, and --to gguf-adapter writes nothing else; .* --to gguf$",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(options, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(TINY, tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("adapter", "options", "message"),
    [
        (LORA, {"to": "gguf"}, "choose --merge for one model, or --to gguf-adapter for the adapter alone"),
        (LORA, {"to": "gguf-adapter", "dtype": "q8_0"}, "too narrow for the blocks of q8_0; write it as bfloat16"),
        (replace(LORA, kind="dora"), {"to": "gguf-adapter"}, "is a DoRA, and llama.cpp has LoRA only; merge it"),
    ],
)
def test_adapters_that_cannot_be_written_are_refused(adapter, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write(peft_folder(tmp_path / "peft", adapter), tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()


def test_an_adapter_that_llama_cpp_adds_elsewhere_is_warned_of(tmp_path):
    source = open_checkpoint(peft_folder(tmp_path / "peft", LORA))
    source = replace(source, adapter=replace(source.adapter, after_norm=True))
    (warning,) = Job(source=source, to="gguf-adapter").warnings
    assert "attn/o and mlp/down was trained to be added after the post-norm" in warning
    assert "llama.cpp adds it before" in warning


def test_values_beyond_a_dtype_are_refused(tmp_path):
    parts = [np.full((1, 32), 1e9, np.float32)]
    for dtype, part in (("q8_0", parts[0]), ("float16", np.full((1, 32), np.inf, np.float16))):
        wanted = {"x.weight": files.Wanted((1, 32), dtype)}
        with pytest.raises(ValueError, match=f"x.weight has values that {dtype} has no room for; write bfloat16"):
            files.write_gguf(tmp_path / "x.gguf", {"general.architecture": "gemma2"}, wanted, [part], lambda n: None)
