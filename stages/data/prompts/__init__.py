"""Reads prompts from files, or from the captions of an image set.

Prompts are checked once and written to a table, which all workers map into memory.
"""
