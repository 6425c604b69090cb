"""What every test relies on."""

import signal

# A runner in the background may have been started with SIGINT ignored, and its children would
# inherit that; tests press Ctrl-C for real.
signal.signal(signal.SIGINT, signal.default_int_handler)
