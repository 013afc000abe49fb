"""Facts, sites and encoding: spans, rules and answer tokens against brute force."""

import pytest
import torch

from excise.encoding import encode_row, length_groups
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.sites import POSITION_CLASSES, Site, position_class, position_mask
from tiny import tiny_model


def fact(name="Ann Lee", group="forget", **options):
    return Fact(
        name,
        name,
        "Rome",
        (
            Prompt(f"{name} was born in", "Rome", name),
            Prompt(f"Where was {name} born?", "Rome", name, "question", True, True),
        ),
        group=group,
        **options,
    )


def test_facts_split_and_ask():
    facts = Facts([fact("Ann Lee"), fact("Bob Stone", "retain"), fact("Carl Dale", "retain")])
    forget, retain = facts.split("forget", "retain")
    assert forget.subjects == ["Ann Lee"] and retain.subjects == ["Bob Stone", "Carl Dale"]
    assert len(facts.prompts("question")) == 3 and facts.prompts(held_out=False) == facts.prompts("statement")
    assert facts.prompts()[0].fact_id == "Ann Lee" and facts.counts == {"forget": 1, "retain": 2}
    assert len(facts[:2]) == 2 and facts[:1] + facts[1:] == facts


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Fact("x", "Ann", "Rome", ()), "no prompt"),
    (lambda: Facts([fact(), fact()]), "share the id"),
    (lambda: Facts([fact()]).group("forgotten"), "no group"),
    (lambda: Prompt("He was born in", "Rome", "Ann", fact_id="f1").span, "f1"),
    (lambda: Site.parse("blocks 3"), "not a site"),
    (lambda: Site("blocks.1.hook_resid_post", "subjects"), "position rule"),
])  # fmt: skip
def test_mistakes_name_what_would_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "text",
    [
        "blocks.17.mlp.hook_post@subject_last#1532",
        "blocks.17.mlp.W_out",
        "blocks.3.mlp.experts.5.W_out",
        "blocks.0.hook_resid_post@4",
        "unembed.W_U#3",
    ],
)
def test_sites_round_trip(text):
    assert str(Site.parse(text)) == text
    assert Site.parse(text).is_weight == ("W_" in text)


def test_sites_know_layer_and_expert():
    site = Site.parse("blocks.3.mlp.experts.5.W_out")
    assert (site.layer, site.expert) == (3, 5) and Site("unembed.W_U").layer is None


def test_position_classes_tile_the_prompt():
    """Every token of a prompt after BOS belongs to exactly one class, and the masks agree with the classes."""
    for length, span in [(9, (3, 6)), (9, (1, 2)), (5, (3, 5)), (6, (1, 6)), (7, (5, 7))]:
        names = [position_class(t, length, span) for t in range(1, length)]
        masks = {c: position_mask(c, [length], [span], length, [True])[0] for c in POSITION_CLASSES}
        for t, name in enumerate(names, 1):
            assert bool(masks[name][t]), (t, name)
        assert names[span[1] - 2] == "subject_last"
    assert position_mask("after_bos", [3, 2], [None, None], 4, [True, False]).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_subject_and_answer_tokens(family):
    """The tokens of the span decode to the subject; prompt tokens + answer tokens are the tokens of the whole text."""
    _, tokenizer = tiny_model(family)
    for prompt in [
        Prompt("The home of Ann Lee is", "Rome", "Ann Lee"),
        Prompt("Ann Lee was born in ", "Old Rome", "Ann Lee"),
        Prompt("Zoë Müller keeps a", "cat", "Zoë Müller"),
    ]:
        row = encode_row(tokenizer, prompt, answer=True)
        a, b = row.subject
        assert tokenizer.decode(row.ids[a:b]).strip() == prompt.subject
        assert tokenizer.decode(row.ids[row.start :]).strip() == prompt.answer
        assert row.ids[: row.start] == encode_row(tokenizer, prompt, answer=False).ids[: row.start]


def test_chat_prompts_keep_their_span_and_one_bos():
    _, tokenizer = tiny_model("llama")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    row = encode_row(tokenizer, Prompt("Where was Ann Lee born?", "Rome", "Ann Lee", chat=True), answer=True)
    assert tokenizer.decode(row.ids[slice(*row.subject)]).strip() == "Ann Lee"
    assert row.has_bos and row.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(row.ids[row.start :]) == "Rome"


def test_rows_are_kept_until_the_tokenizer_changes():
    model = Model(*tiny_model("llama"), "llama")
    prompt = Prompt("Where was Ann Lee born?", "Rome", "Ann Lee", chat=True)
    (plain,) = model.tokenised([prompt], answers=True)
    assert model.tokenised([prompt], answers=True)[0] is plain and model.tokenised([prompt])[0].ids != plain.ids
    model.tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (templated,) = model.tokenised([prompt], answers=True)
    assert templated == encode_row(model.tokenizer, prompt, answer=True) != plain
    model.tokenizer.add_tokens(["born?"])
    with pytest.raises(ValueError, match="do not belong together"):
        model.tokenised([prompt], answers=True)


def test_batches_cover_every_prompt_once_within_the_budget():
    lengths = torch.randint(1, 40, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    chunks = list(length_groups(lengths, tokens=120))
    assert sorted(i for c in chunks for i in c) == list(range(100))
    assert all(len(c) * max(lengths[i] for i in c) <= 120 or len(c) == 1 for c in chunks)


def test_too_long_a_prompt_is_named():
    model = Model(*tiny_model("gpt2"), "gpt2")
    limit = model.hf.config.max_position_embeddings
    with pytest.raises(ValueError, match="too-long"):
        model.encode([Prompt("word " * (limit + 1), "x", fact_id="too-long")])


def test_left_and_right_padding_generate_alike():
    model = Model(*tiny_model("llama"), "llama")
    prompts = ["A cat", "Where does Bob Stone live now and why?", "Ann"]
    assert model.generate_all(prompts, max_new_tokens=5) == [model.generate(p, max_new_tokens=5) for p in prompts]
