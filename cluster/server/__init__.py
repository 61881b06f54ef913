"""The coordinator process: composition root, status, worker metrics."""
