"""Handles images in requests: parts of bodies, URLs and hosts, fetching, and storage in the journal."""
