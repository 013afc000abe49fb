"""excise sae: train a sparse dictionary, look at one, check that it belongs to a model, and show its features."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.commands import common
from excise.progress import say

if TYPE_CHECKING:
    from excise.model import Model

ARCHITECTURES = ("topk", "jumprelu", "batchtopk", "standard", "gated")
RULES = ("importance", "sparsity", "attribution", "difference")
DICTIONARY = "a sae-lens folder, testbed:dense, testbed:moe, or release:sae_id from sae-lens's list"
# Documents that are read of an embedded world; texts that a dictionary is measured on and not trained on.
DOCUMENTS, MEASURED = 8000, 400


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise sae train`, `show`, `check` and `features`."""
    actions = parser.add_subparsers(dest="action", metavar="train | show | check | features", required=True)

    def action(name: str, function: Any, summary: str) -> argparse.ArgumentParser:
        made = actions.add_parser(name, help=summary, description=function.__doc__, allow_abbrev=False)
        for flag in ("--quiet", "--debug"):  # of the command; understood behind the action, too
            made.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return made

    _train_flags(action("train", _train, "train a dictionary of one activation of a model"))
    show = action("show", _show, "what a dictionary says of itself")
    show.add_argument("dictionary", help=DICTIONARY)
    common.output_flags(show)
    check = action("check", _check, "whether a dictionary belongs to a model")
    check.add_argument("dictionary", help=DICTIONARY)
    common.model_flags(check)
    _text_flags(check)
    check.add_argument(
        "--explained", type=common.finite, default=0.5, metavar="X", help="least share of variance (default 0.5)"
    )
    common.output_flags(check)
    _feature_flags(action("features", _features, "cards of the features that belong to facts"))


def _train_flags(parser: argparse.ArgumentParser) -> None:
    common.model_flags(parser)
    parser.add_argument("--hook", required=True, metavar="H", help="such as blocks.3.hook_resid_post")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder, in sae-lens's format")
    _text_flags(parser)
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="topk", help="(default topk)")
    parser.add_argument("--features", type=common.positive, metavar="N", help="by default eight times the width")
    parser.add_argument(
        "--k", type=common.positive, metavar="K", help="active features per token, [batch]topk (default 16)"
    )
    parser.add_argument(
        "--tokens", type=common.positive, default=500_000, metavar="N", help="to train on (default 500000)"
    )
    parser.add_argument(
        "--batch", type=common.positive, default=1024, metavar="N", help="tokens in a step (default 1024)"
    )
    parser.add_argument("--lr", type=common.finite, default=1e-3, metavar="X", help="learning rate (default 0.001)")
    parser.add_argument(
        "--set", type=_setting, nargs="+", default=[], metavar="NAME=VALUE",
        help="further fields of sae-lens's config, such as l0_coefficient=3",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default 0)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    common.output_flags(parser)


def _feature_flags(parser: argparse.ArgumentParser) -> None:
    common.model_flags(parser)
    common.facts_flags(parser)
    parser.add_argument("--dictionary", default="", metavar="D", help=f"{DICTIONARY}; an embedded model has its own")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--feature", type=int, nargs="+", metavar="I", help="these, by number; else the rule chooses")
    chosen.add_argument("--top", type=common.positive, default=8, metavar="N", help="so many (default 8)")
    parser.add_argument("--rule", choices=RULES, default=RULES[0], help=f"how they are chosen (default {RULES[0]})")
    parser.add_argument(
        "--most", type=common.finite, default=0.01, metavar="X",
        help="share of the tokens to keep on which a chosen feature may fire (default 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="keep the cards in DIR/features.html; `excise report DIR` shows them, too"
    )
    common.output_flags(parser)


def _text_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--texts", metavar="FILE", help='one text a line, or JSON Lines with "text"; an embedded model has its own'
    )


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise ValueError(text)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


_setting.__name__ = "NAME=VALUE"


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    return {"train": _train, "show": _show, "check": _check, "features": _features}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    """Train a sparse dictionary of one activation of a model, with sae-lens's trainer; nothing is sent anywhere."""
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: there is something already; give --out a new folder")
    if args.k and "topk" not in args.architecture:
        raise ValueError(
            f"--k {args.k}: for topk and batchtopk; {args.architecture} takes fields of its own with --set"
        )
    if args.lr <= 0:
        raise ValueError(f"--lr {args.lr}: a learning rate is above 0")
    texts, held = _texts(args)
    if args.dry_run:
        print(
            f"would train a {args.architecture} dictionary of {args.hook} of {args.model} on {args.tokens} tokens into {out}"
        )
        return 0
    model = common.load_model(args)
    say(f"training on {args.tokens} tokens")
    book = importlib.import_module("sae").train(
        model, args.hook, texts, architecture=args.architecture, features=args.features, k=args.k or 16, tokens=args.tokens,
        batch=args.batch, lr=args.lr, folder=out, seed=args.seed, **dict(args.set),
    )  # fmt: skip
    found = _about(book) | _fit(book, model, held, least=-math.inf)
    if found["explained variance"] < 0.5:
        say("note: it explains less than half of the variance; give it more tokens, more features or a larger --k")
    return _print(args, found | {"folder": str(out)})


