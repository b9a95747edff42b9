"""Coverage-guided fuzzing of the parsers of foreign bytes.

`targets` has a function for each parser: it takes any bytes and raises AssertionError if the parser
breaks a promise. `python -m tests.fuzz` gives them bytes that atheris (libFuzzer) makes; what it
finds is kept in `.fuzz/`. `corpus/TARGET.txt` has the inputs that reach all code that was ever
reached, and those that once failed, one on each line with the escapes of Python; lines with # are
comments. tests/unit/test_fuzz_corpus.py gives them to the targets in every run of the tests.
"""
