"""Every polling interval of the package, in seconds: for loops whose event cannot wake them."""

from __future__ import annotations

# A client that left, a process that died, a word from the supervisor, a model on another host:
# each is noticed within this time, and looked for with a system call or a small message.
WATCH_S = 0.25

# An engine that has nothing to compute but something to wait for: released leases, room in the KV cache.
ENGINE_S = 0.02
LEASE_RENEWAL_S = 0.05  # of the leases of waiting jobs
HEARTBEAT_S = 1.0  # an engine's sign of life to waiting requests
REQUEST_S = 0.05  # an orchestrator's thread looks for a client that left, a dead stage, a passed deadline

# Starting and stopping, where the caller waits for the end of the loop.
START_S = 0.1  # whether tritonserver's models are ready
RELOAD_S = 0.05  # whether Triton has unloaded a model
REAP_S = 0.02  # whether processes that were killed are gone
FOLLOW_S = 0.2  # new lines of tritonserver's log
RETRY_S = 1.0  # a host that is not there yet
RESOLVE_S = 5.0  # the addresses of a name that stands for several servers of stage 1
RETEST_S = 10.0  # a server of stage 1 that has failed its self-test
SWEEP_S = 0.05  # files that threads of an interrupted download still open
TURN_S = 0.01  # another process that is loading the same weights
