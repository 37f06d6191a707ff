"""`python -P -m app`: the same as the `impasto` command."""

from app.main import main

if __name__ == "__main__":
    main()
