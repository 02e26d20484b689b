"""The volunteer's worker: leases a task, trains it, hands it in."""
