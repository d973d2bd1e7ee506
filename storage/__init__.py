"""The ledger: Jobs, Chunks, leases, Results and answers in SQL, and the hot copy of answers in Redis."""
