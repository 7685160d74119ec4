"""What a person sees of plans and runs: progress lines, tables, graphs and comparisons.

Views only read and print. The figures of evaluations are computed in `stages.evaluate` and `stages.reports`.
"""
