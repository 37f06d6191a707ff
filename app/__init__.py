"""What a person touches: the command line today, the window in a later version. Never imports torch."""
