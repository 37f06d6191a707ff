"""The size of an adapter out of headers alone, against the adapter that is really injected and the file really written."""

from __future__ import annotations
