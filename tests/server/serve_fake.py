"""A server process for the signals' tests: serve_fake.py STEP_S DRAIN_TIMEOUT_S FLUSH_S."""

from __future__ import annotations

import sys

from tests.server.fake_engine import FakeEngine
from vattention.server import bind, lifecycle, serve

if __name__ == "__main__":
    step_s, drain_timeout_s, lifecycle.FLUSH_S = map(float, sys.argv[1:])
    serve(
        FakeEngine(step_s=step_s),
        bind("127.0.0.1", 0),
        drain_timeout_s=drain_timeout_s,
        on_ready=lambda url: print(url, flush=True),
    )
    print("ended", flush=True)
