"""Compiled passes give what the model's own code gives, for whatever a batch asks."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import CliRunner

from unspool.cli import app
from unspool.errors import ModelError
from unspool.huggingface import HuggingFaceRunner, compiler, kernel, package
from unspool.huggingface.int8 import quantize, widen
from unspool.huggingface.load import load
from unspool.huggingface.package import KINDS, KINDS_BY_KERNEL, make
from unspool.huggingface.projections import Packed, can_pack, quicken
from unspool.runner import Batch, Output, Span
from unspool_testing.compiling import untuned
from unspool_testing.networks import tiny_model

pytestmark = [pytest.mark.skipif(kernel.compiler() is None, reason="no C++ compiler"), pytest.mark.slow]
ONE, FEW, MANY = KINDS


@pytest.fixture(scope="module", autouse=True)
def quick_to_make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with untuned(folder):
        yield folder


def compiled_runner(model: PreTrainedModel, *kinds: package.Kind) -> HuggingFaceRunner:
    runner = HuggingFaceRunner(model)
    for kind in kinds:
        make(runner.subject, kind)
    runner.use_compiled()
    assert runner.compiled == ["attention", *(kind.name for kind in kinds)]
    return runner


@pytest.fixture(scope="module")
def gemma(quick_to_make: Path) -> HuggingFaceRunner:
    """Sliding windows, soft caps, a scaled embedding: in float32, with all packages."""
    return compiled_runner(tiny_model("gemma2", torch.float32), ONE, FEW, MANY)


def passes(runner: HuggingFaceRunner) -> list[Output]:
    """Run a prompt in two chunks, a tree below it, a step of a leaf, one where nothing is wanted, a long prompt."""
    tokens = np.random.default_rng(0).integers(3, 64, 100)
    runner.allocate(150)
    mask = np.zeros((4, 25), dtype=np.bool_)
    mask[:, :20] = True
    for node, path in enumerate([[0], [1], [0, 2], [1, 3]]):
        mask[node, [20 + ancestor for ancestor in path]] = True
    mask = mask[:, :24]
    hidden = (0, 1, -1, -2)

    def batch(places: Any, positions: Any, slots: Any, spans: list[Span], wanted: list[int]) -> Output:
        ids = tokens[np.asarray(places)]
        positions, slots = np.asarray(positions), np.asarray(slots)
        return runner.forward(Batch(ids, positions, slots, spans, np.array(wanted, dtype=np.int64), hidden))

    places = np.arange(100)
    leaf = np.array([*range(20), 21, 23, 30])
    return [
        batch(places[:12], places[:12], places[:12], [Span(0, 12, slice(0, 12))], [11]),
        batch(places[12:20], places[12:20], places[12:20], [Span(0, 8, slice(0, 20))], []),
        batch(places[20:24], [20, 20, 21, 21], places[20:24], [Span(0, 4, slice(0, 24), mask)], [0, 1, 2, 3]),
        batch([24], [22], [30], [Span(0, 1, leaf)], [0]),
        batch([25], [23], [31], [Span(0, 1, np.append(leaf, 31))], []),
        batch(places[:80], places[:80], places[:80] + 40, [Span(0, 80, slice(40, 120))], [79]),
    ]


def test_weights_are_read_only_where_packages_of_their_setting_are(
    gemma: HuggingFaceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = HuggingFaceRunner(tiny_model("llama", torch.float32)).subject
    assert gemma.subject.made() == [ONE, FEW, MANY]
    monkeypatch.setattr(package.Subject, "name", property(lambda subject: pytest.fail("all weights were read")))
    assert other.made() == []


def test_packages_give_what_the_models_own_code_gives(gemma: HuggingFaceRunner) -> None:
    own = passes(HuggingFaceRunner(tiny_model("gemma2", torch.float32), compiled=False))
    for compiled, expected in zip(passes(gemma), own, strict=True):
        torch.testing.assert_close(compiled.logits, expected.logits, rtol=1e-3, atol=1e-4)
        assert compiled.hidden.keys() == expected.hidden.keys()
        for number, states in expected.hidden.items():
            torch.testing.assert_close(compiled.hidden[number], states, rtol=1e-3, atol=1e-4)


def loops(runner: HuggingFaceRunner, kind: package.Kind) -> set[bytes]:
    """List what the compiler made of operators that are not ours, by its names for it."""
    return set(re.findall(rb"cpp_fused_\w+", (runner.subject.path(kind) / "pass.so").read_bytes()))


def test_cosines_of_places_are_computed_once_a_pass_and_no_loop_rotates(gemma: HuggingFaceRunner) -> None:
    for kind in KINDS:
        made = loops(gemma, kind)
        (cosines,) = (loop for loop in made if b"_cos_" in loop)
        assert b"_attend_" not in cosines  # where layers compute them, they do so along with what attention gave
        assert not any(b"_neg_" in loop for loop in made)


def test_cosines_are_computed_once_a_pass_by_a_model_that_rotates_in_its_own_way() -> None:
    made = loops(compiled_runner(tiny_model("cohere", torch.float32), MANY), MANY)
    (cosines,) = (loop for loop in made if b"_cos_" in loop)
    (rotating,) = (loop for loop in made if b"_neg_" in loop)
    assert b"_attend_" not in cosines
    assert b"_attend_" in rotating


def test_passes_of_the_first_layers_are_left_to_the_models_own_code(gemma: HuggingFaceRunner) -> None:
    gemma.allocate(8)
    token, span = np.array([5]), Span(0, 1, slice(0, 1))
    zero = np.zeros(1, dtype=np.int64)
    shallow = gemma.forward(Batch(token, zero, zero, [span], zero, layers=1)).logits
    deep = gemma.forward(Batch(token, zero, zero, [span], zero, hidden=(1,)))
    torch.testing.assert_close(shallow, gemma.head(deep.hidden[1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("multiplies", [False, True])
def test_bfloat16_stays_near_float32_whatever_the_processor_multiplies(
    multiplies: bool, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if multiplies and not kernel.multiplies():
        pytest.skip("the processor does not multiply bfloat16")
    monkeypatch.setattr(kernel, "multiplies", lambda: multiplies)
    model: Any = tiny_model("llama", torch.bfloat16)
    if integers:
        quantize(model)
    exact = copy.deepcopy(model)
    widen(exact, torch.float32)
    # They are named alike, so each has weights of its own.
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + multiplies)
        exact.model.norm.weight.mul_(1 + multiplies)
    own = passes(HuggingFaceRunner(copy.deepcopy(model), compiled=False))
    runner = compiled_runner(model, *(KINDS_BY_KERNEL if multiplies else KINDS))
    for found, rounded, expected in zip(
        passes(runner), own, passes(HuggingFaceRunner(exact, compiled=False)), strict=True
    ):
        assert found.logits.dtype == torch.bfloat16
        if len(expected.logits):
            errors = [(each.logits.float() - expected.logits).square().mean().sqrt() for each in (found, rounded)]
            assert errors[0] < 0.05 * expected.logits.std()
            assert errors[0] < 2 * errors[1]


def test_other_threads_go_on_while_a_package_runs(gemma: HuggingFaceRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    count, turns, meanwhile, done = 4000, 0, -1, threading.Event()
    gemma.allocate(count)
    places = np.arange(count)
    batch = Batch(places % 64, places, places, [Span(0, count, slice(0, count))], places[-1:])
    made: Any = next(made for made in gemma._made if made.takes(batch))

    def turn() -> None:
        nonlocal turns
        while not done.wait(1e-4):
            turns += 1

    def run(inputs: list[torch.Tensor], own: Any = made._run) -> Any:
        nonlocal meanwhile
        before = turns
        output = own(inputs)
        meanwhile = turns - before
        return output

    monkeypatch.setattr(made, "_run", run)
    other = threading.Thread(target=turn)
    other.start()
    try:
        gemma.forward(batch)
    finally:
        done.set()
        other.join()
    assert meanwhile > 5


def test_a_package_is_found_by_its_weights_and_nothing_else(gemma: HuggingFaceRunner) -> None:
    model = tiny_model("gemma2", torch.float32)
    assert HuggingFaceRunner(model).subject.path(ONE) == gemma.subject.path(ONE)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[7, 3] += 1e-6
    changed = HuggingFaceRunner(model)
    assert changed.subject.path(ONE) != gemma.subject.path(ONE)
    assert not changed.use_compiled()
    assert changed.compiled == ["attention"]


def test_the_order_of_weights_counts_and_how_they_lie_does_not(gemma: HuggingFaceRunner) -> None:
    turned, quick = (tiny_model("gemma2", torch.float32) for _ in range(2))
    with torch.no_grad():
        weight = turned.get_parameter("model.layers.0.mlp.up_proj.weight")
        weight.copy_(weight.flip(1))
    assert HuggingFaceRunner(turned).subject.name != gemma.subject.name
    runner = HuggingFaceRunner(quick)
    quicken(quick)
    assert runner.subject.name == gemma.subject.name


def test_a_model_that_no_compiler_takes_is_told_with_its_words(
    gemma: HuggingFaceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    subject = HuggingFaceRunner(tiny_model("llama", torch.float32)).subject
    with pytest.raises(ModelError, match="cannot be compiled: RuntimeError: no such instruction"):
        make(subject, ONE)
    assert not subject.path(ONE).exists()
    assert not list(kernel.cache_folder().glob("draft-*"))


def test_a_package_that_gives_other_logits_is_not_kept(
    gemma: HuggingFaceRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = package.Package.run

    def wrong(self: package.Package, pool: Any, batch: Batch) -> Output:
        output = right(self, pool, batch)
        return Output(output.logits.roll(1, -1), output.hidden)

    monkeypatch.setattr(package.Package, "run", wrong)
    subject = HuggingFaceRunner(tiny_model("llama", torch.float32, seed=3)).subject
    with pytest.raises(ModelError, match="compiled for one token, its logits differ from its own by"):
        make(subject, ONE)
    assert not subject.path(ONE).exists()


@pytest.mark.parametrize(
    "breaks",
    [
        lambda folder: (folder / "pass.so").write_bytes(b"no library"),
        lambda folder: os.truncate(folder / "pass.so", (folder / "pass.so").stat().st_size - 100),
        lambda folder: (folder / "pass.so").unlink(),
        lambda folder: (folder / "sizes.json").unlink(),
        lambda folder: (folder / "sizes.json").write_text("[1]"),
        lambda folder: (folder / "sizes.json").write_text("{}"),
        lambda folder: (folder / "sizes.json").write_text(
            json.dumps({**json.loads((folder / "sizes.json").read_text()), ".json": 2})
        ),
    ],
)
def test_a_package_that_is_broken_is_removed_and_the_model_runs_without(
    gemma: HuggingFaceRunner, breaks: Callable[[Path], object]
) -> None:
    runner = HuggingFaceRunner(tiny_model("qwen3", torch.float32))
    folder = runner.subject.path(ONE)
    shutil.copytree(gemma.subject.path(ONE), folder)
    breaks(folder)
    assert not runner.use_compiled()
    assert runner.compiled == ["attention"]
    assert not folder.is_dir()


def test_a_library_of_the_noted_size_that_is_none_is_removed_too(gemma: HuggingFaceRunner) -> None:
    runner = HuggingFaceRunner(tiny_model("qwen3", torch.float32))
    folder = runner.subject.path(ONE)
    shutil.copytree(gemma.subject.path(ONE), folder)
    library = folder / "pass.so"
    library.write_bytes(bytes(library.stat().st_size))
    assert not runner.use_compiled()
    assert not folder.is_dir()


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not list what is mapped")
def test_a_package_is_mapped_from_where_it_is(gemma: HuggingFaceRunner) -> None:
    """A copy for each process filled the disk: most processes end without taking theirs away."""
    assert str(gemma.subject.path(ONE) / "pass.so") in Path("/proc/self/maps").read_text()


def test_clearing_takes_whole_packages_and_leaves_what_is_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = kernel.cache_folder()
    for folder in ("setting-weights-one", "draft-1"):
        (place / folder).mkdir(parents=True)
        (place / folder / "pass.so").write_bytes(bytes(10))
    (place / "attention-1.so").write_bytes(bytes(5))
    done = CliRunner().invoke(app, ["compile", "--clear"])
    assert done.exit_code == 0, done.output
    assert "2 removed" in done.stdout
    assert [path.name for path in place.iterdir()] == ["draft-1"]


@pytest.fixture(scope="module")
def saved_gemma(tmp_path_factory: pytest.TempPathFactory, gemma: HuggingFaceRunner) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "gemma2"
    tiny_model("gemma2", torch.float32).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(saved_gemma: Path) -> str:
    """What the command says that compiles it."""
    done = CliRunner().invoke(app, ["compile", str(saved_gemma), "--dtype", "float32", "--threads", "1", "--json"])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_compiles_and_the_next_start_uses_it(said: str, saved_gemma: Path) -> None:
    assert [entry["what"] for entry in json.loads(said)] == [
        "attention",
        "passes of one token",
        "passes of few tokens",
        "passes of many tokens",
    ]
    assert load(str(saved_gemma), compile="auto").runner.compiled == ["attention", "one", "few", "many"]
    assert load(str(saved_gemma), compile="off").runner.compiled == []


def test_where_packages_run_all_passes_weights_are_laid_out_once_the_models_own_code_runs(
    said: str, saved_gemma: Path
) -> None:
    if not can_pack(torch.float32):
        pytest.skip("oneDNN is not there")
    compiled, own = (load(str(saved_gemma), compile=how).runner for how in ("auto", "off"))
    token, span, zero = np.array([5]), Span(0, 1, slice(0, 1)), np.zeros(1, dtype=np.int64)

    def logits(runner: HuggingFaceRunner, layers: int | None) -> torch.Tensor:
        runner.allocate(8)
        return runner.forward(Batch(token, zero, zero, [span], zero, layers=layers)).logits

    def laid_out(runner: HuggingFaceRunner) -> bool:
        return any(isinstance(module, Packed) for module in runner.subject.model.modules())

    def check(layers: int | None) -> None:
        torch.testing.assert_close(logits(compiled, layers), logits(own, layers), rtol=1e-3, atol=1e-4)

    check(None)
    assert laid_out(own) and not laid_out(compiled)
    check(1)
    assert laid_out(compiled)
    check(None)


def test_a_model_is_compiled_beside_the_work_once_that_pays(tmp_path: Path) -> None:
    told: list[str] = []
    mark = tmp_path / "mark"
    words = ["python3", "-c", f"open({str(mark)!r}, 'w').close()"]
    beside = compiler.Compiler(words, 1.0, lambda: told.append("done"))
    beside.note(0.6)
    beside.wait()
    assert not mark.exists()
    beside.note(0.6)
    beside.note(0.6)
    beside.wait()
    assert mark.exists()
    assert told == ["done"]


def test_a_failure_beside_the_work_is_told_and_hurts_nothing(caplog: pytest.LogCaptureFixture) -> None:
    beside = compiler.Compiler(["python3", "-c", "raise SystemExit('no room')"], 0.0, lambda: pytest.fail("done"))
    beside.note(0.1)
    beside.wait()
    assert "could not be compiled: no room" in caplog.text


def test_the_command_that_runs_beside_names_the_model_as_it_was_loaded() -> None:
    words = compiler.command("some/model", dtype="bfloat16", revision=None, trust_remote_code=True, threads=2)
    assert words[1:] == [
        *("-m", "unspool", "compile", "some/model", "--dtype", "bfloat16"),
        *("--trust-remote-code", "--threads", "2"),
    ]
