"""Megatron's checkpoints and ours, both ways: against files that Megatron wrote, torch's reading, and explicit rows."""

import argparse
import io
import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from megatron_files import (
    DORA,
    FIXTURES,
    HEAD,
    HF,
    ONE,
    PEFT,
    STACKED,
    TINY,
    as_numpy,
    assert_same_parts,
    bits,
    changed_ranks,
    convert,
    hf_twin,
    load_rank_files,
    load_tensors,
    load_torch_dist,
    pad_embedding,
    qkv_rows,
    save_legacy,
    save_torch_dist,
    torch_bytes,
    twin_model,
    without_warnings,
)
from peers import BITING, hf_config, hf_model
from safetensors.numpy import save_file
from torch.distributed.checkpoint import format_utils

from gemma2_jax.config import MeshConfig
from gemma2_jax.convert import verify
from gemma2_jax.convert.checkpoints import Checkpoint, load_weights
from gemma2_jax.convert.files.torch_dist import TorchDistWriter
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.opening import open_checkpoint
from gemma2_jax.mesh import make_mesh, stored_sharding as stored_on
from gemma2_jax.model_config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS = "torch_dist", "megatron_lm", "legacy"
FOLDERS = sorted(f"{kind}/{at.name}" for kind in KINDS for at in (FIXTURES / kind).iterdir())
Tensors = dict[str, np.ndarray]


def open_fixture(name: str) -> Checkpoint:
    states_config = name.startswith(("torch_dist", "optimizer"))
    return open_checkpoint(FIXTURES / name, hf_config=None if states_config else hf_twin(name))


NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
    "self_attention.linear_proj.weight": "self_attn.o_proj",
    "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm",
    "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm",
    "mlp.linear_fc2.weight": "mlp.down_proj",
    "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm",
}


def to_megatron(hf: Tensors, c: ModelConfig) -> Tensors:
    """Megatron's tensors of Hugging Face's, put together row by row."""
    layers = [
        {n.removeprefix(f"model.layers.{i}."): x for n, x in hf.items() if f".layers.{i}." in n}
        for i in range(c.layers)
    ]
    found = {
        f"decoder.layers.{name}": np.stack([layer[f"{hf_name}.weight"] for layer in layers])
        for name, hf_name in NAMES.items()
    }
    found["decoder.layers.self_attention.linear_qkv.weight"] = np.stack(
        [np.stack([layer[f"self_attn.{x}_proj.weight"][row] for x, row in qkv_rows(c)]) for layer in layers]
    )
    found["decoder.layers.mlp.linear_fc1.weight"] = np.stack(
        [np.concatenate([layer[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]) for layer in layers]
    )
    found["embedding.word_embeddings.weight"] = hf["model.embed_tokens.weight"]
    return found | {"decoder.final_layernorm.weight": hf["model.norm.weight"]}


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("hf")

    def saved(name: str, dtype: str) -> Path:
        path = folder / f"{name}-{dtype}"
        if not path.exists():
            hf_model(BITING[name]).to(DTYPES[dtype]).save_pretrained(path)
            for file, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "{{ bos_token }}")):
                (path / file).write_text(text)
        return path

    return saved


# Checkpoints that Megatron wrote


@pytest.mark.parametrize("name", FOLDERS)
def test_what_megatron_wrote_is_its_twin(name, tmp_path):
    source = open_fixture(name)
    assert (source.format, source.model) == ("megatron", twin_model(name))
    parallel = "at TP {} and PP {}".format(*re.findall(r"\d", name.rpartition("_")[2]))
    kind = "legacy torch" if name.startswith("legacy") else "torch_dist"
    assert source.layout == (kind if name.startswith("megatron_lm") else f"{kind} {parallel}")
    assert all("rng_state" in note for note in source.notes)
    assert bool(source.notes) == (not name.startswith("torch_dist"))
    target = convert(source, tmp_path / "hf", "hf")
    assert bits(load_tensors(target)) == bits(load_tensors(hf_twin(name)))
    assert open_checkpoint(target).model == twin_model(name)


