"""The APIs that clients speak: each reads requests into one form, and shows answers in its own."""
