"""Silence of the libraries below us: a command says what it does, and nothing else."""

import warnings


def quiet_libraries() -> None:
    """Turn off the bars and the advice of transformers and huggingface_hub."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="huggingface_hub")
