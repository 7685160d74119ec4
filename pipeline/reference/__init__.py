"""What settings mean and how to start: `explain`, the manifests of `init` (`starter`, `templates`), shell `completion`.

Everything is read from the settings' classes, so a plugin's settings are included. Import its modules by name: the
command line imports `completion` at every start, and the others cost more.
"""
