"""Processes of tests, forked from one that has imported the program."""
