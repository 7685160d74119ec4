"""Runs as jobs of a Ray cluster: submitted, followed and stopped through the cluster's dashboard.

A job's entry point is `retort resume`, so a job does what the command line does. Workers are the matter of `engines`.
"""

from pipeline.jobs.job import Job, alive, follow, load, stop, submit

__all__ = ["Job", "alive", "follow", "load", "stop", "submit"]
