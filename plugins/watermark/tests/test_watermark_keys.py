"""Keys and the keyed hash: fixed for ever, fair, and nobody's business where they stand in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import unspool
from unspool.config import read_config
from unspool.errors import ConfigError
from unspool.pipeline import PluginSpec, build_plugin
from unspool.registry import Registry
from unspool.resolved import check_config
from unspool_testing.table import TableModel
from unspool_watermark import claims
from unspool_watermark.green_list import GreenList
from unspool_watermark.key import KeyFile, secret
from unspool_watermark.keyed_hash import below, draws
from unspool_watermark.tournament import Tournament

PLUGINS = {"green_list": GreenList, "tournament": Tournament}


def test_the_hash_never_changes_for_it_is_in_texts_that_were_written() -> None:
    # SplitMix64 seeded with 0: what its authors' program prints first.
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    drawn = draws(0, torch.empty(1, 0, dtype=torch.int64), torch.arange(3).unsqueeze(0))
    assert [value % 2**64 for value in drawn[0].tolist()] == first
    assert secret(42, "green_list") == 8439192499571135059
    assert secret("a text", "tournament") == -405646051127949751
    after = draws(secret(42, "green_list"), torch.tensor([[3, 1, 4]]), torch.tensor([[15, 49151]]))
    assert after.tolist() == [[-6869839701247366419, -8460622172599885175]]


def test_the_hash_in_tensors_is_the_hash_in_whole_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    contexts = torch.randint(0, 200_000, (20, 3), generator=generator)
    tokens = torch.randint(0, 200_000, (20, 7), generator=generator)
    drawn = draws(secret("k", "green_list"), contexts, tokens)
    for row in range(20):
        state = claims._chain(claims._secret("k", "green_list"), contexts[row].tolist())
        expected = [claims._fold(state, token) for token in tokens[row].tolist()]
        assert [value % 2**64 for value in drawn[row].tolist()] == expected


def test_all_64_bits_are_fair_and_know_nothing_of_each_other() -> None:
    contexts = torch.cartesian_prod(torch.arange(40), torch.arange(25))
    drawn = draws(secret(7, "tournament"), contexts, torch.arange(40).unsqueeze(0))  # [1000, 40]
    bits = ((drawn.unsqueeze(-1) >> torch.arange(64)) & 1).double() * 2 - 1  # [1000, 40, 64]
    samples = bits.reshape(-1, 64)
    count = len(samples)
    assert samples.mean(0).abs().max() * count**0.5 < 5
    between = (samples.T @ samples / count - torch.eye(64)).abs().max()
    assert between * count**0.5 < 5.5  # the largest of 2016
    for one, other in [(bits[1:], bits[:-1]), (bits[25:], bits[:-25]), (bits[:, 1:], bits[:, :-1])]:
        products = (one * other).flatten()
        assert abs(float(products.mean())) * len(products) ** 0.5 < 5


def test_a_share_of_all_draws_lies_below_it() -> None:
    drawn = draws(1, torch.arange(100).unsqueeze(-1), torch.arange(1000).unsqueeze(0))
    for share in (0.01, 0.25, 0.5, 0.9):
        found = float(below(drawn, share).double().mean())
        assert abs(found - share) < 5 * (share * (1 - share) / drawn.numel()) ** 0.5
    assert not below(torch.tensor([-1]), 0.999).any(), "the highest of all numbers has its sign bit set"
    assert below(torch.tensor([0]), 0.001).all()


def test_a_number_is_the_same_key_as_its_digits_and_each_watermark_hashes_it_anew() -> None:
    assert secret(42, "green_list") == secret("42", "green_list") != secret("42 ", "green_list")
    assert secret(42, "green_list") != secret(42, "tournament")
    assert len({secret(key, "green_list") for key in (*range(-500, 500), "", "a", "ä")}) == 1003


def test_a_key_in_a_file_is_the_key_that_stands_there(tmp_path: Path) -> None:
    file = tmp_path / "watermark.key"
    file.write_text("  grüne Liste\n", encoding="utf-8")
    assert secret(KeyFile(file=str(file)), "tournament") == secret("grüne Liste", "tournament")


@pytest.mark.parametrize("name", PLUGINS)
def test_a_file_that_holds_no_key_is_named(name: str, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe")
    for file, reason in [(empty, "is empty"), (binary, "can't decode"), (tmp_path / "none", "No such file")]:
        with pytest.raises(ConfigError, match=reason) as caught:
            build_plugin(
                PluginSpec(name, {"key": {"file": str(file)}}), Registry([]).with_plugins({name: PLUGINS[name]})
            )
        assert caught.value.problems[0].field == f"plugins.{name}.key.file"
        assert str(file) in str(caught.value)


@pytest.mark.parametrize("name", PLUGINS)
@pytest.mark.parametrize("key", [True, 1.5, "", None, {"file": ""}, {"path": "x"}, [1]])
def test_what_is_no_key_is_refused(name: str, key: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.key"):
        build_plugin(PluginSpec(name, {"key": key}), Registry([]).with_plugins({name: PLUGINS[name]}))


@pytest.mark.parametrize("name", PLUGINS)
def test_there_is_no_key_that_everybody_has(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.key: Field required"):
        build_plugin(PluginSpec(name), Registry([]).with_plugins({name: PLUGINS[name]}))


@pytest.mark.parametrize("name", PLUGINS)
def test_a_result_tells_the_key_of_a_config_but_not_the_key_of_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "watermark.key"
    file.write_text("swordfish", encoding="utf-8")
    with unspool.Engine(TableModel(vocab_size=8), slots=64) as engine:
        results = [
            engine.generate([1, 2, 3, 4], strategy="sample", plugins=[{name: {"key": key}}], max_new_tokens=8, seed=5)
            for key in ("swordfish", {"file": str(file)})
        ]
    told, untold = (json.dumps(result.to_dict()) for result in results)
    assert results[0].token_ids == results[1].token_ids
    assert "swordfish" in told
    assert "swordfish" not in untold and str(file) in untold


def test_a_config_may_name_a_key_in_every_form(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("x", encoding="utf-8")
    for key in ("5", "'5'", "words", f"{{file: {tmp_path / 'k'}}}"):
        config = tmp_path / "config.yaml"
        config.write_text(f"strategy: sample\nplugins:\n  - green_list: {{key: {key}}}\n", encoding="utf-8")
        assert check_config(read_config(config, Registry.installed()), Registry.installed()) == []
