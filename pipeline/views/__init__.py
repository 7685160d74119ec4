"""Shows plans and runs on the terminal: progress lines, tables and comparisons.

Views only read and print. `stages.evaluate` and `stages.reports` compute the metrics that they show.
"""
