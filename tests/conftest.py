"""Settings shared by every test: two threads and fixed seeds, so that results do not depend on the machine."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

# Before any library reads them: the tests must behave on two cores, and nothing may try to reach a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Started in the background by a script, this process ignores Ctrl-C, and so would every process that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes depends on who else uses the machine; what it finds must not.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")
