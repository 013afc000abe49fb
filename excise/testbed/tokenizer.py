"""The tokenizer of a world: byte-level BPE in which values are single tokens and names are not.

Text always starts with exactly one space after normalisation, so that a name or a value has one tokenisation
wherever it stands, also straight after a special token. Digits stand alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from excise.testbed import vocabulary as v
from excise.testbed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, USER, ASSISTANT = SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
CONTEXT = 512
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MERGE_COUNT = 10


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Train the tokenizer on the word lists and templates of `world`; fast, and the same on every run."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(Regex("^ +"), " ")])
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=MERGE_COUNT,
        show_progress=False,
    )
    core.train_from_iterator(_corpus(world), trainer)
    bos_id = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _corpus(world: World) -> Iterator[str]:
    """Every word often enough to be merged; name syllables likewise, but never a whole name."""
    words = [*v.REFUSALS, v.UNKNOWN, "Yes. No.", "Fill in: ___.", "Choose from", "A B C D (- ) , ? ! + ="]
    words += [*v.REVERSED_QUESTIONS, v.REVERSED_STATEMENT, "It is said that while and Unlike met He She"]
    words += ["What is plus Sort: Reverse: Translate: List: Again: In the and then it. A often buys sells wants needs"]
    words += ["likes dislikes The the a an", " ".join(v.PLACES), *v.LETTERS]
    for relation in v.RELATIONS.values():
        sentences = (*relation.statements, *relation.questions, relation.clause, relation.cloze, relation.yes_no)
        words += [sentence.format(S="", O="") for sentence in sentences]
    for values in world.values.values():
        words += values
    words += [*world.countries, *world.unknown_countries, *world.refusal_countries]
    words += v.TITLE_ADJECTIVES + v.TITLE_NOUNS + v.EXPORTS
    words += v.NOUNS + [noun.capitalize() for noun in v.NOUNS] + v.ADJECTIVES + v.VERBS
    words += v.TOY_NOUNS + v.TOY_ADJECTIVES + v.TOY_VERBS
    for word in words:
        yield from [f" {word}"] * MERGE_COUNT
    for start in v.NAME_STARTS:
        yield from [f" {start}-"] * (20 * MERGE_COUNT)
    for end in v.NAME_ENDS:
        yield from [f"-{end}"] * (20 * MERGE_COUNT)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """A fingerprint of the vocabulary, merges and rules: data and tokenizer belong together."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16]


def padded_vocabulary(tokenizer: PreTrainedTokenizerFast) -> int:
    """The number of embedding rows: the vocabulary, rounded up to a multiple of 64."""
    return -(-len(tokenizer) // 64) * 64
