"""Errors that a user can act on; each message is one line: where, what, what would do."""

from __future__ import annotations


class ExciseError(Exception):
    """Base of the errors below; the command line prints it without a traceback."""


class FingerprintMismatch(ExciseError):
    """An artefact was made for other weights, another tokenizer or another dictionary than the ones at hand."""


class NotBakeable(ExciseError):
    """A change cannot be written into weights."""


class DamagedFile(ExciseError):
    """A file is not what its name or header promises."""
