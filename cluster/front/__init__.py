"""Serves clients: reads requests of any supported API, computes logs of answers, and shows them in the API's form."""
