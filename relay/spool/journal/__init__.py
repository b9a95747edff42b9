"""The journal: accepted messages in append-only segments, with the envelopes that make their rows.

`format` is the layout, `directory` the file system, `writer` appends, `scan` reads a segment from
end to end, `reader` reads one body. docs/design.md has the rules and the accidents they prevent.
"""
