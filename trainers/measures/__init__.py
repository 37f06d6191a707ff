"""Is it learning: measures of a rendered picture's outline, colour and subject. Used by tests and by people, never by a run."""
