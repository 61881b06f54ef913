"""The APIs that clients speak. Each dialect reads requests into one common form, and shows answers in its own form."""
