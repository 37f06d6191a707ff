"""The work: data, adapters, the training step, rendering, files. Never imports `app`."""
