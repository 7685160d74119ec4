"""The commands of `retort`, a file for each group. Only click is imported at the top, so that --help is instant."""
