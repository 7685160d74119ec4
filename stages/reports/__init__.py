"""Makes pages and images from sealed artifacts: comparisons of evaluations, samples of datasets, images on demand.

No module here is a stage, and no output is sealed. `stages.evaluate` writes the page of a single evaluation.
"""
