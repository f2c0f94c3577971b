"""Tasks that lmms-eval lacks. This folder is what its `--include_path` takes."""
