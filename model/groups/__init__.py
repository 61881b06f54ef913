"""Groups: workers that compute one stage together, each of them some rows of every product."""
