"""Processes that start in milliseconds: they are forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["tests.support.kv_process", "tests.support.shm_producer", "tests.support.weights"])
