"""The coordinator process: its composition root, status, and worker metrics."""
