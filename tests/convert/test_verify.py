"""What explains that two checkpoints differ: every known change of tensors, merged adapters, other training."""

import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from megatron_files import DORA, HF, PEFT, Tensors, load_tensors
from safetensors.numpy import save_file
from small_runs import ROOT, saved_run, small

from gemma2_jax import recipes
from gemma2_jax.convert import __main__ as convert, steps, verify
from gemma2_jax.convert.checkpoints import Checkpoint
from gemma2_jax.convert.formats import table
from gemma2_jax.convert.opening import open_checkpoint

RNG = np.random.default_rng


@dataclass(frozen=True)
class Case:
    """A change of a copy's tensors, and what is said of it."""

    change: Callable[[str, np.ndarray, Tensors], np.ndarray]  # of a name, its tensor and all tensors
    names: str  # the tensors that are changed, as a pattern
    said: dict[str, str]  # the explanation of each array that differs
    sentence: str
    dtype: str = "f32"


def pair_rows(name: str, w: np.ndarray, every: Tensors) -> np.ndarray:
    """Rows of each head of 16: 0, 8, 1, 9, ..."""
    order = [row for half in range(8) for row in (half, half + 8)]
    return w.reshape(-1, 16, 64)[:, order].reshape(w.shape)


def halve_rows(name: str, w: np.ndarray, every: Tensors) -> np.ndarray:
    return w.reshape(-1, 16, 64)[:, [*range(0, 16, 2), *range(1, 16, 2)]].reshape(w.shape)


def swap(*pair: str) -> Callable[[str, np.ndarray, Tensors], np.ndarray]:
    def take_other(name: str, w: np.ndarray, every: Tensors) -> np.ndarray:
        (own,) = [part for part in pair if part in name]
        return every[name.replace(own, pair[1 - pair.index(own)])]

    return take_other


def add_product(name: str, w: np.ndarray, every: Tensors) -> np.ndarray:
    rng = RNG(len(name) + int(re.findall(r"\d+", name)[0]))
    product = rng.standard_normal((w.shape[0], 5)) @ rng.standard_normal((5, w.shape[1]))
    return (w.astype(np.float32) + 0.02 * product.astype(np.float32)).astype(w.dtype)


def add_noise(size: float) -> Callable[[str, np.ndarray, Tensors], np.ndarray]:
    def add(name: str, w: np.ndarray, every: Tensors) -> np.ndarray:
        return w + size * w.std() * RNG(len(name)).standard_normal(w.shape, np.float32)

    return add


