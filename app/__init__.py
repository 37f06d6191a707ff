"""What a person touches: the window, and the command line. Never imports torch."""
