"""Imported by the fork server of the data workers and by nothing else: its import is what prepares that process.

The server imports torch once for all workers. It ignores SIGTERM, which a scheduler sends to the whole process group:
the main process may want to finish its step and save, and without the server its workers end. The server ends by itself
when they and the main process are gone.
"""

import signal

import bestrq2.data.batch  # noqa: F401  (what the workers need)

signal.signal(signal.SIGTERM, signal.SIG_IGN)
