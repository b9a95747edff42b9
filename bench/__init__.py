"""Benchmarks: messages a second, the cost of a message, and the same load through Postfix.

`python -m bench --help` (`make bench` with all defaults). A *system* (`systems`) is everything
between an SMTP port and a sink; it is started for the run and ended afterwards. A *part* (`parts`)
puts one kind of load on a system and returns figures. `results` measures each part on all systems
in turns, and `plot` draws medians and spread. No test asserts a speed: it would test the machine.
"""
