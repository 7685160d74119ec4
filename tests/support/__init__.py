"""What several tests share: pipelines to run, the command line, clusters, packages of plugins, mutations."""
