"""Models of another server, as the orchestrator sees them: where they are, and whether they are there.

A connection to a host that has gone may stay silent for many minutes, and so may a request at
a stage process that was killed there. So each model is asked every :data:`POLL_S` seconds
whether it is ready: that server's watchdog unloads a stage that died, and one that is out of
reach does not answer. The next request finds it again by itself, as each has a connection
of its own.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping

import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

# Triton is on this host or network: a restarted one is found within a second, and
# http_proxy of the environment is not for it.
CHANNEL_ARGS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]
POLL_S, ANSWER_S = 0.25, 3.0


class RemoteModels:
    """Watches models by the gRPC ``addresses`` of their servers."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        self.addresses = addresses
        # When the last question began that had no good answer.
        self._missed_at = dict.fromkeys(addresses, -math.inf)
        self._closing = threading.Event()
        for address in set(addresses.values()):
            threading.Thread(target=self._ask, args=(address,), daemon=True).start()

    def watch(self, model: str) -> Callable[[], bool]:
        """Whether ``model`` has been there since this call, when called."""
        began = time.monotonic()
        return lambda: self._missed_at[model] < began

    def close(self) -> None:
        """Ask no more."""
        self._closing.set()

    def _ask(self, address: str) -> None:
        while not self._closing.is_set():
            # A connection that failed once is not trusted again.
            with triton.InferenceServerClient(address, channel_args=CHANNEL_ARGS) as client:
                while self._all_ready(client, address) and not self._closing.wait(POLL_S):
                    pass
            self._closing.wait(POLL_S)

    def _all_ready(self, client: triton.InferenceServerClient, address: str) -> bool:
        models = [model for model, other in self.addresses.items() if other == address]
        began = time.monotonic()
        try:
            missing = [model for model in models if not client.is_model_ready(model, client_timeout=ANSWER_S)]
        except InferenceServerException:  # out of reach, with all that it has
            missing = models
        self._missed_at.update(dict.fromkeys(missing, began))
        return not missing
