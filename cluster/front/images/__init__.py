"""Handles images in requests: body parts, URLs and hosts, fetching, and storage in the journal."""
