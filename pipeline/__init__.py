"""Runs the stages of a pipeline: manifest, plan, store, engines and command line. What stages compute is in
`stages`.

Nothing here imports torch.
"""

DEFAULT_STORE = "./retort-store"
"""The store if none is given, relative to the folder in which the command is started."""