def test_an_optimizer_s_state_is_left_and_named(tmp_path):
    source = open_fixture("optimizer/A_bf16_tp1pp1")
    assert source.notes == ("not read, as it is no weight: optimizer (30), rng_state (1)",)
    target = convert(source, tmp_path / "hf", "hf")
    state = load_torch_dist(FIXTURES / "optimizer" / "A_bf16_tp1pp1" / "iter_0000001")
    weights = as_numpy({name: x for name, x in state.items() if not name.startswith("optimizer.")})
    assert bits(to_megatron(load_tensors(target), twin_model("bf16"))) == bits(weights)
    assert bits(load_tensors(target)) != bits(load_tensors(HF["bf16"]))


@pytest.mark.parametrize("name", FOLDERS)
def test_any_part_of_an_array_is_read(name):
    assert_same_parts(open_fixture(name), open_checkpoint(hf_twin(name)))


def test_devices_get_their_slices():
    source, want = open_fixture("torch_dist/A_bf16_tp2pp2"), open_checkpoint(HF["f32"])
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    letters = {row.path: row.letters for row in table.MODEL}
    wanted = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=stored_on(mesh, letters[path], x.shape))
        for path, x in source.shapes.items()
    }
    for path, x in load_weights(source, wanted).items():
        expected = np.asarray(load_weights(want, {path: want.shapes[path]})[path]).astype(jnp.bfloat16)
        assert x.sharding == wanted[path].sharding and np.array_equal(x, expected.astype(np.float32))


# Round trips


def legal_ranks(c: ModelConfig) -> list[tuple[int, int]]:
    return [
        (tp, pp)
        for tp, pp in product(range(1, 9), repeat=2)
        if not (c.kv_heads % tp or c.mlp_width % tp or c.vocab_size % tp or c.layers % pp)
    ]


def mark_exhaustive(cases: list, sample: list) -> list:
    assert all(case in cases for case in sample)
    return [case if case in sample else pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases]


@pytest.mark.parametrize(
    ("name", "dtype", "ranks"),
    mark_exhaustive(
        [(name, dtype, ranks) for name in BITING for dtype in DTYPES for ranks in legal_ranks(BITING[name])],
        [
            ("2b", "bfloat16", (2, 3)),
            ("9b", "float32", (1, 4)),
            ("27b", "bfloat16", (4, 2)),
            ("27b", "float32", (2, 1)),
        ],
    ),
)
def test_a_chain_of_all_formats_is_exact(hf, tmp_path, name, dtype, ranks):
    original = hf(name, dtype)
    at = convert(original, tmp_path / "orbax", "orbax")
    at = convert(at, tmp_path / "megatron", "megatron")
    assert open_checkpoint(at).model == BITING[name]
    assert bits(load_tensors(convert(at, tmp_path / "direct", "hf"))) == bits(load_tensors(original))
    ranked = convert(at, tmp_path / "legacy", "megatron-legacy", ranks=ranks)
    found = open_checkpoint(ranked, hf_config=original)
    assert found.layout == f"legacy torch at TP {ranks[0]} and PP {ranks[1]}"
    at = convert(found, tmp_path / "again", "megatron")
    at = convert(at, tmp_path / "orbax-again", "orbax")
    back = convert(at, tmp_path / "back", "hf")
    assert bits(load_tensors(back)) == bits(load_tensors(original))
    assert all(
        difference.within(0)
        for difference in verify.compare_checkpoints(open_checkpoint(tmp_path / "orbax"), open_checkpoint(at))
    )
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (back / file).read_bytes() == (original / file).read_bytes()


@pytest.mark.parametrize("to", ["megatron", "megatron-legacy"])
def test_a_merged_adapter(tmp_path, to):
    adapted = open_checkpoint(PEFT, base=HF["f32"])
    merged = load_tensors(convert(adapted, tmp_path / "hf", "hf", merge=True))
    at = open_checkpoint(convert(adapted, tmp_path / "there", to, merge=True), hf_config=HF["f32"])
    assert bits(load_tensors(convert(at, tmp_path / "back", "hf"))) == bits(merged) != bits(load_tensors(HF["f32"]))


def test_dtypes_are_cast_when_asked_for(tmp_path):
    target = convert(HF["f32"], tmp_path / "out", "megatron", dtype="bfloat16")
    assert bits(load_tensors(convert(target, tmp_path / "hf", "hf"))) == bits(load_tensors(HF["bf16"]))
    run = yaml.safe_load((target / "iter_0000000" / "run_config.yaml").read_text())
    assert run["model"]["bf16"] is True