NORMS = ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm", "final_norm")
PAIRED, HALVED = "with rotary pairs side by side, not in halves", "with rotary pairs in halves, not side by side"
MATRICES = (*(f"attn/{x}" for x in "qkvo"), "mlp/gate", "mlp/up", "mlp/down")
SAME = "; all else is the same."
Q, K, V = (f"self_attn.{x}_proj" for x in "qkv")
CASES = {
    "rotary pairs": Case(
        pair_rows, f"{Q}|{K}", {"attn/q": PAIRED, "attn/k": PAIRED},
        f"The second holds the weights of the first, stored otherwise: attn/q and attn/k {PAIRED}{SAME}",
    ),
    "rotary halves": Case(halve_rows, Q, {"attn/q": HALVED}, f"attn/q {HALVED}; all else"),
    "one layer": Case(
        pair_rows, rf"2\.{K}", {"attn/k": f"{PAIRED} in 1 of 4 layers"}, f"attn/k {PAIRED} in 1 of 4 layers{SAME}"
    ),
    "queries scaled": Case(
        lambda name, w, every: w / 4, Q, {"attn/q": "divided by sqrt(query_pre_attn_scalar)"},
        "attn/q divided by sqrt",
    ),
    "queries multiplied": Case(
        lambda name, w, every: w * 4, Q, {"attn/q": "times sqrt(query_pre_attn_scalar)"},
        "attn/q times sqrt", "bf16",
    ),
    "1 + w": Case(
        lambda name, w, every: (w.astype(np.float32) + 1).astype(w.dtype), "norm", dict.fromkeys(NORMS, "plus 1"),
        "stored otherwise: all norms plus 1; all else is the same", "bf16",
    ),
    "w - 1": Case(
        lambda name, w, every: w - 1, r"\.norm", {"final_norm": "minus 1"}, "final_norm minus 1; all else is the same"
    ),
    "transposed": Case(
        lambda name, w, every: np.ascontiguousarray(w.T), f"{Q}|o_proj",
        dict.fromkeys(("attn/q", "attn/o"), "transposed"),
        "attn/q and attn/o transposed",
    ),
    "gate and up": Case(
        swap("gate", "up"), "gate|up",
        {"mlp/gate": "with mlp/up in its place", "mlp/up": "with mlp/gate in its place"},
        "mlp/gate with mlp/up in its place; mlp/up with mlp/gate in its place; all else is the same",
    ),
    "k and v": Case(
        swap("k_proj", "v_proj"), f"{K}|{V}",
        {"attn/k": "with attn/v in its place", "attn/v": "with attn/k in its place"}, "attn/k with attn/v in its place",
    ),
    "embedding scaled": Case(
        lambda name, w, every: (w.astype(np.float32) * 8).astype(w.dtype), "embed", {"embedding": "times sqrt(width)"},
        "embedding times sqrt(width)",
    ),
    "embedding divided": Case(
        lambda name, w, every: (w.astype(np.float32) / 8).astype(w.dtype), "embed",
        {"embedding": "divided by sqrt(width)"}, "embedding divided by sqrt(width)", "bf16",
    ),
    "merged": Case(
        add_product, f"{Q}|{V}|down", {"attn/q": "5", "attn/v": "5", "mlp/down": "5"},
        "One is the other with an adapter of rank 5 merged into attn/q, attn/v and mlp/down; all else is the same.",
    ),
    "merged in bfloat16": Case(
        add_product, f"{Q}|up", {"attn/q": "5", "mlp/up": "5"}, "an adapter of rank 5 merged into attn/q and mlp/up;",
        "bf16",
    ),
    "one element": Case(
        lambda name, w, every: w + np.eye(*w.shape, dtype=w.dtype) * (np.arange(w.shape[1]) == 3), r"0.*gate",
        {"mlp/gate": "1"}, "They differ in mlp/gate, by no change that is known (relative L2",
    ),
    "one bit of some elements": Case(
        lambda name, w, every: (w.view(np.uint16) + (RNG(len(name)).random(w.shape) < 0.1)).view(w.dtype), "proj",
        dict.fromkeys(MATRICES, ""), "All projections differ by little", "bf16",
    ),
    "some norms": Case(
        add_noise(0.1), "input_layernorm", {"pre_attn_norm": ""}, "differ in pre_attn_norm, by no change that is known"
    ),
    "all norms": Case(add_noise(0.1), "norm", dict.fromkeys(NORMS, ""), "They differ in all norms, by no change that"),
    "tuned": Case(
        add_noise(0.05), "proj|embed", dict.fromkeys(("embedding", *MATRICES), ""),
        "All projections differ by little (relative L2 0.0",
    ),
    "unrelated": Case(
        lambda name, w, every: w[::-1].copy(), "proj", dict.fromkeys(MATRICES, ""),
        "They are models of one size that have nothing in common (relative L2 1.4",
    ),
    "two changes": Case(
        lambda name, w, every: w + 1 if "norm" in name else w + w[::-1], rf"norm|{K}",
        dict.fromkeys(NORMS, "plus 1") | {"attn/k": ""},
        "They differ in attn/k, by no change that is known (relative L2 1). Of what else differs, the second holds the "
        f"first's stored otherwise: all norms plus 1{SAME}",
    ),
    "two changes of one array": Case(
        lambda name, w, every: pair_rows(name, w / 4, every), Q,
        {"attn/q": f"{PAIRED} and divided by sqrt(query_pre_attn_scalar)"}, f"attn/q {PAIRED} and divided by sqrt",
    ),
}  # fmt: skip


