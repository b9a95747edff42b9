"""Benchmarks: messages a second, the cost of a message, and the same load through other programs.

`python -m bench --help` (`make bench` with all defaults). A *system* is everything between an SMTP
port and a sink: the relay (`systems`), `postfix` or `nullmailer`; it is started for the run and
ended afterwards. A *part* (`parts`, `ledger`) puts one kind of load on a system and returns
figures. `results` measures each part on all systems in turns, and `plot` draws medians and spread.
No test asserts a speed: it would test the machine.
"""