def test_fused_tensors_of_two_dtypes_lose_nothing(tmp_path):
    """A tensor of bfloat16 that is fused with one of float32 becomes float32."""
    mixed = Path(shutil.copytree(HF["f32"], tmp_path / "mixed"))
    tensors = {
        n: x.astype(jnp.bfloat16) if "q_proj" in n or "up_proj" in n else x for n, x in load_tensors(mixed).items()
    }
    save_file(tensors, mixed / "model.safetensors")
    for to in ("megatron", "megatron-legacy"):
        at = convert(open_checkpoint(convert(mixed, tmp_path / to, to), hf_config=mixed), tmp_path / f"{to}-hf", "hf")
        assert bits(load_tensors(at)) == bits({name: x.astype(np.float32) for name, x in tensors.items()})


# The files that are written, against those that Megatron wrote


def entries(folder: Path) -> dict[str, tuple]:
    """Torch's metadata of each entry, with its chunks sorted."""
    metadata = dcp.FileSystemReader(str(folder)).read_metadata()
    return {
        name: (tuple(x.size), x.properties, sorted((tuple(c.offsets), tuple(c.sizes)) for c in x.chunks))
        if hasattr(x, "chunks")
        else (type(x),)
        for name, x in metadata.state_dict_metadata.items()
    }


def objects(folder: Path) -> dict[str, object]:
    found = {}
    for index, info in dcp.FileSystemReader(str(folder)).read_metadata().storage_data.items():
        if index.offset is None:
            data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
            found[index.fqn] = plain(torch.load(io.BytesIO(data), weights_only=True))
    return found


def plain(x):
    """The content with plain values in place of tensors, so that == compares it."""
    if isinstance(x, torch.Tensor):
        return str(x.dtype), tuple(x.shape), torch_bytes(x)
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, list) else x


SAVED = {
    "bf16": ("torch_dist/A_bf16_tp1pp1", lambda: open_checkpoint(HF["bf16"]), "megatron"),
    "f32": ("torch_dist/A_f32_tp1pp1", lambda: open_checkpoint(HF["f32"]), "megatron"),
    "lora": ("peft/A_f32_lora_tp1pp1", lambda: open_checkpoint(PEFT, hf_config=HF["f32"]), "megatron-adapter"),
    "dora": ("peft/A_f32_dora_tp1pp1", lambda: open_checkpoint(DORA), "megatron-adapter"),
}


@pytest.mark.parametrize("case", SAVED)
def test_files_are_what_megatron_bridge_wrote(case, tmp_path):
    name, source, to = SAVED[case]
    ours, fixture = convert(source(), tmp_path / "out", to), FIXTURES / name
    file_names = [{str(file.relative_to(at)) for file in at.rglob("*") if file.is_file()} for at in (ours, fixture)]
    different = {file for file in file_names[0] ^ file_names[1] if ".distcp" not in file and "tokenizer" not in file}
    assert different - {"iter_0000000/tokenizer/generation_config.json"} == set()
    at, expected = ours / "iter_0000000", fixture / "iter_0000000"
    assert entries(at) == entries(expected)
    assert objects(at) == objects(expected)
    assert bits(as_numpy(load_torch_dist(at))) == bits(as_numpy(load_torch_dist(expected)))
    without_warnings(format_utils.dcp_to_torch_save, str(at), str(tmp_path / "one.pt"))
    together = torch.load(tmp_path / "one.pt", weights_only=True)
    assert {name: plain(x) for name, x in together.items()} == plain(load_torch_dist(expected)) | objects(expected)
    assert json.loads((at / "metadata.json").read_text()) == json.loads((expected / "metadata.json").read_text())
    for file in ("iter_0000000/common.pt", "iter_0000000/train_state.pt", "latest_train_state.pt"):
        assert plain(torch.load(ours / file, weights_only=True)) == plain(torch.load(fixture / file, weights_only=True))
    tracker = "latest_checkpointed_iteration.txt"
    assert (ours / tracker).read_text() == (fixture / tracker).read_text()
    run = yaml.safe_load((at / "run_config.yaml").read_text())
    if run.get("tokenizer"):
        assert (Path(run["tokenizer"]["tokenizer_model"]) / "tokenizer.json").is_file()


