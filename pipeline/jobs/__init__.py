"""Submits, follows and stops runs as jobs of a Ray cluster, through the cluster's dashboard.

A job executes `retort resume` on the cluster. `pipeline.engines` starts the workers of a stage.
"""

from pipeline.jobs.job import Job, alive, check_store, follow, load, stop, submit

__all__ = ["Job", "alive", "check_store", "follow", "load", "stop", "submit"]
