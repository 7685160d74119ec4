"""The machine that runs stages: manifest, plan, store, engines, command line. It imports no torch."""

DEFAULT_STORE = "./retort-store"
"""Where artifacts and runs are kept if nobody says otherwise: in the folder that a command is given in."""
