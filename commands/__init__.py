"""What people type: the command line, the supervisor of a single machine, the demo, and the
checks."""
