"""Tests: `unit` needs Python only, `integration` real databases and brokers, `acceptance` whole
processes."""
