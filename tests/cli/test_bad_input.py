"""Malformed and hostile input: one clear line, the right exit code, nothing written elsewhere, nothing executed.

A table: what is given, the exit code, and what the line must say. Every case runs with the run folder as the only place
that may change, under a watch for programs started, connections opened and code executed.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SITE, Cli, an_edit, save_model
from pyarrow.parquet import read_table
from safetensors.torch import load_file, save_file
from watching import watched

from excise.batch import TABLE
from excise.files import write_container

ANN = {"id": "a", "subject": "Ann Lee", "prompt": "Ann Lee lives in", "answer": "Rome", "group": "forget"}
BOB = {"id": "b", "subject": "Bob Ray", "prompt": "Bob Ray lives in", "answer": "Oslo", "group": "retain"}
RESID, TOKEN = "blocks.0.hook_resid_post", "unembed.hook_out"
HUGE, DEEP = "9" * 6000, "[" * 200_000
TRAVERSAL, SCRIPT = "../../x", "<script>alert(1)</script>"
# What it does when it is unpickled; it must never be.
PICKLE = b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."
EVIL = "open('pwned', 'w').close()\nclass C: pass\nclass M: pass\nclass T: pass\n"


@dataclass(frozen=True)
class Place:
    """Where a case finds what is whole, puts what is broken (`bad`), and may write (`run`)."""

    good: Path
    bad: Path
    run: Path

    @property
    def model(self) -> Path:
        return self.good / "model"

    @property
    def edit(self) -> Path:
        return self.good / "edit.safetensors"

    @property
    def facts(self) -> Path:
        return self.good / "facts.jsonl"

    def file(self, name: str, content: str | bytes) -> Path:
        path = self.bad / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return path

    def cut(self, facts: Path | str, *more: object) -> tuple[object, ...]:
        """The command that computes an edit."""
        out = self.run / "edit.safetensors"
        return ("edit", "rocr", "--facts", facts, "--model", self.model, "--out", out, *more)

    def find(self, method: str, *more: object) -> tuple[object, ...]:
        """The command that localizes."""
        return ("localize", method, "--facts", self.facts, "--model", self.model, "--out", self.run, *more)


Words = tuple[object, ...]
Make = Callable[[Place], Words]


@dataclass(frozen=True)
class Case:
    name: str
    make: Make
    says: str
    code: int = 1


def lines(*records: object) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


# facts files


def facts(name: str, content: str | bytes | list[Any], says: str) -> Case:
    body = lines(*content) if isinstance(content, list) else content
    return Case(f"facts: {name}", lambda p: p.cut(p.file("facts.jsonl", body)), says)


def record(name: str, says: str, **fields: Any) -> Case:
    """Ann's record with other fields; the line must begin with file and line number."""
    return facts(name, [BOB, {**ANN, **fields}], rf"facts\.jsonl:2: .*{says}")


