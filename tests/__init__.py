"""Tests: `unit` needs nothing but Python, `integration` real databases and brokers, `acceptance`
whole processes."""
