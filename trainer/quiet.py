"""Silence of the libraries below us: a command says what it does, and nothing else."""

import warnings


def quiet_libraries() -> None:
    """Turn off the bars and the advice of diffusers, transformers and huggingface_hub."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()  # of a model in several files
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub")
