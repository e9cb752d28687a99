"""The runtime and the server: learned words in, images out, without PyTorch.

The path of a request reads down the list: service -> batcher -> prompts -> pipeline -> samplers ->
sessions, with concepts, bundle and errors beside them.
"""
