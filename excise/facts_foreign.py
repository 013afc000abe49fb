"""Records of other people's data sets as Facts: ROME known_1000, CounterFact, EasyEdit, ZsRE, TOFU, PISTOL, KnowUnDo.

Each reader takes one decoded record and a fallback id, and returns facts; fields it does not need are left alone. The
group is "forget" unless the record says otherwise. `excise.facts_io` chooses the reader and reports errors by line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from excise.facts import Fact, Prompt

Record = dict[str, Any]
Reader = Callable[[Record, str], list[Fact]]


def known(record: Record, fallback: str) -> list[Fact]:
    """ROME's known_1000: subject, attribute, prompt (or template with {})."""
    subject = text(record, "subject")
    prompt = text(record, "prompt") if record.get("prompt") else text(record, "template").replace("{}", subject)
    fact_id = f"known-{record.get('known_id', fallback)}"
    relation = str(record.get("relation_id", ""))
    return [_fact(fact_id, subject, text(record, "attribute"), [Prompt(prompt, "", subject)], relation=relation)]


def counterfact(record: Record, fallback: str) -> list[Fact]:
    """CounterFact: the true answer is what to forget; neighbourhood prompts become neighbour facts."""
    asked = record["requested_rewrite"]
    template, subject = text(asked, "prompt"), text(asked, "subject")
    if "{}" not in template:
        raise ValueError(f"the prompt {template!r} has no {{}} where the subject belongs")
    answer, foil = text(asked["target_true"], "str"), asked.get("target_new", {}).get("str", "")
    case, relation = f"counterfact-{record.get('case_id', fallback)}", str(asked.get("relation_id", ""))
    prompts = [Prompt(template.replace("{}", subject), "", subject)]
    prompts += [Prompt(p, "", subject, held_out=True) for p in record.get("paraphrase_prompts", ()) if subject in p]
    facts = [_fact(case, subject, answer, prompts, relation=relation, foils=(foil,) if foil else ())]
    before, after = template.split("{}", 1)
    for i, prompt in enumerate(record.get("neighborhood_prompts", ())):
        inside = prompt[len(before) : len(prompt) - len(after)]
        # Neighbours are often asked in another wording, and then the record does not say who they are about.
        other = inside if prompt == before + inside + after else ""
        made = [Prompt(prompt, "", other)]
        facts.append(_fact(f"{case}-n{i}", other or prompt, answer, made, relation=relation, group="neighbour"))
    return facts


def easyedit(record: Record, fallback: str) -> list[Fact]:
    """EasyEdit and KnowEdit: prompt, subject, ground_truth, rephrase_prompt, locality."""
    subject, prompt = text(record, "subject"), text(record, "prompt")
    first, *others = answers(record, "ground_truth", "target_true", "answers")
    case = f"easyedit-{record.get('case_id', fallback)}"
    rephrased = record.get("rephrase_prompt") or record.get("rephrase") or []
    wordings = [rephrased] if isinstance(rephrased, str) else list(rephrased)
    prompts = [Prompt(prompt, "", subject)]
    prompts += [Prompt(w, "", subject, held_out=True) for w in wordings if subject in w]
    foil = record.get("target_new") or record.get("alt") or ""
    facts = [
        _fact(
            case,
            subject,
            first,
            prompts,
            aliases=tuple(others),
            foils=(foil,) if isinstance(foil, str) and foil else (),
        )
    ]
    for i, (question, answer) in enumerate(_locality(record)):
        facts.append(_fact(f"{case}-n{i}", question, answer, [Prompt(question, "")], group="neighbour"))
    return facts


def zsre(record: Record, fallback: str) -> list[Fact]:
    """ZsRE as MEND and EasyEdit ship it: src, subject, answers, rephrase, loc."""
    renamed = {**record, "prompt": text(record, "src"), "rephrase_prompt": record.get("rephrase", "")}
    if record.get("loc"):
        question = str(record["loc"]).removeprefix("nq question: ").strip()
        renamed["locality"] = {"nq": {"prompt": question, "ground_truth": record.get("loc_ans", "")}}
    return easyedit(renamed, fallback)


