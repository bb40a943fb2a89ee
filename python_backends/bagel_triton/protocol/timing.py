"""Polling intervals and heartbeats, in seconds: everything that is not woken by an event."""

ENGINE_POLL_S = 0.02  # an idle engine looks for released leases and room in the KV cache
LEASE_RENEWAL_S = 0.05  # a stage renews the leases of its waiting jobs
HEARTBEAT_S = 1.0  # a stage shows waiting requests that it is alive
GAUGE_S = 0.25  # the thinker counts the KV cache's blocks
REQUEST_POLL_S = 0.05  # the pipeline looks for a client that left, a dead stage, a deadline
LAST_WORDS_S = 0.3  # answers of a dead process, or of another process of its stage, may still arrive
PROCESS_POLL_S = 0.25  # a process looks at others: whether they live, are ready, or told it to end
