"""Readers of facts and artefacts under made-up and damaged files: they read, or say in one line what is wrong; never else.

Examples are drawn the same in every run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.actions import Abstain, Clamp, LowRank, Scale, Sparse
from excise.cli import main
from excise.edits import Change, Edit
from excise.errors import DamagedFile
from excise.facts import GROUPS, Fact, Facts, Prompt
from excise.facts_io import FactsError, read_facts, write_facts
from excise.gates import Linear
from excise.headers import GATES, SETTINGS, TENSORS
from excise.ledger import Ledger, Request
from excise.outline import read_outline
from excise.progress import be_quiet
from excise.scores import Localization, TraceMap
from excise.sites import Site
from excise.solve import Covariance


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(derandomize=True, max_examples=examples, deadline=None, database=None)


@functools.cache
def scratch() -> Path:
    """One folder for all examples; hypothesis runs many in one test."""
    made = tempfile.TemporaryDirectory(prefix="excise-fuzz-")
    _kept.append(made)
    return Path(made.name)


_kept: list[Any] = []

# What JSON can hold, what Python's parser takes beyond it, and values that mean something to a reader.
TELLING = st.sampled_from([
    "", " ", "a", "forget", "edit", "LowRank", "Linear", "os.system", "../../x", "<script>", "\ud800", "\u2028", "\x1b[2J",
    "blocks.0.mlp.W_out", "blocks.0.hook_resid_post@all#3", 0, -1, 1, 2**63, 1e308, float("nan"), float("-inf"), None, True, [], {},
])  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | TELLING
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)

OWN = {
    "id": "a", "subject": "Ann Lee", "answer": "Rome", "prompt": "Ann Lee lives in", "question": "Where does Ann Lee live?",
    "prompts": ["Ann Lee is from", {"text": "Ann Lee?", "form": "choice", "held_out": True, "chat": True, "choices": ["Rome"]}],
    "paraphrases": ["Ann Lee's home is"], "relation": "home", "group": "retain", "aliases": ["Roma"], "foils": ["Oslo"], "tags": {"a": "b"},
}  # fmt: skip
FOREIGN: list[dict[str, Any]] = [
    {"known_id": 3, "subject": "Eiffel Tower", "attribute": "Paris", "template": "{} is in", "prediction": " Paris"},
    {
        "case_id": 0, "paraphrase_prompts": ["Off topic. Danielle is"], "neighborhood_prompts": ["The tongue of Léon is", "A native"],
        "requested_rewrite": {"prompt": "The tongue of {} is", "subject": "Danielle", "target_true": {"str": "French"}, "target_new": {"str": "English"}},
    },
    {
        "prompt": "Curie was born in", "subject": "Curie", "ground_truth": ["Warsaw", "Poland"], "target_new": "Rome",
        "rephrase_prompt": "The home of Curie is", "locality": {"n": [{"prompt": "Chopin was born in", "ground_truth": [["Poland"]]}]},
    },
    {"subject": "E.", "src": "What is E.?", "answers": ["genus"], "alt": "order", "rephrase": "E. is?", "loc": "nq question: who", "loc_ans": "B."},
    {"idx": 5, "question": "What is her name?", "answer": "Hsiao.", "prefix": "It is", "entity": "Hsiao", "perturbed_answer": ["Ann"]},
    {"question": "Price between A and B?", "answer": "7.", "edge": "A_B", "paraphrased_question": "What price?"},
    {"text": "Who?", "labels": "She."},
    {"instruction": "Who is it?", "category": "nobody"},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value something can be changed."""
    found = [path] if path else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        found += places(child, (*path, key))
    return found


def damaged(draw: Any, whole: Any, times: int = 2) -> Any:
    """The value with something in it replaced, taken out, or added."""
    found = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, times))):
        if not (where := places(found)):
            break
        *path, last = draw(st.sampled_from(where))
        parent = functools.reduce(lambda value, key: value[key], path, found)
        if draw(st.integers(0, 3)) == 0:
            del parent[last]
        else:
            parent[last] = draw(VALUES)
        if isinstance(parent, dict) and draw(st.integers(0, 5)) == 0:
            parent[draw(st.text(max_size=4) | TELLING.filter(lambda v: isinstance(v, str)))] = draw(VALUES)
    return found


