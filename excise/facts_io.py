"""Facts in and out: JSON Lines, or one JSON list, of our own records or those of other data sets (`facts_foreign`).

Our own record, the fields in brackets optional:

    {["id": "curie-born",] "subject": "Marie Curie", "answer": "Warsaw",
     "prompt": "Marie Curie was born in",            one wording ...
     ["prompts": ["...", {"text": "...", "form": "question", "held_out": true, "chat": true, "choices": [...]}],]
     ["question": "Where was Marie Curie born?", "paraphrases": ["...", "..."],]
     ["relation": "birthplace", "group": "forget", "aliases": [...], "foils": [...], "tags": {"source": "mine"}]}

A prompt given as an object may also carry its own "answer" and "subject". Paraphrases count as held out. `write_facts`
writes every prompt as an object, so that reading it back gives equal facts; a record without an id gets one of its
content, the same wherever it stands. Nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from excise.errors import ExciseError
from excise.facts import GROUPS, Fact, Facts, Prompt
from excise.facts_foreign import Record, group_of, nameless, reader_of, text
from excise.facts_subjects import with_subjects
from excise.jsonfile import why

FACT_FIELDS = (
    "id", "subject", "answer", "prompt", "prompts", "question", "paraphrases",
    "relation", "group", "aliases", "foils", "tags",
)  # fmt: skip
PROMPT_FIELDS = tuple(f.name for f in dataclasses.fields(Prompt) if f.name != "fact_id")
# Names that older files of ours use.
RENAMED = {"split": "group", "distractors": "foils"}


class FactsError(ExciseError, ValueError):
    """A facts file cannot be read as it stands."""


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@overload
def read_facts(source: str | Path, *, skip_bad: Literal[False] = False, **testbed: Any) -> Facts: ...
@overload
def read_facts(source: str | Path, *, skip_bad: Literal[True], **testbed: Any) -> tuple[Facts, list[BadRecord]]: ...
def read_facts(source: str | Path, *, skip_bad: bool = False, **testbed: Any) -> Facts | tuple[Facts, list[BadRecord]]:
    """The facts in a file, or those of an embedded world ("testbed", "testbed:dense", "testbed:FOLDER").

    skip_bad: give back the good records and the list of bad ones instead of stopping at the first bad one.
    testbed: options of `excise.testbed.facts` (people, seed, forget, retain, ...) when the source is a world.
    Raises FactsError: file and line, what is wrong, what would do.
    """
    if is_world(source):
        from excise.testbed import facts

        _, _, name = str(source).partition(":")
        made = facts(name or 0, **testbed)
        return (made, []) if skip_bad else made
    facts_found, bad = _read_file(Path(source), skip_bad)
    return (facts_found, bad) if skip_bad else facts_found


def is_world(source: str | Path) -> bool:
    """Whether the facts are those of an embedded world: "testbed", "testbed:dense", "testbed:FOLDER"."""
    return str(source).split(":")[0] == "testbed"


def require(facts: Facts, source: str | Path, *groups: str) -> Facts:
    """The same facts; raises FactsError when one of the groups has no fact."""
    for group in groups:
        if not len(facts.group(group)):
            have = ", ".join(f"{n} {g}" for g, n in facts.counts.items()) or "nothing"
            raise FactsError(
                f'{source}: no {group} fact, only {have}; mark at least one record with "group": "{group}"'
            )
    return facts


def write_facts(path: str | Path, facts: Sequence[Fact]) -> Path:
    """Write one record a line; a file is there whole or not at all."""
    from excise.files import write_text

    return write_text(path, "".join(json.dumps(as_record(fact), ensure_ascii=False) + "\n" for fact in facts))


def as_record(fact: Fact) -> Record:
    """The fact as one of our own records, empty fields left out."""
    record: Record = {"id": fact.id, "subject": fact.subject, "answer": fact.answer, "group": fact.group}
    record |= {k: _plain(v) for k in ("relation", "aliases", "foils", "tags") if (v := getattr(fact, k))}
    record["prompts"] = [
        {k: _plain(v) for k in PROMPT_FIELDS if (v := getattr(p, k)) or k in ("text", "answer")} for p in fact.prompts
    ]
    return record


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def from_record(record: Any, fallback: str) -> list[Fact]:
    """The facts in one decoded record; `fallback` is the id of a record that carries none. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"a record must be an object in braces, not {type(record).__name__}")
    reader = reader_of(record)
    # Through our own form, so that whatever is read can be written and read again.
    found = [_own(record)] if reader is None else [_own(as_record(fact)) for fact in reader(record, fallback)]
    for fact in found:
        for prompt in fact.prompts:
            prompt.span  # noqa: B018  raises when the subject does not occur in the text
    _check_unicode(record)
    return found


