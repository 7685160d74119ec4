"""What a person sees of plans and runs: progress lines, tables, graphs, comparisons.

Views read and print. They change no run, and they compute no figures: those come from `stages.reports`.
"""

from pipeline.views.progress import describe, reporter

__all__ = ["describe", "reporter"]
