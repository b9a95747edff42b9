"""The fault matrix: real programs, one fault at a time while mail flows, and exact books.

`python -m tests.faults` runs the matrix, `python -m tests.faults.endure` runs random faults for a
while. `cases.py` lists the faults, `trial.py` runs one, `books.py` says what must balance.
docs/reliability.md explains them to readers.
"""
