"""The store: a folder of sealed artifacts, and the locks that protect them.

`artifacts` finds, seals and checks artifacts. `locks` uses the file locks of the operating system. The store also holds
the folders of runs. `pipeline.runs` reads and writes them.
"""

from pipeline.store.artifacts import RECORD, Store, load_artifact, read_record
from pipeline.store.locks import hold, holder

__all__ = ["RECORD", "Store", "hold", "holder", "load_artifact", "read_record"]