def test_torch_reshards_what_we_write(tmp_path):
    """Every rank of a 2 x 2 layout (layers by stage, rows or columns by tensor rank) gets its boxes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    at = convert(HF["bf16"], tmp_path / "out", "megatron") / "iter_0000000"
    whole = to_megatron(load_tensors(HF["bf16"]), twin_model("bf16"))
    dims = {"embedding": 0, "linear_qkv.weight": 1, "linear_proj.weight": 2, "fc1.weight": 1, "fc2.weight": 2}
    for rank in range(4):
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
            state, expected = {}, {}
            for name, x in as_torch(whole).items():
                dim = next((dim for key, dim in dims.items() if key in name), None)
                pp, tp = divmod(rank, 2)
                part = x.chunk(2)[pp] if ".layers." in name else x
                expected[name] = part if dim is None else part.chunk(2, dim)[tp]
                placements = [
                    Shard(0) if ".layers." in name else Replicate(),
                    Replicate() if dim is None else Shard(dim),
                ]
                local = torch.zeros_like(expected[name]).contiguous()
                state[name] = DTensor.from_local(local, mesh, placements, shape=x.shape, stride=x.stride())
            without_warnings(dcp.load, state, checkpoint_id=str(at), no_dist=True)
            assert all(torch.equal(state[name].to_local(), part) for name, part in expected.items())
        finally:
            torch.distributed.destroy_process_group()


def as_torch(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
        if x.dtype == jnp.bfloat16
        else torch.from_numpy(np.array(x))
        for name, x in tensors.items()
    }


@pytest.mark.parametrize("name", ["A_f32_tp1pp1", "A_bf16_tp2pp1", "A_bf16_tp2pp2"])
def test_rank_files_are_what_megatron_lm_wrote(name, tmp_path, megatron):
    ranks = tuple(int(digit) for digit in re.findall(r"\d", name.rpartition("_")[2]))
    ours = convert(hf_twin(name), tmp_path / "out", "megatron-legacy", ranks=ranks)
    found, expected = load_rank_files(ours), load_rank_files(FIXTURES / "legacy" / name)
    assert found.keys() == expected.keys()
    for rank, content in expected.items():
        assert plain(dict(found[rank]["model"])) == plain(dict(content["model"]))
        assert found[rank]["checkpoint_version"] == content["checkpoint_version"]
        args, expected_args = vars(found[rank]["args"]), vars(content["args"])
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "num_layers", "params_dtype"):
            assert args[key] == expected_args[key], key
    for file in ours.glob("iter_*/*/*.pt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            torch.load(file, weights_only=True)
    assert (ours / "latest_checkpointed_iteration.txt").read_text() == "0"


# Rows, spelled out


@pytest.fixture
def numbered(tmp_path) -> Path:
    """A model whose weights say which row they are: k's from 100 on, v's from 200, up's from 100."""
    first = {"k_proj": 100, "v_proj": 200, "up_proj": 100}
    tensors = {}
    for name, shape in table.tensor_shapes(table.MODEL, TINY).items():
        rows = np.arange(shape[0]) + next((at for key, at in first.items() if key in name), 0)
        tensors[name] = np.ascontiguousarray(
            np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape), np.float32
        )
        if "o_proj" in name or "down_proj" in name:
            tensors[name] += 10 * np.arange(shape[1], dtype=np.float32)
    folder = tmp_path / "numbered"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    hf_config(TINY, dtype="float32", architectures=["Gemma2ForCausalLM"]).save_pretrained(folder)
    return folder


ROWS = {
    # Query heads 0 and 1 with kv head 0, 2 and 3 with kv head 1; each head is two rows.
    "linear_qkv.weight": ([0, 1, 2, 3, 100, 101, 200, 201], [4, 5, 6, 7, 102, 103, 202, 203]),
    "linear_fc1.weight": ([0, 1, 100, 101], [2, 3, 102, 103]),
    "word_embeddings.weight": ([0, 1, 2], [3, 4, 5]),
}
COLUMNS = {
    "linear_proj.weight": ([0, 10, 20, 30], [40, 50, 60, 70]),
    "linear_fc2.weight": ([0, 10], [20, 30]),
}


