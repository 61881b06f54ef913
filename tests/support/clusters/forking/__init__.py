"""Test processes, forked from a process that has imported their program."""