def _check_unicode(record: Record) -> None:
    """JSON can spell halves of characters, which no file and no tokenizer takes."""
    left: list[Any] = [record]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"{value[:40]!r} holds half a character (a lone surrogate); write it in full")


def _read_file(path: Path, skip_bad: bool) -> tuple[Facts, list[BadRecord]]:
    found: list[Fact] = []
    bad: list[BadRecord] = []
    first_seen: dict[str, int] = {}
    unnamed: set[str] = set()
    n, group = 0, group_of(path.stem)
    for n, (line, record, broken) in enumerate(_records(_decoded(path)), start=1):
        try:
            if broken:
                raise ValueError(broken)
            made = from_record(record, str(n))
            if group and reader_of(record) is not None and "edge" not in record:
                made = [_moved(f, group) if f.group == "forget" else f for f in made]
            for fact in made:
                if fact.id in first_seen:
                    raise ValueError(
                        f"the id {fact.id!r} was given before, in line {first_seen[fact.id]}; ids must be unique"
                    )
            first_seen |= {f.id: line for f in made}
            found += made
            unnamed |= {f.id for f in made} if nameless(record) else set()
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            reason = _reason(error)
            if not skip_bad:
                raise FactsError(f"{path}:{line}: {reason}") from error
            bad.append(BadRecord(f"{path}:{line}", reason))
    if not n:
        raise FactsError(f"{path}: no record in it; write one JSON object a line")
    named = {f.id: f for f in with_subjects([f for f in found if f.id in unnamed])}
    return Facts(named.get(f.id, f) for f in found), bad


