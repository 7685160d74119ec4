"""Runs the stages of a pipeline: manifests, plans, the store, engines and the command line.

`stages` holds what each stage computes. Nothing here imports torch.
"""

DEFAULT_STORE = "./retort-store"
"""The path of the store if none is given, relative to the current folder."""
