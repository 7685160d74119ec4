"""Manifests: from YAML text to validated settings. Each problem names its file, line and column.

`document` parses the text. `matrix` expands matrices and chains into single stages. `model` validates the result.
Nothing here reads the store. `pipeline.planning` decides which stages have to run.
"""

from pipeline.manifest.model import Loaded, Manifest, dump, examine, load, loads

__all__ = ["Loaded", "Manifest", "dump", "examine", "load", "loads"]
