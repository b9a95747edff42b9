"""Benchmarks: what the relay does in a second, what a message costs, and the same load through
Postfix beside it.

`python -m bench --help` (`make bench` with all defaults). A *system* (`systems`, `relay_system`,
`postfix_system`) is everything between an SMTP port and a sink, started for the run and ended after
it. A *part* (`parts`) puts one kind of load on one system and gives figures. `runs` alternates the
systems, part by part, so that a slow minute of the machine falls on all; `report`, `plot` show
medians, spread and ratios. Nothing asserts a speed: that would test the machine.
"""
