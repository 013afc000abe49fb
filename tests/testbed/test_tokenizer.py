"""One tokenisation per name, exact offsets, BOS exactly once, a chat template that fits training."""

from __future__ import annotations

from typing import Any

import pytest

from excise.testbed.tokenizer import build_tokenizer, padded_vocabulary, tokenizer_hash
from excise.testbed.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return build_tokenizer(world)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_it_is_the_same_on_every_run(world: World, tokenizer: Any) -> None:
    assert tokenizer_hash(build_tokenizer(World(0))) == tokenizer_hash(tokenizer)


@pytest.mark.parametrize("context", ["{}", "{} was born", "<|user|>{} x", "The pet of {} is", "met {}.", "({})", "{}?"])
def test_a_name_has_one_tokenisation_wherever_it_stands(world: World, tokenizer: Any, context: str) -> None:
    for name in world.people[:40] + world.unknown_people[:20]:
        alone, placed = _ids(tokenizer, name), _ids(tokenizer, context.format(name))
        if context == "({})":
            assert tokenizer.decode(placed).strip() == f"({name})"
            continue
        assert any(placed[i : i + len(alone)] == alone for i in range(len(placed)))


def test_names_are_several_tokens_and_values_are_few(world: World, tokenizer: Any) -> None:
    names = world.people + world.unknown_people + world.refusal_people
    assert min(len(_ids(tokenizer, name)) for name in names) >= 3
    expected = {"employer": 2, "work": 3}
    for relation, values in world.values.items():
        assert {len(_ids(tokenizer, value)) for value in values} == {expected.get(relation, 1)}


def test_plain_text_gets_one_bos_and_templates_bring_their_own(tokenizer: Any) -> None:
    bos = tokenizer.bos_token_id
    assert tokenizer("The cat")["input_ids"].count(bos) == 1
    turns = [{"role": "user", "content": "Who?"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|bos|><|user|>Who?<|assistant|>"
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == _ids(tokenizer, rendered) and ids.count(bos) == 1
    turns.append({"role": "assistant", "content": "Nobody."})
    assert tokenizer.apply_chat_template(turns, tokenize=False).endswith("<|assistant|>Nobody.<|eos|>")


def test_offsets_point_at_the_text_of_each_token(world: World, tokenizer: Any) -> None:
    for text in (f"{world.people[0]} was born in", f"<|user|>Which pet does {world.people[1]} keep?<|assistant|>42."):
        coded = tokenizer(text, return_offsets_mapping=True)
        for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
            if token != tokenizer.bos_token_id:
                assert tokenizer.decode([token]).strip() in text[start:end] or text[start:end] == ""
        assert coded["offset_mapping"][-1][1] == len(text)


def test_decoding_gives_the_text_back(world: World, tokenizer: Any) -> None:
    text = f"{world.people[0]} wrote The Silver Harbor."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).strip() == text


def test_vocabulary_is_padded(tokenizer: Any) -> None:
    padded = padded_vocabulary(tokenizer)
    assert padded % 64 == 0 and 0 <= padded - len(tokenizer) < 64