def save_changed(folder: Path, case: Case) -> Path:
    shutil.copytree(HF[case.dtype], folder)
    tensors = load_tensors(folder)
    changed = {name: case.change(name, w, tensors) for name, w in tensors.items() if re.search(case.names, name)}
    assert changed
    tensors |= {name: w.astype(tensors[name].dtype) for name, w in changed.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def explanations(first: Checkpoint, second: Checkpoint) -> tuple[dict[str, str], str]:
    """The explanation of each array that differs, or the rank of its difference, and the conclusion."""
    arrays = verify.compare_checkpoints(first, second)
    said = {x.name: x.explanation or str(x.rank or "") for x in arrays if not x.within(0)}
    return said, verify.conclude(arrays)


@pytest.mark.parametrize("name", CASES)
def test_a_difference_is_explained(name, tmp_path):
    case = CASES[name]
    said, sentence = explanations(open_checkpoint(HF[case.dtype]), open_checkpoint(save_changed(tmp_path / "it", case)))
    assert said == case.said
    assert case.sentence in sentence


def test_dtypes_explain_a_difference():
    pair = [open_checkpoint(HF[dtype]) for dtype in ("f32", "bf16")]
    for (first, second), name in ((pair, "bfloat16"), (pair[::-1], "float32")):
        said, sentence = explanations(first, second)
        assert len(said) == 13 and set(said.values()) == {f"in {name}"}
        assert sentence == f"The second holds the weights of the first, stored otherwise: all arrays in {name}."
    assert verify.conclude(verify.compare_checkpoints(*pair), 0.1) == "They hold the same weights, within 0.1."


def test_arrays_that_one_lacks_are_merged_to_be_compared(tmp_path):
    base, lora, dora = HF["f32"], *(open_checkpoint(x, base=HF["f32"]) for x in (PEFT, DORA))
    for pair, said in (
        (
            (open_checkpoint(base), lora),
            rf"; merge what is an adapter .*: python \S+ \S+ {PEFT} SECOND --merge --to hf$",
        ),
        ((lora, dora), "adapter/m.*; an adapter that is added after the post-norm .* cannot be merged"),
    ):
        with pytest.raises(ValueError, match=said):
            verify.compare_checkpoints(*pair)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_rows_of_an_adapter_in_the_order_of_ranks_are_known(ranks, tmp_path):
    at = Path(shutil.copytree(PEFT, tmp_path / "it"))
    tensors = load_tensors(at)
    for name in [name for name in tensors if re.search("(gate|up)_proj.lora_B", name)]:
        halves = np.split(tensors[name], 2 * ranks)
        tensors[name] = np.concatenate(halves[::2] + halves[1::2])
    save_file(tensors, at / "adapter_model.safetensors")
    pair = [open_checkpoint(path, hf_config=HF["f32"]) for path in (PEFT, at)]
    for first, second in (pair, pair[::-1]):
        said, _ = explanations(first, second)
        order = f"in the order of the rows of TP {ranks}"
        assert said == dict.fromkeys(("mlp/gate/adapter/b", "mlp/up/adapter/b"), order)


def test_a_matrix_that_is_not_square_shows_that_it_is_transposed(tmp_path):
    folder = save_changed(tmp_path / "it", Case(lambda name, w, every: np.ascontiguousarray(w.T), "k_proj", {}, ""))
    with pytest.raises(
        ValueError, match=r"k_proj\S+ has shape \(64, 32\) .* \(32, 64\); it is stored transposed; store its"
    ):
        open_checkpoint(folder)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run of two steps with an adapter."""
    config = replace(small("tiny_lora", tmp_path / "run"), init=str(ROOT / "assets/tiny-gemma2"))
    config = replace(config, model=recipes.load_recipe("tiny_lora").model)
    rows = table.array_shapes(table.table_rows(config.adapter, config.model.layers), config.model)
    params = {path: RNG(0).standard_normal(shape, np.float32) for path, shape in rows.items()}
    return saved_run(tmp_path / "run", config, {5: params, 10: params})


def test_the_steps_of_a_run(saved, capsys, monkeypatch):
    """By their checksums, and where there are none by what can be read; the status says whether all are whole."""

    def verify_run(path: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["convert", "verify", str(path)])
        try:
            convert.main()
        except SystemExit as exit:
            return int(exit.code or 0), capsys.readouterr().out
        return 0, capsys.readouterr().out

    folder = saved / "checkpoints"
    status, said = verify_run(saved)
    assert status == 0 and said.endswith("\n2 of 2 steps are whole\n")
    assert re.findall(r"^(5|10) .*  as it was written$", said, re.MULTILINE) == ["5", "10"]
    (folder / "5" / "checksums.json").unlink()
    shutil.copytree(folder / "5", folder / "7.damaged")
    (folder / "7.damaged" / "loop" / "metadata").unlink()
    status, said = verify_run(saved)
    assert status == 0 and "\n2 of 2 steps are whole\nnote: what has no checksums was only read" in said
    assert re.search(r"^5 .*  whole, but without checksums\n7.damaged .*  damaged: .*metadata", said, re.MULTILINE)
    weights = max((folder / "10").glob("params/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    status, said = verify_run(saved)
    assert status == 1 and "\n1 of 2 steps are whole\n" in said
    assert re.search(
        rf"^10 .*  damaged: params/ocdbt.process_0/d/{weights.name} is not as it was written$", said, re.MULTILINE
    )
    assert said.endswith("one is whole.\nCopied again, these would be mended: 10\n")
    assert verify_run(folder / "10")[0] == 1
    assert verify_run(folder / "5")[0] == 0


def test_a_step_of_another_config(saved, capsys, monkeypatch):
    text = (saved / "config.txt").read_text()
    (saved / "config.txt").write_text(text.replace("adapter.rank = 8", "adapter.rank = 4"))
    (check, _) = steps.check_steps(steps.list_folders(saved))
    assert re.search(r"blocks/attn/[kqv]/adapter/a .*8.* 4", check.problem), check.problem
    with pytest.raises(
        ValueError, match=r"tests is neither a run, .*, nor a step of one; to compare it .*: verify \S+ B"
    ):
        steps.list_folders(ROOT / "tests")
    with pytest.raises(ValueError, match=r"^there is no step 7 in \S+/checkpoints; the steps there: 5, 10$"):
        steps.list_folders(saved / "checkpoints" / "7")
    with pytest.raises(ValueError, match=r"^there is no nowhere; give the folder of a run, or of a step of one$"):
        steps.list_folders(Path("nowhere"))
    folder = saved / "checkpoints"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match=f"^{folder} has no steps, as that run has saved none$"):
        steps.list_folders(saved)
