"""The machine that runs stages: manifest, plan, store, engines, command line. It imports no torch."""
