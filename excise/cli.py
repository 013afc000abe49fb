"""The command line. Parsing only: nothing heavy is imported before a command runs, and one command is one file.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 error, 2 usage, 3 finished with failed items,
4 verification failed, 130 interrupted with its state saved.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from excise import __version__
from excise.errors import ExciseError
from excise.progress import be_quiet, say

OK, ERROR, USAGE, PARTIAL, UNVERIFIED, INTERRUPTED = 0, 1, 2, 3, 4, 130
# Characters of an error's line; a value quoted from a file can have millions.
LONGEST = 1200
NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

COMMANDS = {
    "demo": "the whole chain on an embedded model: trace, cut, verify, measure, report",
    "run": "the whole chain on your own model and facts",
    "localize": "find where facts are kept; many facts, resumable, to Parquet",
    "edit": "compute an edit that removes the forget facts",
    "eval": "measure a model, an edit, or any two checkpoints",
    "ask": "talk to a model, with or without an edit",
    "report": "write report.html of a run folder again",
    "export": "make an edit a plain checkpoint, a PEFT adapter, or a steering file for lm-eval",
    "show": "what is inside an edit, a localization, a ledger or a run folder",
    "diff": "what tells two edits or two checkpoints apart, or a model from itself under an edit",
    "compose": "one edit from several, with a report of their conflicts",
    "withdraw": "take requests out of a ledger, as if they had never come",
    "doctor": "what excise can reach in a model",
    "list": "the localizers, editors and evaluations there are",
    "sae": "train a sparse dictionary, check one, and show its features",
    "testbed": "train the embedded models again, or show their measured quality",
}
_MODULES = {"eval": "evaluate", "list": "listing"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; never raises for what a user can cause."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse(words)
    except SystemExit as done:
        return int(done.code or 0)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _failed(error, "--debug" in words)
    be_quiet(args.quiet)
    _environment(args)
    try:
        from excise.guard import check_folders

        check_folders()
        with _plain_warnings():
            return int(args.run(args))
    except KeyboardInterrupt:
        print("excise: interrupted; what was finished is saved, run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not complain about it while shutting down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        return _failed(error, args.debug)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The parsed command, its `run` function included."""
    parser = argparse.ArgumentParser(
        prog="excise",
        description="Find where a language model keeps a fact, cut it out without training, and measure what is left.",
        epilog="`excise COMMAND --help` explains one command; `excise demo` needs nothing but this machine.",
    )
    parser.add_argument("--version", action="version", version=f"excise {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((w for w in words if not w.startswith("-")), None)
    for name, summary in COMMANDS.items():
        made = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
        )
        if name == chosen:
            module = importlib.import_module(f"excise.commands.{_MODULES.get(name, name)}")
            made.add_argument("--quiet", action="store_true", help="say nothing but results and errors")
            made.add_argument("--debug", action="store_true", help="show the traceback of an error")
            module.arguments(made, words)
            made.set_defaults(run=module.run)
    args = parser.parse_args(words)
    args.words = list(words)
    return args


def _environment(args: argparse.Namespace) -> None:
    """Settings of the libraries, made before they are imported."""
    defaults = {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "WANDB_MODE": "disabled",
        # Waiting threads that spin are a little faster alone, and several times slower beside other work.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if getattr(args, "offline", False):
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings meant for users as one line of chatter; those meant for programmers not at all."""
    with warnings.catch_warnings():
        for programmers in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", programmers)
        warnings.showwarning = lambda message, *_, **__: say(f"note: {message}")
        yield


def _failed(error: Exception, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(f"excise: {_short(explain(error))}", file=sys.stderr)
    return UNVERIFIED if getattr(error, "unverified", False) else ERROR


def _short(text: str) -> str:
    """One line that no file can make endless or drive the terminal with."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-300:]}"


def explain(error: Exception) -> str:
    """One line about an error: where, what, what would do."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; free some space and run the same command again, finished work is kept"
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, (ExciseError, ValueError, FileNotFoundError)) and text:
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else text
    if "out of memory" in text.lower() or isinstance(error, MemoryError):
        return "out of memory; try a smaller --batch-size, --dtype bfloat16, or --device auto"
    return f"unexpected {type(error).__name__}: {text}; --debug shows where, please report it"


if __name__ == "__main__":
    sys.exit(main())
