"""From the YAML text of a manifest to validated settings. Each problem names its file, line and column.

The text is parsed (`document`), matrices and chains are expanded into single stages (`matrix`, `chain`), and the result
is validated (`model`). Nothing here looks at a store: what has to be run is decided in `planning`.
"""

from pipeline.manifest.model import Loaded, Manifest, dump, examine, load, loads

__all__ = ["Loaded", "Manifest", "dump", "examine", "load", "loads"]
