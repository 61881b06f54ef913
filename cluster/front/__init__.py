"""Serves clients: reads requests in the form of any API, computes logs of answers, and shows them in the same form."""