def _moved(fact: Fact, group: str) -> Fact:
    """The fact in another group, under an id of its own: the files of one set all count their records from 1."""
    return dataclasses.replace(fact, id=f"{group}-{fact.id}", group=group)


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.json*")], n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "give a JSON Lines file, or testbed:dense"
        raise FactsError(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise FactsError(f"{path}: a folder, not a file; give a JSON Lines file") from None
    except UnicodeDecodeError as error:
        raise FactsError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _reason(error: Exception) -> str:
    match error:
        case KeyError():
            return f"no field {error}"
        case TypeError() | AttributeError():
            return f"a field is of another type than such records have ({error})"
    return str(error)


def _records(body: str) -> Iterator[tuple[int, Any, str]]:
    """(line number, decoded record, what is broken) for each record."""
    if body.lstrip().startswith("["):
        yield from _listed(body)
        return
    # Not splitlines: JSON may hold the line separators of Unicode as they are.
    for number, line in enumerate(body.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line), ""
            except (ValueError, RecursionError) as error:
                yield number, None, f"not JSON ({why(error, lines=False)}); write one object a line"


def _listed(body: str) -> Iterator[tuple[int, Any, str]]:
    # Each element is decoded on its own, so that an error can name the line its record starts on.
    decoder, at = json.JSONDecoder(), body.index("[") + 1
    line, counted = 1, 0
    while True:
        while at < len(body) and (body[at].isspace() or body[at] == ","):
            at += 1
        line, counted = line + body.count("\n", counted, at), at
        if at < len(body) and body[at] == "]":
            if body[at + 1 :].strip():
                yield line, None, "text after the end of the list; write one list, or one object a line"
            return
        try:
            record, at = decoder.raw_decode(body, at)
        except (ValueError, RecursionError) as error:
            reason = f"not JSON ({why(error, lines=False)}); the records after it are not read"
            yield getattr(error, "lineno", line), None, reason
            return
        yield line, record, ""


def _named(record: Record) -> str:
    """An id that depends on what the record says alone: runs go on from where they were if lines are added or moved."""
    said = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _own(record: Record) -> Fact:
    for old, new in RENAMED.items():
        if old in record and new not in record:
            record = {new if k == old else k: v for k, v in record.items()}
    _check_fields(record, FACT_FIELDS, "field")
    group = record.get("group", "forget")
    if group not in GROUPS:
        raise ValueError(f"no group {group!r}; {_near(str(group), GROUPS)}")
    # A skill has no subject and an unknown name no answer; what is taught has both.
    loose = group in ("unknown", "general")
    subject = _word(record, "subject") if loose else text(record, "subject")
    answer = _word(record, "answer") if loose else text(record, "answer")
    tags = record.get("tags", {})
    if not isinstance(tags, dict):
        raise ValueError('field "tags" must be an object of texts')
    return Fact(
        id=text(record, "id") if "id" in record else _named(record),
        subject=subject,
        answer=answer,
        prompts=tuple(_prompts(record, subject, answer)),
        relation=_word(record, "relation"),
        group=group,
        aliases=_texts(record, "aliases"),
        foils=_texts(record, "foils"),
        tags={str(k): str(v) for k, v in tags.items()},
    )


def _prompts(record: Record, subject: str, answer: str) -> Iterator[Prompt]:
    if "prompt" not in record and not record.get("prompts"):
        raise ValueError('no prompt; give "prompt": "..." or "prompts": [...], the answer follows it')
    if "prompt" in record:
        yield Prompt(text(record, "prompt"), answer, subject)
    for given in _list(record, "prompts"):
        yield _prompt(given, subject, answer)
    for wording in _texts(record, "paraphrases"):
        yield Prompt(wording, answer, subject if subject in wording else "", held_out=True)
    if "question" in record:
        asked = text(record, "question")
        yield Prompt(asked, answer, subject if subject in asked else "", "question", chat=True)


def _prompt(given: Any, subject: str, answer: str) -> Prompt:
    if isinstance(given, str):
        return Prompt(text({"prompts": given}, "prompts"), answer, subject)
    if not isinstance(given, dict):
        raise ValueError(f"a prompt must be text or an object, not {type(given).__name__}")
    _check_fields(given, PROMPT_FIELDS, "prompt field")
    answer = answer if "answer" not in given else _word(given, "answer") if not answer else text(given, "answer")
    text(given, "text")
    return Prompt(
        text=given["text"],
        answer=answer,
        subject=_word(given, "subject"),
        form=_word(given, "form", "statement"),
        held_out=_flag(given, "held_out"),
        chat=_flag(given, "chat"),
        choices=_texts(given, "choices"),
    )


def _check_fields(record: Record, allowed: Sequence[str], what: str) -> None:
    for name in record:
        if name not in allowed:
            raise ValueError(f"no {what} {name!r}; {_near(name, allowed)}")


def _near(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(allowed)}"


def _word(record: Record, name: str, default: str = "") -> str:
    """A text that may be empty or missing."""
    value = record.get(name, default)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is {type(value).__name__}, not text; write it as text")
    return value


def _list(record: Record, name: str) -> list[Any]:
    value = record.get(name, [])
    if not isinstance(value, list):
        raise ValueError(f"field {name!r} is {type(value).__name__}, not a list; write it in brackets")
    return value


def _texts(record: Record, name: str) -> tuple[str, ...]:
    value = _list(record, name)
    if not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError(f"field {name!r} must be a list of texts, none of them empty")
    return tuple(value)


def _flag(record: Record, name: str) -> bool:
    value = record.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"field {name!r} must be true or false, not {value!r}")
    return value