def test_rows_of_each_rank(numbered, tmp_path):
    at = convert(numbered, tmp_path / "legacy", "megatron-legacy", ranks=(2, 1)) / "iter_0000000"
    for rank in range(2):
        with torch.serialization.safe_globals([argparse.Namespace]):
            model = torch.load(at / f"mp_rank_0{rank}" / "model_optim_rng.pt", weights_only=True)["model"]
        for name, x in model.items():
            for end, rows in ROWS.items():
                assert not name.endswith(end) or x[:, 0].tolist() == rows[rank]
            for end, columns in COLUMNS.items():
                assert not name.endswith(end) or x[0].tolist() == columns[rank]
    found = open_checkpoint(at, hf_config=numbered)
    assert bits(load_tensors(convert(found, tmp_path / "back", "hf"))) == bits(load_tensors(numbered))


def test_rows_of_the_whole(numbered, tmp_path):
    state = load_torch_dist(convert(numbered, tmp_path / "megatron", "megatron") / "iter_0000000")
    rows = {end: [*one, *other] for end, (one, other) in ROWS.items()} | {
        "linear_fc1.weight": [0, 1, 2, 3, 100, 101, 102, 103]
    }
    for name, x in state.items():
        for end, expected in rows.items():
            if name.endswith(end):
                assert x.reshape(-1, x.shape[-1])[:, 0].tolist() == expected


# Other layouts of the same tensors


def unstack_layers(state: dict) -> dict:
    found = {}
    for name, x in state.items():
        if name.startswith(STACKED):
            found |= {name.replace(STACKED, f"{STACKED}{i}."): part for i, part in enumerate(x.clone())}
        else:
            found[name] = x
    return found


def split_gate_up(state: dict) -> dict:
    """Gate and up as two tensors instead of one."""
    found = {}
    for name, x in state.items():
        halves = x.clone().chunk(2, -2) if name.endswith("fc1.weight") else ()
        found |= dict(zip((f"{name}_w", f"{name}_v"), halves, strict=True)) if halves else {name: x}
    return found


def add_prefix(prefix: str) -> Callable[[dict], dict]:
    return lambda state: {prefix + name: x for name, x in state.items()}