FACTS = [
    facts("truncated", '{"id": "a", "subj', r"facts\.jsonl:1: not JSON \(Unterminated string starting at column 13\)"),
    facts("not UTF-8", b'{"id": "\xe9"}\n', "byte 8 is not UTF-8"),
    facts("UTF-16", lines(ANN, BOB).encode("utf-16"), "byte 0 is not UTF-8"),
    facts("zeros", b"\0" * 100, ":1: not JSON"),
    facts("empty", "", "no record in it"),
    facts("blank lines", "\n \n\n", "no record in it"),
    facts("a number", "7\n", "must be an object in braces, not int"),
    facts("null", "null\n", "must be an object"),
    facts("deep list", DEEP, "nested too deep"),
    facts("deep object", '{"a":' * 100_000, "nested too deep"),
    facts("a number of 6000 digits", f'{{"id": {HUGE}}}\n', ":1: not JSON .a number of too many digits"),
    facts("the same in a list", f'[{{"id": {HUGE}}}]', "too many digits"),
    facts("list with a tail", json.dumps([ANN, BOB]) + " rm -rf /", "text after the end of the list"),
    facts("list cut off", json.dumps([ANN, BOB])[:-40], "not JSON"),
    facts("the same id twice", [ANN, ANN], ":2: the id 'a' was given before, in line 1"),
    facts("a pickle", PICKLE, "byte 0 is not UTF-8"),
    facts("only to retain", [BOB], "no forget fact, only 1 retain"),
    record("id is a number", "field 'id' is int, not text", id=3),
    record("unknown field", "no field 'anwser'; did you mean answer", anwser="x"),
    record("hostile field", "no field", **{SCRIPT: TRAVERSAL}),
    record("unknown group", "no group '../../x'", group=TRAVERSAL),
    record("group is a list", "no group", group=["forget"]),
    record("subject is missing from the prompt", "does not occur in the prompt", prompt="She lives in"),
    record("subject of a million letters", r" \.\.\. .*does not occur", subject="A" * 10**6),
    record("answer is blank", "field 'answer' is empty", answer=" \n"),
    record("answer is NaN", "field 'answer' is float, not text", answer=float("nan")),
    record("answer is half a character", "half a character", answer="\ud800"),
    record("prompts is a text", "field 'prompts' is str, not a list", prompts="Ann Lee lives in"),
    record("prompts is an object", "field 'prompts' is dict", prompts={"text": "Ann Lee lives in"}),
    record("prompts holds a list", "a prompt must be text or an object", prompts=[["Ann Lee"]]),
    record("prompts holds a blank", "is empty", prompts=[" "]),
    record("unknown prompt field", "no prompt field 'txt'", prompts=[{"txt": "x"}]),
    record("flag is a text", "must be true or false", prompts=[{"text": "Ann Lee is", "chat": "yes"}]),
    record("paraphrases is null", "field 'paraphrases' is NoneType", paraphrases=None),
    record("foils is an object", "field 'foils' is dict", foils={"x": 1}),
    record("tags is a list", "must be an object of texts", tags=["a"]),
    record("relation is an object", "field 'relation' is dict", relation={"__import__": "os"}),
    facts("CounterFact, a number", [{"requested_rewrite": 5}], ":1: a field is of another type"),
    facts("EasyEdit, a list", [{"prompt": "A is", "subject": "A", "ground_truth": "x", "locality": [1]}], ":1: a field"),
    facts("ROME, a number", [{"subject": "A", "attribute": "x", "prompt": 5}], ":1: field 'prompt' is int"),
    facts("prompt beyond the context", [{**ANN, "prompt": "Ann Lee " * 99}, BOB], "do not fit the model's context of 64"),
    Case("facts: a folder", lambda p: p.cut(p.bad), "a folder, not a file"),
    Case("facts: missing", lambda p: p.cut(p.bad / "none.jsonl"), "no such file"),
    Case("facts: a file as folder", lambda p: p.cut(p.facts / "x"), "Not a directory"),
    Case("facts: a world that leads elsewhere", lambda p: p.cut(f"testbed:{TRAVERSAL}"), "no testbed model '../../x'"),
    Case("facts: a link to itself", lambda p: p.cut(_loop(p)), "Too many levels of symbolic links"),
    Case("facts: an edit", lambda p: p.cut(p.edit), "not UTF-8"),
    Case("facts: a second file that is none", lambda p: p.cut(p.facts, "--retain", p.file("r", "{")), ":1: not JSON"),
]  # fmt: skip


def _loop(place: Place) -> Path:
    link = place.bad / "loop"
    link.symlink_to(link)
    return link


# artefacts: files that `show` reads without a model library, and that `ask`, `edit`, `withdraw` read with one


