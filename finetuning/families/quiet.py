"""What the libraries say while they load that helps nobody."""

from contextlib import contextmanager


@contextmanager
def errors_only():
    """No warnings and no progress bars of diffusers and transformers within the block: for what is checked here
    anyway, and for bars of a second."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()
