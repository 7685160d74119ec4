"""Runs as jobs of a Ray cluster: submitted, followed and stopped through the dashboard of the cluster.

A job executes `retort resume`, so it does what the command does. The workers of a stage are in `pipeline.engines`.
"""

from pipeline.jobs.job import Job, alive, follow, load, stop, submit

__all__ = ["Job", "alive", "follow", "load", "stop", "submit"]
