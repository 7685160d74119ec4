"""The store: sealed artifacts in folders, and the locks that protect them.

`artifacts` finds, seals and checks artifacts. `locks` are released by the operating system when their holder dies.
Runs live in the same store; their folders are described in `runs`.
"""

from pipeline.store.artifacts import RECORD, Store, load_artifact, read_record
from pipeline.store.locks import hold, holder

__all__ = ["RECORD", "Store", "hold", "holder", "load_artifact", "read_record"]