def _show(args: argparse.Namespace) -> int:
    """What a dictionary says of itself: hook, architecture, size, and the model that it was trained on."""
    return _print(args, _about(importlib.import_module("sae").load(args.dictionary)))


def _check(args: argparse.Namespace) -> int:
    """Check that a dictionary belongs to a model: its hook, its width, and how much of the variance it explains there."""
    book = importlib.import_module("sae").load(args.dictionary)
    _, held = _texts(args)
    model = common.load_model(args)
    return _print(args, _about(book) | _fit(book, model, held, least=args.explained))


def _features(args: argparse.Namespace) -> int:
    """Cards of the features that go with the facts to forget and not with the others: what each fires on, and says."""
    from excise.registry import method

    facts, bad = common.load_facts(args, "forget")
    model = common.load_model(args)
    book, maker = (
        importlib.import_module("sae.own").of_model(model, args.dictionary),
        importlib.import_module("sae.cards"),
    )
    shown = facts.shown
    chosen = args.feature
    if not chosen:
        localize = method("localizer", "sae_features").function
        where = localize(model, shown, dictionary=book, rule=args.rule, features=args.top, most=args.most)
        chosen = [site.unit for site in where.sites]
    cards = maker.cards(model, book, chosen, maker.by_group(shown))
    title = f"Features of {book.name}"
    page = cards.save(common.out_folder(args.out), title) if args.out else None
    if args.format == "json":
        rows = [dataclasses.asdict(card) for card in cards]
        common.print_json({"dictionary": book.name, "rule": args.rule, "page": page and str(page), "features": rows})
    else:
        print(common.printable_lines(str(cards)) or f"no feature of {book.name} tells these facts from the others")
        if page:
            print(f"\ncards: {page}")
    return 3 if bad else 0


def _about(book: Any) -> dict[str, Any]:
    return {
        "dictionary": book.name,
        "hook": book.hook,
        "architecture": book.info.get("architecture", ""),
        "features": book.n,
        "width": book.d,
        "trained on": book.info.get("model_name") or None,
        "tokens": book.info.get("training_tokens"),
        "fingerprint": book.fingerprint,
    }


def _fit(book: Any, model: Model, texts: Iterable[str], *, least: float) -> dict[str, Any]:
    """How the dictionary fits the model; raises where it does not."""
    reading = importlib.import_module("sae.reading")
    match = importlib.import_module("sae").check(book, model, list(reading.fitting(model, texts)), least=least)
    found = {"model": model.name, "explained variance": match.explained, "features per token": match.l0}
    return found | {"measured on tokens": match.tokens, "same weights": match.same_weights}


def _print(args: argparse.Namespace, found: dict[str, Any]) -> int:
    if args.format == "json":
        common.print_json(found)
    else:
        common.print_rows([{"what": k, "value": v} for k, v in found.items()])
    return 0


def _texts(args: argparse.Namespace) -> tuple[Iterable[str], list[str]]:
    """What to train on, and the first few, which only measure; of a file, or documents of an embedded model's world."""
    texts: Any
    if args.texts:
        from excise.textfile import TextFile

        texts = TextFile(args.texts)
    elif args.model.startswith("testbed:"):
        from excise.testbed.sampler import Sampler
        from excise.testbed.shipped import world_of

        world = world_of(args.model.removeprefix("testbed:").removesuffix("-oracle"))
        documents = Sampler(world, seed=getattr(args, "seed", 0) + 77)
        texts = [d.text for d in islice(documents, DOCUMENTS + MEASURED if args.action == "train" else MEASURED)]
    else:
        raise ValueError('give --texts FILE: ordinary text for this model, one a line, or JSON Lines with "text"')
    held = min(MEASURED, max(1, len(texts) // 10)) if args.action == "train" else MEASURED
    return _Rest(texts, held), list(islice(texts, held))


@dataclasses.dataclass(frozen=True)
class _Rest:
    """The texts after the first `skipped`; all of them where there are no more."""

    texts: Any
    skipped: int

    def __iter__(self) -> Any:
        return islice(self.texts, self.skipped if len(self.texts) > self.skipped else 0, None)
