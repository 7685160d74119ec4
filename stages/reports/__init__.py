"""Pages and figures of sealed artifacts: comparisons of evaluations, samples of datasets, images on demand.

No module here is a stage, and none of their outputs is sealed. The page of a single evaluation is in `stages.evaluate`.
"""
