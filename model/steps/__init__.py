"""The kinds of steps of a program: what each computes, reads and writes."""