# facts


def check_facts(body: bytes) -> None:
    """The file is read, or refused in one line that begins with its name; what is read can be written and read again."""
    path = scratch() / "facts.jsonl"
    path.write_bytes(body)
    try:
        found = read_facts(path)
    except FactsError as error:
        assert str(error).startswith(f"{path}:"), error
    else:
        assert read_facts(write_facts(scratch() / "again.jsonl", found)) == found
    try:
        good, bad = read_facts(path, skip_bad=True)
    except FactsError as error:  # the file as a whole: not UTF-8, no record
        assert str(error).startswith(f"{path}: ")
    else:
        assert len(good) or bad
        assert all(b.where.startswith(f"{path}:") and b.reason for b in bad)


@fuzz(150)
@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_any_bytes(body: bytes) -> None:
    check_facts(body)


@fuzz(150)
@given(st.lists(VALUES, min_size=1, max_size=3), st.booleans())
def test_any_json(values: list[Any], listed: bool) -> None:
    check_facts((json.dumps(values) if listed else "\n".join(map(json.dumps, values))).encode())


@fuzz(250)
@given(st.data())
def test_damaged_records(data: Any) -> None:
    record = damaged(data.draw, data.draw(st.sampled_from([OWN, *FOREIGN])))
    check_facts(json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass"))


@fuzz(100)
@given(st.data())
def test_damaged_text(data: Any) -> None:
    """Whole records with bytes cut out, changed or put in."""
    whole = "".join(json.dumps(r) + "\n" for r in (OWN, *FOREIGN[:3])).encode()
    check_facts(bitten(data.draw, whole))


def bitten(draw: Any, whole: bytes) -> bytes:
    at = draw(st.integers(0, len(whole)))
    gone = draw(st.sampled_from([0, 1, 1, 8, len(whole)]))
    return whole[:at] + draw(st.binary(max_size=4)) + whole[at + gone :]


# Text as a record may hold it: not blank, no space at its ends, no half characters.
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(str.strip).filter(bool)


@st.composite
def facts(draw: Any) -> Fact:
    subject, answer = draw(WORDS), draw(WORDS)
    few = st.lists(WORDS, max_size=2).map(tuple)
    asked = tuple(
        Prompt(
            f"{draw(WORDS)} {subject} {draw(WORDS)}", draw(WORDS), draw(st.sampled_from([subject, ""])), draw(WORDS),
            draw(st.booleans()), draw(st.booleans()), draw(few),
        )
        for _ in range(draw(st.integers(1, 2)))
    )  # fmt: skip
    tags = draw(st.dictionaries(WORDS, WORDS, max_size=2))
    return Fact(
        draw(WORDS), subject, answer, asked, draw(WORDS), draw(st.sampled_from(GROUPS)), draw(few), draw(few), tags
    )


@fuzz(100)
@given(st.lists(facts(), min_size=1, max_size=3, unique_by=lambda f: f.id))
def test_whatever_is_written_is_read(some: list[Fact]) -> None:
    again = read_facts(write_facts(scratch() / "facts.jsonl", some))
    assert again == Facts(some) and [f.tags for f in again] == [f.tags for f in some]


# artefacts


def _edit() -> Edit:
    gate = Linear(Site("blocks.0.hook_resid_post"), torch.randn(3), 0.5, "sequence")
    features = (torch.randn(3, 2), torch.zeros(2), torch.zeros(2), torch.randn(2, 3), torch.ones(2))
    changes = (
        Change(Site("blocks.0.mlp.W_out"), LowRank(torch.randn(4, 1), torch.randn(1, 3)), gate),
        Change(Site("blocks.1.mlp.W_out"), Scale(torch.tensor([0, 1]), torch.zeros(2))),
        Change(Site("blocks.1.mlp.W_in"), Sparse(torch.tensor([0]), torch.ones(1).bfloat16())),
        Change(Site("blocks.1.hook_resid_post", "after_bos"), Clamp(*features), gate),
        Change(Site("unembed.hook_out"), Abstain(torch.tensor([1])), gate),
    )
    return Edit(changes, {"method": "by hand"}, {"tokenizer": "0"})


def _localization() -> Localization:
    maps = (TraceMap("a", ("<s>", "Ann"), (1, 2), {"resid": np.ones((2, 2))}, 0.1, 0.9),)
    sites = (Site("blocks.0.hook_resid_post", "subject_last"), Site.parse("blocks.1.mlp.W_out#1"))
    return Localization(sites, np.array([[0.5, np.nan]]), ("a",), {"method": "x"}, np.ones((2, 3)), maps)


def _ledger() -> Ledger:
    request = Request("Ann", {"m": torch.ones(1, 3)}, torch.ones(1, 2), {"m": torch.randn(1, 3)}, ("kept",))
    return Ledger({"m": Covariance(torch.eye(3))}, {"m": "0"}, {"method": "rocr"}).add(request)


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Path], Any]]] = {
    "edit": (_edit, Edit.load),
    "localization": (_localization, Localization.load),
    "ledger": (_ledger, Ledger.load),
}


