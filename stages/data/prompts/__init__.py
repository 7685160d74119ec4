"""Prompts from files, or from an image set's captions.

They are checked and laid out once, as a table that workers map into memory.
"""
