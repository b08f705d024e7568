"""Recurrences over a sharded sequence; the claims are in tests/on_devices/context_parallel.py."""

from devices import run_on_virtual_devices


def test_a_sharded_recurrence_is_the_whole_one_on_virtual_devices():
    run_on_virtual_devices("context_parallel")
