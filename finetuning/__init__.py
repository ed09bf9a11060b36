"""What the scripts share. Importable from the checkout, nothing to install."""

import logging

# bitsandbytes warns at every import, on GPUs too, that a 4-bit kernel for CPUs is not installed; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
