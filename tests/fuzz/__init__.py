"""Fuzzing: `python -m tests.fuzz [--seconds 1800] [TARGET ...]`, coverage-guided by Atheris; install `.[fuzz]` first.

    targets     what reads a stranger's bytes: plain functions of bytes, that the suite calls too (tests/test_fuzz.py)
    mutate      changes that keep a file plausible: JSON by value, zip and tar with right checksums, JPEG with its end
    judge       what is success, one of our errors, or a finding
    seeds       sound inputs of every target
    child       one target in a process that may crash, hang or grow
    __main__    the campaign: a child a turn, what it found, and the counts as JSON

A target ends in success or in one of our errors: of type ValueError, ShardError, VideoError or FileNotFoundError, and
raised by a `raise` of ours. All else is a finding: another exception, a crash, more memory or time than the limits.
"""
