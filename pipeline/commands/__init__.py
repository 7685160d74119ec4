"""The commands of `retort`, one file for each group. Modules import only click at the top, so that --help is fast."""
