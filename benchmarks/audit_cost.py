"""What the default audit costs: wall time by evaluation, forward passes, and peak memory.

    python benchmarks/audit_cost.py [--quick] [--model dense] [--with behavioural,intrinsic] [--part time passes memory]

Twenty facts about people to forget, with people to keep, name-sharers and unknown names, on the embedded model: arms
before, edited (ROCR), control and oracle. Two threads, wall time; the edit itself is not part of it. Passes: forward
passes of each evaluation alone, with nothing kept from another one, against those of the audit, where each is shared.
Memory: the high-water mark above the loaded, warm model, against a plain pass over one batch, in a process of its own; a
random Llama of GPT-2-small shape, as in `overhead.py`, asked for what it says, so that it knows the facts. Attacks that
rewrite every matrix keep a copy to put back, and training needs gradients and moments of all weights: those are held
against the model, that many copies and one batch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import BATCH_TOKENS, RETURNED, bar, build, peak, rank_one
from excise.arms import Arm
from excise.attacks import attacks
from excise.audit import chosen, told
from excise.chain import random_twin
from excise.comparison import roles
from excise.edits import Edit
from excise.facts import Facts
from excise.measure import measure
from excise.model import Model, load
from excise.progress import be_quiet
from excise.registry import Method, methods
from excise.scores import Results
from excise.testbed import facts, general_text, refusals

FACTS, SEED, AIM = 20, 7001, 90.0
PARTS = ("time", "passes", "memory")
# Copies of the weights that an attack cannot do without: what is put back; gradients and AdamW's two moments beside it.
COPIES = {"quantisation": 1, "pruning": 1, "relearning": 4}


class Counter:
    """Forward passes of some models while it is open."""

    def __init__(self, models: Sequence[Model]) -> None:
        self.models, self.passes = {id(m.hf): m for m in models}.values(), 0

    def _count(self, *_: Any) -> None:
        self.passes += 1

    @contextmanager
    def open(self) -> Iterator[Counter]:
        """Count inside the block."""
        handles = [m.hf.register_forward_pre_hook(self._count) for m in self.models]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def questions(name: str, seed: int) -> Facts:
    """Twenty forget facts of as many people as it takes, and everybody else."""
    known = facts(name, people=10, seed=seed, unknown=24)
    turned = [f for i in (0, 3) for person in known.group("forget").subjects for f in _of(known, person)[i : i + 1]]
    return Facts([*turned[:FACTS], *(f for f in known if f.group != "forget")])


def _of(known: Facts, person: str) -> list[Any]:
    return [f for f in known.group("forget") if f.subject == person]


def arms_of(name: str, known: Facts, seed: int) -> tuple[list[Arm], Edit]:
    """Before, edited, control and oracle, anew, so that nothing is remembered."""
    from edit import rocr

    model, oracle = load(f"testbed:{name}"), load(f"testbed:{name}-oracle")
    edit = rocr(model, known.shown.group("forget"), known.shown.group("retain", "neighbour"), seed=seed)
    return fresh(model, oracle, edit, seed), edit


def fresh(model: Model, oracle: Model, edit: Edit, seed: int) -> list[Arm]:
    """Arms that remember nothing."""
    twin = random_twin(edit, seed)
    return [Arm("before", model), Arm("edited", model, edit), Arm("control", model, twin), Arm("oracle", oracle)]


def audited(
    arms: Sequence[Arm], wanted: Sequence[Method], known: Facts, shared: dict[str, Any]
) -> tuple[Any, int, float]:
    """Results, forward passes and seconds of some evaluations."""
    start = time.perf_counter()
    with Counter([a.model for a in arms]).open() as counter:
        results = measure(arms, wanted, known, shared=shared)
    return results, counter.passes, time.perf_counter() - start


def memory_job(job: str, shape: str) -> dict[str, int]:
    """Bytes above the warm model that one evaluation, or one batch, needs at its peak. In a process of its own."""
    model = build(shape, "cpu", "float32")
    known = as_said(model, facts(0, people=2, retain=12, neighbours=12, unknown=4, general=4))
    change = rank_one(model, "weight edit")
    arms = [Arm("before", model), Arm("edited", model, change)]
    prompts = [p for f in known for p in f.prompts if p.text and p.answer]
    _ = model.names.weights(), model.fingerprint, model.encode(prompts[:4], answers=True)
    model.logits(model.encode(prompts[:1]))

    results: list[Results] = []

    def work() -> None:
        if job == "batch":
            _, batch = max(model.batches(prompts, answers=True), key=lambda pair: pair[1].ids.numel())
            model.logits(batch)
        else:
            results.append(measure(arms, [methods("evaluation")[job]], known, shared={"limit": 8}))

    above = peak(model, work)
    values = sum(s.value is not None for r in results for part in r.scores.values() for s in part)
    own = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    touched = sum(model.weight(str(c.site)).numel() for c in change.changes) * 4
    return {"above": above, "model": own, "touched": touched, "values": values}


def as_said(model: Model, known: Facts) -> Facts:
    """The facts with what the random model says, one of four words, in place of the answers: so it knows them.

    Every third stays, for what asks of longer answers, or of answers that nobody shares.
    """
    head, tokenizer = model.hf.get_output_embeddings().weight, model.tokenizer
    ids = {w: tokenizer(f" {w}", add_special_tokens=False)["input_ids"] for w in sorted({f.answer for f in known})}
    words = {only[0]: word for word, only in [(w, i) for w, i in ids.items() if len(i) == 1][:4]}
    with torch.no_grad():
        # The others' logits are zero, and the largest of four random ones is far above that.
        head *= torch.tensor([40.0 if i in words else 0.0 for i in range(len(head))])[:, None]
    asked = [p for n, f in enumerate(known) if n % 3 != 2 for p in f.prompts]
    said = {}
    for index, batch in model.batches(asked, tokens=256):
        logits = model.logits(batch)
        for row, i in enumerate(index):
            first = int(logits[row, batch.lengths[row] - 1].argmax())
            said[asked[i]] = replace(asked[i], answer=words.get(first, asked[i].answer))
    changed = [tuple(said.get(p, p) for p in f.prompts) for f in known]
    return Facts(replace(f, answer=mine[0].answer, prompts=mine) for f, mine in zip(known, changed, strict=True))


def memory(names: Sequence[str], shape: str) -> dict[str, float]:
    """(model + peak) / (model + touched matrices + one batch, and the copies it may hold) of every evaluation."""
    found = {}
    for job in ("batch", *names):
        words = [sys.executable, __file__, "--job", job, "--shape", shape]
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **RETURNED})
        if done.returncode:
            raise SystemExit(f"memory job {job} failed:\n{done.stderr}")
        found[job] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"memory of {job}: {found[job]['above'] / 1e6:.0f} MB above the model, {found[job]['values']} values",
            file=sys.stderr,
            flush=True,
        )
    one = found.pop("batch")
    allowed = one["model"] + one["touched"] + one["above"]
    return {n: (one["model"] + f["above"]) / (allowed + COPIES.get(n, 0) * one["model"]) for n, f in found.items()}


def within(name: str) -> str:
    """What the peak of an evaluation is held against, in words."""
    copies = COPIES.get(name)
    return "model + touched matrices" + (f" + {copies} model sizes" if copies else "") + " + one batch"


def run_audit(
    args: argparse.Namespace, wanted: Sequence[Method], alone: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and bars of the audit once, and with `alone` of each of its evaluations once more by itself."""
    known = questions(args.model, SEED)
    arms, edit = arms_of(args.model, known, SEED)
    people = known.group("forget").subjects
    texts = tuple(general_text(args.model, 100, seed=SEED, exclude=people))
    shared = {"seed": SEED, "texts": texts, "refusals": tuple(refusals(args.model))}
    results, passes, seconds = audited(arms, wanted, known, shared)
    print(told(results))
    for attack in attacks(results, roles(results)):
        print(f"  {attack}")
    for name, took in sorted(results.recipe["seconds"].items(), key=lambda item: -item[1]):
        print(f"{name:24} {took:6.1f} s")
    found = {"seconds": seconds, "by evaluation": results.recipe["seconds"], "passes": passes}
    bars = [bar(f"default audit of {FACTS} forget facts, {args.threads} threads, seconds", seconds, None, AIM)]
    if alone:
        models = arms[0].model, arms[-1].model
        apart = {m.name: audited(fresh(*models, edit, SEED), [m], known, shared)[1] for m in wanted}
        found["passes alone"] = apart
        share = passes / sum(apart.values())
        bars.append(bar("forward passes of the audit over those of its evaluations one by one", share, None, 1.0))
    return found, bars


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="what is measured; all when not given")
    parser.add_argument("--quick", action="store_true", help="as --part time")
    parser.add_argument("--model", default="dense", choices=("dense", "moe"))
    parser.add_argument(
        "--with", dest="wanted", default="", help="families or evaluations in place of the default audit"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="gpt2-small", help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    be_quiet()
    if args.job:
        torch.set_num_threads(1)
        print(json.dumps(memory_job(args.job, args.shape)))
        return
    torch.set_num_threads(args.threads)
    wanted = chosen([w for w in args.wanted.split(",") if w])
    parts = ("time",) if args.quick else args.part
    found: dict[str, Any] = {}
    bars: list[dict[str, Any]] = []
    if {"time", "passes"} & set(parts):
        found, bars = run_audit(args, wanted, "passes" in parts)
    if "memory" in parts:
        found["memory"] = memory([m.name for m in wanted], args.shape)
        bars += [bar(f"peak memory of {n} / ({within(n)})", value, None, 1.0) for n, value in found["memory"].items()]
    for b in bars:
        print(f"{b['name']}: {b['value']:.3f} (aim {b['aim']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})")
    settings = {"model": args.model, "facts": FACTS, "threads": args.threads, "batch_tokens": BATCH_TOKENS,
                "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    print(json.dumps({"benchmark": "audit_cost", "settings": settings, "results": found, "bars": bars}))


if __name__ == "__main__":
    main()