def safetensors(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def described(header: object) -> bytes:
    """A file without tensors that says of itself to be one of ours."""
    return safetensors({"__metadata__": {"excise": header if isinstance(header, str) else json.dumps(header)}})


def show(name: str, content: bytes | Callable[[bytes], bytes], says: str) -> Case:
    """A broken file, shown: `content` may be made of the bytes of a whole edit."""

    def make(place: Place) -> Words:
        whole = place.edit.read_bytes()
        return ("show", place.file("bad.safetensors", content(whole) if callable(content) else content))

    return Case(f"show: {name}", make, rf"bad\.safetensors: .*{says}")


def row(action: object = None, site: object = SITE, **more: Any) -> dict[str, Any]:
    return {"site": site, "action": {"type": "LowRank"} if action is None else action, **more}


def edit_header(*changes: object, **more: Any) -> dict[str, Any]:
    return {"format": 1, "kind": "edit", "changes": list(changes), "recipe": {}, "fingerprints": {}, **more}


NOWHERE: dict[str, Any] = {"sites": [], "facts": [], "recipe": {}, "maps": []}
HEADERS = [
    show("empty", b"", "header is cut off"),
    show("half an edit", lambda whole: whole[: len(whole) // 2], "not a whole safetensors file"),
    show("all but a byte", lambda whole: whole[:-1], "ends too early"),
    show("more than an edit", lambda whole: whole + b"x", "longer than its header says"),
    show("text", b"hello world, this is text\n" * 9, "header is cut off"),
    show("a pickle", PICKLE, "header is cut off"),
    show("a header of 2^63 bytes", safetensors(b"{}", length=2**63), "header is cut off"),
    show("a header that is no JSON", safetensors(b"{{{{{{"), "Expecting property name"),
    show("a header that is a list", safetensors([1, 2]), "not an object"),
    show("a deep header", safetensors(b'{"a":' * 100_000), "nested too deep"),
    show("a tensor beyond the end", safetensors({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "ends too early"),
    show("a shape that overflows", safetensors({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}), "does not fit"),
    show("a negative shape", safetensors({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, b"abcd"), "shape that is none"),
    show("metadata of numbers", safetensors({"__metadata__": {"excise": 5}}), "object of texts"),
    show("a foreign file", safetensors({}), "not one of excise's"),
    show("a description that is no JSON", described("{"), "its header: not JSON"),
    show("a deep description", described(DEEP), "nested too deep"),
    show("a description of huge numbers", described(f'{{"format": {HUGE}}}'), "too many digits"),
    show("a newer format", described({"format": 99, "kind": "edit"}), "format 99; this version reads format 1"),
    show("no kind", described({"format": 1}), "kind is missing"),
    show("no changes", described({"format": 1, "kind": "edit", "recipe": {}, "fingerprints": {}}), "changes is missing"),
    show("changes is text", described(edit_header(changes="abc")), "changes must be a list"),
    show("a recipe that is a list", described(edit_header(recipe=[1])), "recipe must be an object"),
    show("a site that leads elsewhere", described(edit_header(row(site=TRAVERSAL))), "'../../x' is not a site"),
    show("a site that is a number", described(edit_header(row(site=5))), "change 0.site must be text"),
    show("an action that names code", described(edit_header(row({"type": "os.system"}))), "unknown type 'os.system'"),
    show("an action without tensors", described(edit_header(row())), "tensor 0.action.left is missing"),
    show("a localization without scores", described({**NOWHERE, "format": 1, "kind": "localization"}), "tensor scores is missing"),
    show("a ledger of nothing", described({"format": 1, "kind": "ledger"}), "is missing"),
]  # fmt: skip


def held(kind: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Callable[[Place], Path]:
    return lambda place: write_container(place.bad / "bad.safetensors", kind, header, tensors)


def asked(
    name: str, says: str, action: dict[str, Any], site: str = SITE, gate: Any = None, **tensors: torch.Tensor
) -> Case:
    """An edit of one change, used; its tensors are those of the action, a gate's begin with gate_."""
    named = {f"0.gate.{n[5:]}" if n.startswith("gate_") else f"0.action.{n}": t for n, t in tensors.items()}
    change = {"site": site, "action": action} | ({"gate": gate} if gate else {})
    file = held("edit", {"changes": [change], "recipe": {}, "fingerprints": {}}, named)
    return Case(f"edit: {name}", lambda p: ("ask", "Who?", "--model", p.model, "--edit", file(p)), says)


def affine(width: int) -> dict[str, torch.Tensor]:
    left = torch.randn(width, 1)
    return {"left": left, "right": left.mT, "centre": left[:, 0], "shift": left[:, 0]}


def linear(site: str) -> dict[str, Any]:
    return {"type": "Linear", "site": site, "threshold": 0.0}


LOW = {"type": "LowRank"}
ONE = torch.tensor([1])
TALL, FLAT = torch.randn(48, 1), torch.randn(1, 32)
EDITS = [
    asked("factors for another matrix", r"a matrix \[48, 32\] in .* for another shape", LOW, left=torch.randn(5, 1), right=torch.randn(1, 7)),
    asked("factors that do not chain", "r is 1", LOW, left=TALL, right=torch.randn(2, 32)),
    asked("factors of one axis", "must have the axes i r", LOW, left=torch.randn(48), right=FLAT),
    asked("NaN", "holds NaN", LOW, left=TALL * float("nan"), right=FLAT),
    asked("infinity", "is infinite", LOW, left=TALL * float("inf"), right=FLAT),
    asked("whole numbers for factors", "must hold floating-point", LOW, left=TALL.long(), right=FLAT),
    asked("texts for factors", "is missing", LOW | {"left": SCRIPT, "right": 5}),
    asked("a matrix of another shape", "for another shape", {"type": "Dense"}, change=torch.randn(3, 3)),
    asked("an entry out of range", "for another shape", {"type": "Sparse"}, indices=torch.tensor([10**12]), values=torch.ones(1)),
    asked("an entry before the first", "for another shape", {"type": "Sparse"}, indices=torch.tensor([-1]), values=torch.ones(1)),
    asked("entries between entries", "must hold whole", {"type": "Sparse"}, indices=torch.tensor([1.5]), values=torch.ones(1)),
    asked("a unit out of range", "for another shape", {"type": "Scale"}, units=torch.tensor([99]), factor=torch.ones(1)),
    asked("a side that is none", "must be in or out", {"type": "Scale", "side": "up"}, units=torch.tensor([1]), factor=torch.ones(1)),
    asked("an activation of another width", "does not fit activations of width 32", {"type": "Affine"}, RESID, **affine(5)),
    asked("an activation's action on a matrix", "Affine cannot act on", {"type": "Affine"}, **affine(48)),
    asked("a block that is not there", "this model has 2 blocks", {"type": "Dense"}, "blocks.99.mlp.W_out", change=torch.ones(48, 32)),
    asked("a token that is not there", "does not fit", {"type": "Abstain"}, TOKEN, tokens=torch.tensor([99999])),
    asked("nothing to say", "no token to say", {"type": "Abstain"}, TOKEN, tokens=torch.zeros(0, dtype=torch.long)),
    asked("a strength in words", "strength must be a number", {"type": "Abstain", "strength": "much"}, TOKEN, tokens=torch.tensor([1])),
    asked("a gate of another width", "the gate at .* does not fit", {"type": "Abstain"}, TOKEN, linear(RESID), tokens=ONE, gate_direction=torch.ones(5)),
    asked("a gate at no place", "is not a site", {"type": "Abstain"}, TOKEN, linear(SCRIPT), tokens=ONE, gate_direction=torch.ones(32)),
    asked("a gate that names code", "unknown type 'builtins.eval'", LOW, gate={"type": "builtins.eval"}, left=TALL, right=FLAT),
]  # fmt: skip


def located(name: str, says: str, scores: torch.Tensor, **fields: Any) -> Case:
    header = {"sites": [RESID], "facts": ["a"], "recipe": {}, "maps": [], **fields}
    file = held("localization", header, {"scores": scores})
    return Case(f"where: {name}", lambda p: p.cut(p.facts, "--where", file(p)), says)


def withdrawn(name: str, says: str, tensors: dict[str, torch.Tensor], **fields: Any) -> Case:
    asked_for = {"request": SCRIPT, "columns": 1, "protected": 0, "labels": []}
    header = {
        "requests": [asked_for],
        "ridges": {"m": 0.0},
        "fingerprints": {},
        "recipe": {},
        "mode": "ridge",
        "ridge": 0.3,
    }
    file = held("ledger", header | fields, tensors)
    out = "edit.safetensors"
    return Case(f"ledger: {name}", lambda p: ("withdraw", file(p), "nobody", "--out", p.run / out), says)


SMALLER = held(
    "edit",
    {"changes": [{"site": SITE, "action": LOW}], "recipe": {}, "fingerprints": {}},
    {"0.action.left": torch.ones(5, 1), "0.action.right": torch.ones(1, 7)},
)
SQUARE = {"second.m": torch.eye(3), "0.residuals": torch.ones(1, 2), "0.keys.m": torch.ones(1, 3)}
OTHERS = [
    located("scores of another shape", "f is 1", torch.ones(3, 3)),
    located("a site that is none", "is not a site", torch.ones(1, 1), sites=[SCRIPT]),
    located("a block that is not there", "no block 99", torch.ones(1, 1), sites=["blocks.99.hook_resid_post"]),
    located("half a map", "map 0.tokens is missing", torch.ones(1, 1), maps=[{"fact": TRAVERSAL}]),
    Case("where: an edit", lambda p: p.cut(p.facts, "--where", p.edit), "holds 'edit', and 'localization' is wanted"),
    Case("where: a table cut off", lambda p: p.cut(p.facts, "--where", p.file("t.parquet", b"PAR1xxxx")), "not a table of `excise localize`"),
    Case("where: no site", lambda p: p.cut(p.facts, "--where", SCRIPT), "is not a site"),
    Case("where: a path", lambda p: p.cut(p.facts, "--where", TRAVERSAL), "'../../x' is not a site"),
    withdrawn("nobody of that name", "no request 'nobody' in the ledger", SQUARE),
    withdrawn("keys of another width", "d is 3", SQUARE | {"0.keys.m": torch.ones(1, 9)}),
    withdrawn("keys of another matrix", "belongs to no matrix", SQUARE | {"0.keys.other": torch.ones(1, 3)}),
    withdrawn("no residuals", "tensor 0.residuals is missing", {"second.m": torch.eye(3)}),
    withdrawn("a mode that is none", "must be hard, ridge or soft", SQUARE, mode="__import__"),
    withdrawn("NaN", "NaN among its keys", SQUARE | {"second.m": torch.eye(3) * float("nan")}),
    Case("ledger: an edit", lambda p: ("withdraw", p.edit, "x", "--out", p.run / "e.safetensors"), "'ledger' is wanted"),
    Case("diff: edits of different models", lambda p: ("diff", p.edit, SMALLER(p)), "made for different models"),
    Case("diff: nothing", lambda p: ("diff", p.model, SCRIPT), "no such file or folder"),
    Case("show: run.json is a list", lambda p: ("show", _run(p, "[1]")), r"run\.json: not a JSON object"),
    Case("show: run.json is not UTF-8", lambda p: ("show", _run(p, b"\xe9")), "byte 0 is not UTF-8"),
    Case("show: run.json is deep", lambda p: ("show", _run(p, DEEP)), "nested too deep"),
    Case("report: run.json is cut off", lambda p: ("report", _run(p, "{")), r"run\.json: not JSON"),
    Case("report: samples is a number", lambda p: ("report", _run(p, '{"samples": 5}')), "not a list of objects"),
    Case("report: nothing finished", lambda p: ("report", _run(p, "{}")), "no finished item"),
    Case("report: not a run folder", lambda p: ("report", p.model), "no such file; a report needs a finished run"),
]  # fmt: skip


def _run(place: Place, settings: str | bytes) -> Path:
    """A run folder that finished nothing."""
    place.file("run.json", settings)
    place.file("facts.jsonl", lines(ANN, BOB))
    place.file("results.jsonl", '{"half a li')
    return place.bad


# models


def model(name: str, says: str, change: Callable[[Path], object], command: tuple[str, ...] = ("doctor",)) -> Case:
    """The tiny model with something changed in its folder."""

    def make(place: Place) -> Words:
        folder = shutil.copytree(place.model, place.bad / "model")
        change(folder)
        return (*command, "--model", folder)

    return Case(f"model: {name}", make, says)


def named(name: str, says: str) -> Case:
    return Case(f"model: called {name!r}"[:60], lambda p: ("doctor", "--model", name), says)


def configured(**fields: Any) -> Callable[[Path], object]:
    return changed("config.json", **fields)


def changed(file: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | fields))
        (folder / "evil.py").write_text(EVIL)

    return change


def replaced(file: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def rewritten(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewritten


def indexed(index: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def templated(template: str) -> Callable[[Path], object]:
    return changed("tokenizer_config.json", chat_template=template)


ASK = ("ask", "Who?")
DOWN = "model.layers.0.mlp.down_proj.weight"
ELSEWHERE = {"metadata": {}, "weight_map": {DOWN: "../../secret.safetensors"}}
UNLOADABLE = "not a causal language model that transformers can load"
CODE = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
MODELS = [
    named("", "no model at ''"),
    named(TRAVERSAL, "no model at '../../x'"),
    named(SCRIPT, "no model at '<script>"),
    named("testbed:../../x", "no testbed model '../../x'"),
    named("x" * 5000, r"no (model|such)|File name too long"),
    Case("model: an empty folder", lambda p: ("doctor", "--model", p.bad), "no model at"),
    Case("model: a facts file", lambda p: ("doctor", "--model", p.facts), "no model at"),
    model("config cut off", "not a valid JSON file", replaced("config.json", '{"model_ty')),
    model("config is a list", UNLOADABLE, replaced("config.json", "[1]")),
    model("config is not UTF-8", UNLOADABLE, replaced("config.json", b"\xff\xfe\xe9")),
    model("config is deep", UNLOADABLE, replaced("config.json", DEEP)),
    model("unknown architecture", UNLOADABLE, configured(model_type=SCRIPT)),
    model("an encoder and decoder", UNLOADABLE, configured(model_type="t5")),
    model("a width in words", "hidden_size", configured(hidden_size="x")),
    model("a negative width", UNLOADABLE, configured(hidden_size=-4)),
    model("no heads", UNLOADABLE, configured(num_attention_heads=0)),
    model("another width", r"its config.json asks for \[", configured(hidden_size=64)),
    model("an activation that names code", UNLOADABLE, configured(hidden_act="os.system")),
    model("a dtype that names code", UNLOADABLE, configured(dtype="os.system")),
    model("more blocks than weights", "lacks 9 parameters", configured(num_hidden_layers=3)),
    model("code of its own", "custom code", configured(model_type="evil", auto_map=CODE)),
    model("a tokenizer's code", "custom code", changed("tokenizer_config.json", tokenizer_class="T", auto_map=CODE)),
    model("a template that reaches out", "SecurityError", templated("{{ ''.__class__.__mro__[1].__subclasses__() }}"), ASK),
    model("half a template", "chat template cannot be rendered", templated("{% for"), ASK),
    model("tokenizer cut off", UNLOADABLE, replaced("tokenizer.json", '{"version": "1.0", "mod')),
    model("no tokenizer", UNLOADABLE, lambda folder: (folder / "tokenizer.json").unlink()),
    model("weights cut off", "SafetensorError", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000])),
    model("a pickle as weights", "no file named model.safetensors", _pickled),
    model("a pickle under another name", "SafetensorError", replaced("model.safetensors", PICKLE)),
    model("a matrix is missing", f"lacks 1 parameters .*{DOWN}", weights(lambda t: t.pop(DOWN))),
    model("a matrix of another shape", rf"holds {DOWN} as \[3, 3\]", weights(lambda t: t.update({DOWN: torch.ones(3, 3)}))),
    model("NaN", "holds NaN or infinity", weights(lambda t: t[DOWN].fill_(float("nan")))),
    model("an index that leads elsewhere", UNLOADABLE, indexed(ELSEWHERE)),
    model("an index of numbers", UNLOADABLE, indexed({"weight_map": 5})),
    model("generation in words", UNLOADABLE, replaced("generation_config.json", '{"max_new_tokens": "x"}')),
    Case("model: diff with a broken index", lambda p: ("diff", p.model, _with(p, indexed([1]))), r"index\.json: not a JSON object"),
    Case("model: diff with an index that leads elsewhere", lambda p: ("diff", p.model, _with(p, indexed(ELSEWHERE))), "secret.safetensors: no such file"),
]  # fmt: skip


def _with(place: Place, change: Callable[[Path], object]) -> Path:
    folder = shutil.copytree(place.model, place.bad / "model")
    change(folder)
    return folder


# flags


def flags(name: str, says: str, make: Make, code: int = 2) -> Case:
    return Case(f"flags: {name}", make, says, code)


FLAGS = [
    flags("nothing", "required: COMMAND", lambda p: ()),
    flags("unknown command", "invalid choice: '<script>", lambda p: (SCRIPT,)),
    flags("no model", "required: --model", lambda p: ("doctor",)),
    flags("no value", "expected one argument", lambda p: ("doctor", "--model")),
    flags("unknown flag", "unrecognized arguments: --nosuch", lambda p: p.cut(p.facts, "--nosuch", "1")),
    flags("limit of nothing", "--limit: invalid number from 1 on", lambda p: p.cut(p.facts, "--limit", "0")),
    flags("negative people", "--people", lambda p: p.cut(p.facts, "--people", "-1")),
    flags("seed in words", "--seed: invalid int value", lambda p: p.cut(p.facts, "--seed", "x")),
    flags("seed of 6000 digits", "--seed: invalid int value", lambda p: p.cut(p.facts, "--seed", HUGE)),
    flags("batch size NaN", "--batch-size: invalid batch size", lambda p: p.cut(p.facts, "--batch-size", "nan")),
    flags("ridge NaN", "--ridge: invalid", lambda p: p.cut(p.facts, "--ridge", "nan")),
    flags("unknown format", "invalid choice: 'xml'", lambda p: ("show", p.edit, "--format", "xml")),
    flags("unknown dtype", "invalid choice: 'int3'", lambda p: ("doctor", "--model", p.model, "--dtype", "int3")),
    flags("infinite scale", "invalid finite number", lambda p: ("compose", p.edit, "--scale", "1e999", "--out", p.run / "e")),
    flags("unknown form", "invalid choice: '../../x'", lambda p: ("export", p.edit, "--model", p.model, "--to", TRAVERSAL, "--out", p.run / "e")),
    flags("ridge below zero", "a ridge of -1.0", lambda p: p.cut(p.facts, "--ridge", "-1"), 1),
    flags("unknown device", "no device 'banana'", lambda p: ("doctor", "--model", p.model, "--device", "banana"), 1),
    flags("device without numbers", "no device 'meta'", lambda p: ("doctor", "--model", p.model, "--device", "meta"), 1),
    flags("one factor for two", "1 factors for 2 edits", lambda p: ("compose", p.edit, p.edit, "--scale", "1", "--out", p.run / "e"), 1),
    flags("shard beyond the last", "from 0 to N - 1", lambda p: p.find("scan", "--shard", "5/4"), 1),
    flags("localizer that leads elsewhere", "no localizer '../../x'", lambda p: p.find(TRAVERSAL), 1),
    flags("editor that names code", "no editor '__import__'", lambda p: ("edit", "__import__", "--facts", p.facts, "--model", p.model), 1),
    flags("group that is none", "no group '<script>", lambda p: p.find("scan", "--group", SCRIPT), 1),
    flags("prompt beyond the context", "do not fit the model's context of 64", lambda p: ("ask", "hello " * 3000, "--model", p.model), 1),
    flags("prompt of half a character", "half a character", lambda p: ("ask", "\udcff", "--model", p.model), 1),
    flags("out is a file", "a file, not a folder", lambda p: p.find("scan", "--out", p.facts), 1),
    flags("out is below a file", "could not write it", lambda p: (*p.cut(p.facts)[:-1], p.facts / "e.safetensors"), 1),
    flags("out is taken", "not empty; choose a new folder", lambda p: ("export", p.edit, "--model", p.model, "--out", p.good), 1),
    flags("people of no world", "nobody in this world is called '<script>", lambda p: ("demo", "--forget", SCRIPT, "--out", p.run), 1),
]  # fmt: skip


CASES = [*FACTS, *HEADERS, *EDITS, *OTHERS, *MODELS, *FLAGS]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is whole: a model, an edit of it, facts."""
    folder = tmp_path_factory.mktemp("good")
    an_edit(save_model(folder / "model"), folder / "edit.safetensors")
    (folder / "facts.jsonl").write_text(lines(ANN, BOB))
    return folder


@pytest.fixture
def place(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Folders of a case; what is to be run starts two folders down, so that ../../x would still be seen."""
    for name in ("bad", "run", "here/and/there"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/and/there")
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path / "run" / "cache"))
    return Place(good, tmp_path / "bad", tmp_path / "run")


def contents(*folders: Path) -> dict[str, bytes]:
    """Every file under the folders, with what is in it; folders and links by name."""
    found = [p for folder in folders for p in folder.rglob("*")]
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in found}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_bad_input(case: Case, place: Place, cli: Cli) -> None:
    words, outside = case.make(place), (place.good, place.bad, Path.cwd().parents[1])
    before = contents(*outside)
    with watched(place.run, inputs=place.bad) as happened:
        said = cli(*words)
    assert said.code == case.code, said
    assert said.out == "" and "Traceback" not in said.err
    told = [line for line in said.err.splitlines() if re.match(r"excise( \w+)*: ", line)]
    assert len(told) == 1 and said.err.splitlines()[-1] == told[0], said.err
    assert re.search(case.says, told[0]), told[0]
    # Of what a user typed, argparse quotes all.
    assert told[0].isprintable() and (len(told[0]) < 1300 or case.code == 2)
    assert "please report it" not in told[0]
    assert happened == []
    assert contents(*outside) == before
    assert not list(place.run.parent.rglob("pwned"))


def test_there_are_many_of_each() -> None:
    assert len({c.name for c in CASES}) == len(CASES) >= 40
    assert min(map(len, (FACTS, HEADERS, EDITS, OTHERS, MODELS, FLAGS))) >= 20


def test_the_watch_sees(place: Place) -> None:
    """Were it blind, the cases above would prove nothing."""
    (place.bad / "evil.py").write_text(EVIL)
    with watched(place.run, inputs=place.bad) as happened:
        (place.run / "allowed").write_text("")
        assert happened == []
        exec(compile(EVIL, str(place.bad / "evil.py"), "exec"), {})
        Path("pwned").unlink()
        with pytest.raises(FileNotFoundError):
            __import__("subprocess").run(["/nonexistent/program"])
    kinds = [line.split(" ")[0] for line in happened]
    assert kinds == ["executes", "opens", "os.remove", "subprocess.Popen"]


def test_left_out_records_are_listed(place: Place, cli: Cli) -> None:
    path = place.file("facts.jsonl", lines(ANN, f'{{"id": {HUGE}}}', {**BOB, "id": TRAVERSAL, "anwser": 1}, BOB))
    said = cli(*place.cut(path, "--skip-bad"))
    assert said.code == 3
    assert [line for line in said.err.splitlines() if line.startswith("excise: ")] == [
        f"excise: left out {path}:2: not JSON (a number of too many digits); write one object a line",
        f"excise: left out {path}:3: no field 'anwser'; did you mean answer?",
    ]


def test_hostile_names_stay_names(place: Place, cli: Cli) -> None:
    """Names that are legal in a facts file may not become paths, markup or commands of the terminal."""
    names = (TRAVERSAL, SCRIPT, "\x1b[2J", "/etc/passwd", "a\x00b", "$(touch pwned)", "{{7*7}}", "Ro\u2028me")
    records = [
        {**ANN, "id": n, "subject": n, "prompt": f"{n} lives in", "answer": n, "group": g, "relation": n}
        for n, g in zip(names, ["forget", "retain"] * 4, strict=True)
    ]
    path = place.file("facts.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    import matplotlib.font_manager  # noqa: F401  on a machine's first use it looks for fonts with a program

    before = contents(place.good, place.bad)
    arguments = ("--facts", path, "--model", place.model)
    with watched(place.run, inputs=place.bad) as happened:
        measured = cli("eval", "recall", *arguments, "--edit", place.edit, "--out", place.run / "eval")
        located = cli("localize", "scan", *arguments, "--out", place.run / "localize", "--group", "all")
    assert (measured.code, located.code) == (0, 0), (measured.err, located.err)
    assert happened == [] and contents(place.good, place.bad) == before
    assert list(place.run.parent.rglob("pwned")) == []
    assert "\x1b" not in measured.out + located.out
    assert SCRIPT not in (place.run / "eval" / "report.html").read_text()
    assert set(read_table(place.run / "localize" / TABLE)["fact_id"].to_pylist()) == set(names)


def test_a_hostile_run_folder_is_shown_as_text(place: Place, cli: Cli) -> None:
    samples = [{"group": "forget", "prompt": SCRIPT, "answer": SCRIPT, "before": SCRIPT, "edited": SCRIPT}]
    score = {"fact": "a", "subject": SCRIPT, "group": "forget", "value": 1.0, "detail": SCRIPT}
    item = {"key": "k", "arm": SCRIPT, "evaluation": TRAVERSAL, "mode": "none", "scores": [score]}
    (place.run / "run.json").write_text(json.dumps({"samples": samples, SCRIPT: SCRIPT, "\x1b[2J": "\x1b[2J"}))
    (place.run / "facts.jsonl").write_text(lines({**ANN, "answer": SCRIPT}, BOB))
    (place.run / "results.jsonl").write_text(lines(item))
    with watched(place.run, inputs=place.bad) as happened:
        reported, shown = cli("report", place.run), cli("show", place.run)
    assert (reported.code, shown.code, happened) == (0, 0, [])
    page = (place.run / "report.html").read_text()
    assert SCRIPT not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert SCRIPT in shown.out and "\x1b" not in shown.out
