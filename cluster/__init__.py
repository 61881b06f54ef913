"""Requests, plans and processes: config, planner, scheduler, engine, launchers, HTTP API, clients."""
