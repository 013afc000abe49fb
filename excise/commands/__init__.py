"""One file per command: `arguments(parser, words)` declares its flags, `run(args)` works and returns the exit code.

Nothing but the standard library and plain data modules may be imported at the top of these files: help must be instant.
"""
