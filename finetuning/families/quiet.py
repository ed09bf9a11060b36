"""What the libraries say while they load that tells a person nothing."""

from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

for _library in (diffusers_logging, transformers_logging):
    _library.disable_progress_bar()  # a bar for every part of a model that is loaded says nothing


@contextmanager
def errors_only():
    """No warnings of diffusers and transformers within the block: for what is checked here anyway."""
    libraries = (diffusers_logging, transformers_logging)
    kept = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(libraries, kept, strict=True):
            library.set_verbosity(level)
