"""Helpers of several tests: pipelines to run, the command line, clusters, plug-in packages, mutations."""
