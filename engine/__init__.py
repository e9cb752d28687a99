"""The runtime and the server: learned words in, images out, without PyTorch.

The path of a request reads down the list: serving -> batching -> prompts -> pipeline -> samplers ->
sessions, with concepts, bundle and errors beside them. docs/architecture.md has a row for each.
"""
