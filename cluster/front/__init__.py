"""Serves clients: reads requests in the form of any supported API, computes logs of answers, and shows them in the same
form."""
