"""The build stages: resolve, fetch, convert, build, verify; and synthetic checkpoints."""