COMMON_STATE = {"iteration": 7, "args": argparse.Namespace(num_layers=4, hidden_size=64)}
VARIANTS: dict[str, Callable[[dict], dict]] = {
    "a tensor a layer": unstack_layers,
    "gate and up apart": split_gate_up,
    "gate and up of a layer apart": lambda state: split_gate_up(unstack_layers(state)),
    "model.": add_prefix("model."),
    "module.module.": add_prefix("module.module."),
    "model.module.a tensor a layer": lambda state: add_prefix("model.module.")(unstack_layers(state)),
    "padded": pad_embedding(128),
    "padded for TP 2": pad_embedding(256),
    "a head": lambda state: state | {HEAD: state["embedding.word_embeddings.weight"]},
    "a padded head": lambda state: (
        (both := pad_embedding(128)(state)) | {HEAD: both["embedding.word_embeddings.weight"]}
    ),
    "common state inside": lambda state: state | {"common_state/shard_0_1": [COMMON_STATE]},
    "FP8 state as tensors": lambda state: (
        state
        | {f"{at}._extra_state/shard_0_1.0": torch.zeros(3) for at in ("decoder.final_layernorm", "decoder.layers.x")}
    ),
    "other state": lambda state: (
        state
        | {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(64), "rng_state/shard_0_1": [{"a": 1}]}
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_torch_dist(variant, tmp_path):
    common = None if variant == "common state inside" else {"iteration": 7}
    state = VARIANTS[variant](load_torch_dist(ONE / "iter_0000000"))
    source = open_checkpoint(save_torch_dist(tmp_path / "it", state, ONE, common))
    noted = ("not read, as it is no weight: optimizer (1), rng_state (1)",) if variant == "other state" else ()
    assert source.notes == noted
    assert bits(load_tensors(convert(source, tmp_path / "hf", "hf"))) == bits(load_tensors(HF["f32"]))


@pytest.mark.parametrize("rows", [0, 128])
def test_another_head_is_refused(rows, tmp_path):
    state = pad_embedding(rows)(load_torch_dist(ONE / "iter_0000000"))
    head = state["embedding.word_embeddings.weight"].clone()
    head[511] += 1
    with pytest.raises(ValueError, match="differs from the embedding in 1 of 512 rows"):
        open_checkpoint(save_torch_dist(tmp_path / "it", state | {HEAD: head}, ONE))


def test_a_head_s_padding_is_not_compared(tmp_path):
    state = pad_embedding(128, HEAD)(pad_embedding(128)(load_torch_dist(ONE / "iter_0000000")))
    state[HEAD][:512] = state["embedding.word_embeddings.weight"][:512]
    assert open_checkpoint(save_torch_dist(tmp_path / "it", state, ONE)).model == twin_model("f32")


def test_args_in_the_common_state_are_checked(tmp_path):
    state = load_torch_dist(ONE / "iter_0000000")
    args = {"args": argparse.Namespace(num_layers=5)}
    for name, inside, common in (("a", {"common_state/shard_0_1": [args]}, None), ("b", {}, args)):
        with pytest.raises(ValueError, match="its argument num_layers is 5 where the config has 4"):
            open_checkpoint(save_torch_dist(tmp_path / name, state | inside, ONE, common))


def test_any_chunks_are_read(tmp_path):
    """Cut within heads, across gate and up, by a few tokens."""
    at = Path(shutil.copytree(ONE, tmp_path / "it")) / "iter_0000000"
    state = as_numpy(load_torch_dist(at))
    for file in [at / ".metadata", *at.glob("*.distcp")]:
        file.unlink()
    with TorchDistWriter(at) as writer:
        for name, x in state.items():
            dim = 1 if x.ndim == 3 else 0
            for start in range(0, x.shape[dim], 24):
                index = (slice(None),) * dim + (slice(start, start + 24),)
                writer.chunk(name, x.shape, (0,) * dim + (start,) + (0,) * (x.ndim - dim - 1), x[index])
    assert bits(load_tensors(convert(tmp_path / "it", tmp_path / "hf", "hf"))) == bits(load_tensors(HF["f32"]))


@pytest.mark.parametrize("name", ["torch_dist/A_bf16_tp2pp2", "legacy/A_bf16_tp2pp2"])
def test_the_folder_of_an_iteration_and_a_release(name, tmp_path):
    root = Path(shutil.copytree(FIXTURES / name, tmp_path / "it"))
    (at,) = root.glob("iter_*")
    for folder, text in ((at, None), (root / "release", "release\n"), (root, None)):
        if text:
            at.rename(folder)
            (root / "latest_checkpointed_iteration.txt").write_text(text)
        source = open_checkpoint(folder, hf_config=None if name.startswith("torch_dist") else HF["bf16"])
        assert verify.compare_checkpoints(source, open_checkpoint(HF["bf16"]))[0].within(0)


def select_layer(state: dict, i: int) -> dict:
    """One layer of unstacked tensors, as number 0."""
    return {name.replace(f".layers.{i}.", ".layers.0."): x for name, x in state.items() if f".layers.{i}." in name}


def test_virtual_stages(tmp_path):
    """Two stages with two parts each: layers 0 and 2 are on the first, 1 and 3 on the second."""
    state = unstack_layers(load_torch_dist(ONE / "iter_0000000"))
    embedding = state["embedding.word_embeddings.weight"]
    last = {"decoder.final_layernorm.weight": state["decoder.final_layernorm.weight"], HEAD: embedding}
    common = {"checkpoint_version": 3.0, "iteration": 10}
    files = {
        "mp_rank_00_000": common
        | {
            "model0": {"embedding.word_embeddings.weight": embedding} | select_layer(state, 0),
            "model1": select_layer(state, 2),
        },
        "mp_rank_00_001": common | {"model0": select_layer(state, 1), "model1": select_layer(state, 3) | last},
    }
    source = open_checkpoint(save_legacy(tmp_path / "it", files), hf_config=HF["f32"])
    assert bits(load_tensors(convert(source, tmp_path / "hf", "hf"))) == bits(load_tensors(HF["f32"]))


def test_legacy_with_a_padded_vocabulary(tmp_path, megatron):
    with changed_ranks(tmp_path) as files:
        for first, second, name in (("0", "1", "embedding.word_embeddings.weight"), ("0", "1", HEAD)):
            stage = "000" if "embedding" in name else "001"
            models = [files[f"mp_rank_0{rank}_{stage}"]["model"] for rank in (first, second)]
            whole = torch.cat([*(model[name] for model in models), torch.zeros(256, 64, dtype=torch.bfloat16)])
            models[0][name], models[1][name] = (part.clone() for part in whole.chunk(2))
    source = open_checkpoint(tmp_path / "it", hf_config=HF["bf16"])
    assert bits(load_tensors(convert(source, tmp_path / "hf", "hf"))) == bits(load_tensors(HF["bf16"]))