def question_answer(record: Record, fallback: str) -> list[Fact]:
    """TOFU, PISTOL and KnowUnDo: a question and its answer, asked as a chat turn where the model knows one.

    With TOFU's entity marks the lead-in belongs to the question, so that the answer is the entity alone. The subject of
    a PISTOL record is its contract, the edge, which no question names: contracts that share a party count as
    independent. TOFU and KnowUnDo name no subject: it is the question until `facts_subjects` has seen the whole file.
    """
    question = text(record, "question", "text", "instruction")
    edge, unknown = str(record.get("edge", "")), "instruction" in record
    answer = "I do not know" if unknown else text(record, "answer", "labels")
    number = record.get("id") or f"qa-{record.get('idx', fallback)}"
    subject = record.get("subject") or ""
    inside = subject if subject and subject in question else ""
    group = "unknown" if unknown else "retain" if edge == "retain" else "forget"
    prompts = [Prompt(question, "", inside, "question", chat=True)]
    if record.get("paraphrased_question"):
        again = str(record["paraphrased_question"])
        prompts.append(Prompt(again, "", subject if subject and subject in again else "", "question", True, chat=True))
    if record.get("entity"):
        lead = f"{question} {record.get('prefix', '')}".strip()
        answer, prompts = text(record, "entity"), [Prompt(lead, "", inside, "statement")]
    wrong = record.get("perturbed_answer") or ()
    foils = (wrong,) if isinstance(wrong, str) else tuple(wrong)
    tags = {"edge": edge} if edge else {}
    about = subject or (edge if edge not in ("", "forget", "retain") else question)
    return [_fact(str(number), about, answer.rstrip("."), prompts, group=group, foils=foils, tags=tags)]


# The fields that give a format away, most telling first.
FORMATS: tuple[tuple[str, tuple[str, ...], Reader], ...] = (
    ("CounterFact", ("requested_rewrite",), counterfact),
    ("ROME known", ("subject", "attribute"), known),
    ("ZsRE", ("src", "subject", "answers"), zsre),
    ("EasyEdit", ("prompt", "subject", "ground_truth"), easyedit),
    ("EasyEdit", ("prompt", "subject", "target_new"), easyedit),
    ("TOFU or PISTOL", ("question", "answer"), question_answer),
    ("KnowUnDo", ("text", "labels"), question_answer),
    ("unanswerable questions", ("instruction", "category"), question_answer),
)


def reader_of(record: Record) -> Reader | None:
    """The reader for a record, or None when no known format has these fields (then it is read as our own)."""
    if "prompts" in record or ({"prompt", "subject", "answer"} <= record.keys()):
        return None
    return next((read for _, fields, read in FORMATS if all(f in record for f in fields)), None)


def nameless(record: Record) -> bool:
    """Whether a record asks something and does not say whom about."""
    loose = reader_of(record) is question_answer and "instruction" not in record and not record.get("subject")
    return loose and record.get("edge", "retain") in ("", "forget", "retain")


def group_of(stem: str) -> str:
    """The group that a file of a public set has by its name: KnowUnDo's retention_train and TOFU's retain90 are kept."""
    return "retain" if re.match(r"retain|retention", stem.lower()) else ""


def text(record: Record, *names: str) -> str:
    """The first of the named fields that holds text; raises ValueError when it is missing, empty or not text."""
    name = next((n for n in names if n in record), None)
    if name is None:
        raise ValueError(f"no field {' or '.join(map(repr, names))}; the record has {', '.join(sorted(record))}")
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        shown = "is empty" if isinstance(value, str) else f"is {type(value).__name__}, not text"
        raise ValueError(f"field {name!r} {shown}; write it as text")
    return value.strip() if name != "prompt" else value.rstrip()


def answers(record: Record, *names: str) -> list[str]:
    """The accepted answers in the first of the named fields: a text, a list of texts, or {"str": text}."""
    name = next((n for n in names if record.get(n)), None)
    if name is None:
        raise ValueError(
            f"no answer: the record has none of {', '.join(names)}; give the answer that the model holds today"
        )
    value = record[name]
    value = value.get("str", "") if isinstance(value, dict) else value
    found = [v.strip() for v in ([value] if isinstance(value, str) else value) if isinstance(v, str) and v.strip()]
    if not found:
        raise ValueError(f"field {name!r} is empty; give the answer that the model holds today")
    return list(dict.fromkeys(found))


def _locality(record: Record) -> list[tuple[str, str]]:
    if record.get("locality_prompt"):
        return [(text(record, "locality_prompt"), answers(record, "locality_ground_truth")[0])]
    found = []
    for value in (record.get("locality") or {}).values():
        for entry in value if isinstance(value, list) else [value]:
            if not entry.get("prompt") or not entry.get("ground_truth"):
                continue
            truth = entry["ground_truth"]
            while isinstance(truth, list) and truth:
                truth = truth[0]
            if isinstance(truth, str) and truth.strip():
                found.append((text(entry, "prompt"), truth.strip()))
    return found


def _fact(fact_id: str, subject: str, answer: str, prompts: list[Prompt], **more: Any) -> Fact:
    answer = re.sub(r"\s+", " ", answer).strip()
    made = tuple(Prompt(p.text, answer, p.subject, p.form, p.held_out, p.chat, p.choices) for p in prompts)
    return Fact(fact_id, subject, answer, made, **more)
