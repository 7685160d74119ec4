"""Help for users. `explain` describes settings. `markdown` writes docs/manifest.md. `starter` fills in the manifests of
`retort init` from `templates`. `completion` completes words in the shell.

All of it is read from the classes of settings, so the settings of plug-ins are included. This file imports none of the
modules, because every start of the command line imports `completion`, and the other modules are slow to import.
"""
