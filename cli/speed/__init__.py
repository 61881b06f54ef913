"""Commands that measure speed: bench, measure."""
