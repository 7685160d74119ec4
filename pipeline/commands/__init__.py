"""The commands, a file for each few of them. click, and nothing heavy, is imported at the top: help must be instant."""
