"""Several processes that work on one run, on one machine or several: collective operations and heartbeats."""
