"""One file per command: `arguments(parser, argv)` declares its flags, `run(args)` does the work and returns the exit code.

Nothing but the standard library and plain data modules may be imported at the top of these files: help must be instant.
"""