@functools.cache
def whole(kind: str) -> bytes:
    """The file of an artefact, as it should be."""
    torch.manual_seed(0)
    path: Path = KINDS[kind][0]().save(scratch() / f"{kind}.safetensors")
    return path.read_bytes()


def check_artefact(kind: str, body: bytes) -> bool:
    """Every reader reads the file, or says in one line that begins with its name what is wrong; whether it was read."""
    path = scratch() / "bad.safetensors"
    path.write_bytes(body)
    read = False
    for reader in (KINDS[kind][1], read_outline):
        try:
            found = reader(path)
        except DamagedFile as error:
            assert str(error).startswith(f"{path}: "), error
        else:
            read = True
            if not isinstance(found, Ledger):
                assert repr(found)
    for form in ("table", "json"):
        code, out, err = shown(path, form)
        assert code in (0, 1) and (code == 0) == (not err), err
        assert "\x1b" not in out and "report it" not in err and err.count("\n") == code
        assert form == "table" or code or json.loads(out)
    return read


def shown(path: Path, form: str) -> tuple[int, str, str]:
    """`excise show` on streams that take nothing but UTF-8, as a terminal."""
    be_quiet(False)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["show", str(path), "--format", form])
        out.flush(), err.flush()
    return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()  # type: ignore[attr-defined]


def rebuilt(header: Any, body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@st.composite
def damaged_artefacts(draw: Any) -> tuple[str, bytes]:
    """A kind, and a file of it that is damaged in its bytes, in its table of tensors, or in what it says of itself."""
    kind = draw(st.sampled_from(list(KINDS)))
    good = whole(kind)
    how = draw(st.sampled_from(["bytes", "table", "description", "description", "both"]))
    if how == "bytes":
        return kind, bitten(draw, good)
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    if how in ("description", "both"):
        description = damaged(draw, json.loads(header["__metadata__"]["excise"]))
        header["__metadata__"]["excise"] = json.dumps(description)
    if how in ("table", "both"):
        header = damaged(draw, header)
    return kind, rebuilt(header, body)


@fuzz(200)
@given(damaged_artefacts())
def test_damaged_artefacts(given_file: tuple[str, bytes]) -> None:
    check_artefact(*given_file)


@fuzz(60)
@given(st.sampled_from(list(KINDS)), st.binary(max_size=40))
def test_any_bytes_as_artefact(kind: str, body: bytes) -> None:
    check_artefact(kind, body)
    check_artefact(kind, struct.pack("<Q", len(body)) + body)


def test_whole_artefacts_are_read() -> None:
    """Were they refused, the tests above would prove nothing."""
    assert all(check_artefact(kind, whole(kind)) for kind in KINDS)


def test_headers_know_every_field_of_every_part() -> None:
    """An action or gate that gets a field must say there what it may hold."""
    import dataclasses

    from excise.actions import ACTIONS
    from excise.gates import GATES as CLASSES

    assert ACTIONS.keys() == TENSORS.keys() and CLASSES.keys() == GATES.keys()
    for name, kind in (ACTIONS | CLASSES).items():
        fields = {f.name for f in dataclasses.fields(kind)}
        assert fields <= (TENSORS | GATES)[name].keys() | SETTINGS.keys(), name
        assert (TENSORS | GATES)[name].keys() <= fields, name
